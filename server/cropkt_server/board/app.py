"""The board's pages: the whole, a part of it that has changed, a question, an action."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from cropkt.errors import CropktError
from cropkt.report.page import palette
from cropkt_server import actions
from cropkt_server.board import views
from cropkt_server.board.guard import BODY, CSRF_HEADER, Guard, csrf_of
from cropkt_server.board.observer import Observer
from cropkt_server.words import when

Action = Callable[[Path, str], Iterator[str]]
ACTIONS: dict[str, Action] = {
    "pause": lambda folder, _: actions.pause(folder),
    "resume": lambda folder, _: actions.resume(folder),
    "retry": lambda folder, row: actions.retry(folder, row=row),
    "revoke-site": lambda folder, site: actions.revoke_site(folder, site),
    "revoke-expert": lambda folder, expert: actions.revoke_expert(folder, expert),
}
"""What the commands do, too; the second argument says to what."""


def board(folder: Path, *, token: str, host: str, port: int) -> Guard:
    """Return the board of a study folder as an ASGI application.

    Args:
        folder: the study's.
        token: opens it.
        host: the address on which it will listen.
        port: and the port.
    """
    pages = _Pages(folder, csrf_of(token))
    static = str(files(__package__).joinpath("static"))
    app = Starlette(
        routes=[
            Route("/", pages.whole),
            Route("/part/{name}", pages.part),
            Route("/ask/{action}", pages.ask),
            Route("/do/{action}", pages.do, methods=["POST"]),
            Route("/palette.css", pages.palette),
            Mount("/static", StaticFiles(directory=static)),
        ]
    )
    return Guard(app, token=token, host=host, port=port)


class _Pages:
    """Renders what an observer sees."""

    def __init__(self, folder: Path, csrf: str) -> None:
        self._folder, self._csrf, self._observer = folder, csrf, Observer(folder)
        self._templates = Environment(
            loader=PackageLoader(__package__, "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters |= {"when": when, "key": _key}

    def whole(self, request: Request) -> Response:
        """The page."""
        status = self._observer.status()
        parts = [(name, self._part(name)[0]) for name in views.PARTS]
        return self._html(
            "page.html.j2",
            study=status.study,
            parts=parts,
            titles={name: title for name, (title, _, _) in views.PARTS.items()},
            headers={CSRF_HEADER: self._csrf},
        )

    def part(self, request: Request) -> Response:
        """One part, if it is not as the browser has it."""
        name = request.path_params["name"]
        if name not in views.PARTS:
            return Response("No such part.\n", 404)
        text, digest = self._part(name)
        if request.query_params.get("seen") == digest:
            return Response(status_code=204)  # htmx leaves the page as it is
        return HTMLResponse(text)

    def ask(self, request: Request) -> Response:
        """The question before an action."""
        action, what = request.path_params["action"], request.query_params.get("what", "")
        if action not in ACTIONS:
            return Response("No such action.\n", 404)
        title, text, button = views.asks(self._observer, action, what)
        return self._html(
            "ask.html.j2", action=action, what=what, title=title, text=text, button=button
        )

    async def do(self, request: Request) -> Response:
        """An action; what it did or why not."""
        action = request.path_params["action"]
        if action not in ACTIONS:
            return Response("No such action.\n", 404)
        body = b""
        async for piece in request.stream():
            body += piece
            if len(body) > BODY:
                return Response(f"At most {BODY} bytes are read.\n", 413)
        what = parse_qs(body.decode("utf-8", "replace")).get("what", [""])[0]
        return await run_in_threadpool(self._do, action, what)

    def _do(self, action: str, what: str) -> Response:
        try:
            lines, title = list(ACTIONS[action](self._folder, what)), "Done"
        except CropktError as error:
            lines, title = [str(error)], "Not done"
        answer = self._html("done.html.j2", title=title, lines=lines)
        answer.headers["HX-Trigger"] = "changed"
        return answer

    def palette(self, request: Request) -> Response:
        """The colours that the report has, too."""
        return Response(palette(), media_type="text/css")

    def _part(self, name: str) -> tuple[str, str]:
        """Return a part and its digest, by which a browser says what it has."""
        title, view, every = views.PARTS[name]
        template = self._templates.get_template(f"{name}.html.j2")
        inner = template.render(**view(self._observer))
        digest = _key(inner)
        whole = self._templates.get_template("part.html.j2")
        text = whole.render(name=name, title=title, inner=inner, digest=digest, every=every)
        return text, digest

    def _html(self, name: str, **values: Any) -> HTMLResponse:
        return HTMLResponse(self._templates.get_template(name).render(**values))


def _key(text: str) -> str:
    """Return what names any text in an id or an address."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
