"""Who may see the board: whoever holds its token, from this machine's own addresses, and no page.

The token comes once, in the printed address, and is exchanged for a cookie that scripts cannot
read and that other sites' requests do not carry. A name of another host in the request is refused,
so that no foreign name can be made to point here; a request that changes anything must carry a
header that only this board's own page knows.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import HTMLResponse, RedirectResponse, Response

from cropkt_server.asgi import App, Event, Receive, Scope, Send

CSRF_HEADER = "X-Cropkt-Board"
BODY = 4096  # bytes of a form
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_LOCKED = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>cropkt board: locked</title></head>
<body><main><h1>This board is locked</h1>
<p>Open the address that cropkt-server printed when the board began.</p>
<p><a href="/">I have done so: go on</a></p></main></body></html>"""


class Guard:
    """Stands before the board's application.

    Args:
        app: the board.
        token: the secret in the printed address.
        host: the address of this machine on which the board listens.
        port: and its port, which tells the cookies of two boards apart.
    """

    def __init__(self, app: App, *, token: str, host: str, port: int) -> None:
        self._app, self._token, self._host = app, token, host
        self._cookie_name = f"cropkt-board-{port}"
        self._session, self._csrf = _derived(token, "session"), csrf_of(token)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        if scope["type"] != "http":
            return

        async def hardened(event: Event) -> None:
            if event["type"] == "http.response.start":
                MutableHeaders(scope=event).update(_HEADERS)
            await send(event)

        answer = self._refusal(scope, Headers(scope=scope)) or self._app
        await answer(scope, receive, hardened)

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        """Return what is answered instead of the board; None if the request may pass."""
        if not self._of_this_machine(headers.get("host", "")):
            return Response("This board is not there under that name.\n", 421)
        query = parse_qs(scope["query_string"].decode("latin-1"))
        if scope["method"] == "GET" and scope["path"] == "/" and "token" in query:
            return self._let_in(query["token"][0])
        if not hmac.compare_digest(self._cookie(headers).encode(), self._session.encode()):
            return HTMLResponse(_LOCKED, 401)
        if scope["method"] not in ("GET", "HEAD") and not self._from_the_page(headers):
            return Response("This did not come from the board's own page.\n", 403)
        return None

    def _let_in(self, token: str) -> Response:
        if not hmac.compare_digest(token.encode(), self._token.encode()):
            return HTMLResponse(_LOCKED, 401)
        answer = RedirectResponse("/", 303)
        answer.set_cookie(self._cookie_name, self._session, httponly=True, samesite="strict")
        return answer

    def _cookie(self, headers: Headers) -> str:
        try:
            found = SimpleCookie(headers.get("cookie", "")).get(self._cookie_name)
        except CookieError:
            return ""
        return found.value if found else ""

    def _from_the_page(self, headers: Headers) -> bool:
        """Return whether a request carries the page's header and no other page's origin."""
        origin = headers.get("origin")
        own = origin in (None, f"http://{headers.get('host', '')}")
        near = headers.get("sec-fetch-site", "same-origin") == "same-origin"
        held = headers.get(CSRF_HEADER, "").encode()
        return own and near and hmac.compare_digest(held, self._csrf.encode())

    def _of_this_machine(self, host: str) -> bool:
        """Return whether a Host header names this board; its port may be a tunnel's.

        Only a name can be made to point elsewhere, so every address is fine where the board
        listens on all of them.
        """
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        name = name.strip("[]").lower()
        if name == "localhost":
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        here = ipaddress.ip_address(self._host)
        return address.is_loopback or here.is_unspecified or address == here


def csrf_of(token: str) -> str:
    """Return what the page sends in `CSRF_HEADER`, and no other page can know."""
    return _derived(token, "csrf")


def _derived(token: str, purpose: str) -> str:
    return hmac.new(token.encode(), purpose.encode(), hashlib.sha256).hexdigest()
