"""The ledger as a file to hand over: a CSV table, or one HTML page that prints well."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path

from cropkt.errors import UsageError
from cropkt.files import replace_file
from cropkt_client.ledger import COLUMNS, Ledger, Row, fingerprint, public_key
from cropkt_client.settings import ReleasePolicy, SiteConfig, read_settings, state_folder
from cropkt_client.words import size

_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; color: #1a1a1a; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
table { border-collapse: collapse; width: 100%; } caption { text-align: left; color: #555; }
th, td { text-align: left; vertical-align: top; padding: .25rem .6rem .25rem 0;
  border-bottom: 1px solid #ddd; } td.n, th.n { text-align: right; }
th { font-weight: 600; } code { font-size: .85em; overflow-wrap: anywhere; }
.whole { border-left: 4px solid #2a7a3b; padding-left: .7rem; }
.broken { border-left: 4px solid #b3261e; padding-left: .7rem; }
@media print { body { margin: 0; max-width: none; font-size: 9pt; } tr { break-inside: avoid; }
  thead { display: table-header-group; } }
"""


class _Html(str):
    """Text that is HTML already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All that a page says."""

    config: SiteConfig
    key: str  # fingerprint of the site's signing key
    rows: list[Row]
    problems: list[str]
    made: str


def write(config: Path, file: Path) -> None:
    """Write the ledger of the site whose `site.yaml` is `config` as its suffix says.

    Raises:
        UsageError: another suffix than .csv or .html.
        ConfigError: there is no key to verify it with, or the table cannot be read.
    """
    if file.suffix not in (".csv", ".html"):
        raise UsageError(file, "neither .csv nor .html", "Name it so")
    state = state_folder(config)
    key, ledger = public_key(state), Ledger(state)
    report = Report(
        config=read_settings(config),
        key=fingerprint(key.public_bytes_raw()),
        rows=ledger.rows(),
        problems=ledger.problems(key),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    text = "".join(_html(report)) if file.suffix == ".html" else _csv(report.rows)
    replace_file(file, text.encode(errors="backslashreplace"))


def _csv(rows: Iterable[Row]) -> str:
    """Return the rows with all columns, so that whoever has the key can verify them again."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    table.writerows([getattr(row, name) for name in COLUMNS] for row in rows)
    return text.getvalue()


def _html(report: Report) -> Iterator[str]:
    site, rows = escape(report.config.site), report.rows
    yield "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
    yield "<meta name='viewport' content='width=device-width'>"
    yield f"<title>What left {site}</title><style>{_STYLE}</style></head><body>"
    yield f"<h1>What left {site}</h1><p>Egress ledger of cropkt, {escape(report.made)}.</p>"
    yield from _verdict(report)
    yield "<h2>How much, to whom</h2>"
    yield from _totals(rows)
    yield "<h2>Under which rules, now</h2>"
    yield from _rules(report.config)
    yield "<h2>Every message</h2>"
    yield from _messages(rows)
    yield "<p>A payload is the text and the arrays of a message, before encryption. Weights and "
    yield "aggregate numbers only: no message has a field for a patient, a slide, a feature, an "
    yield "event time or a path.</p></body></html>\n"


def _verdict(report: Report) -> Iterator[str]:
    if report.problems:
        yield "<div class='broken'><strong>The ledger is not whole.</strong><ul>"
        yield from (f"<li>{escape(problem)}</li>" for problem in report.problems)
        yield "</ul></div>"
    else:
        yield f"<p class='whole'><strong>The ledger is whole.</strong> {len(report.rows)} rows, "
        yield "each in its place, unchanged and signed by this site.</p>"
    yield f"<p>This site's key: <code>{report.key}</code> (SHA-256).</p>"


def _totals(rows: list[Row]) -> Iterator[str]:
    if not rows:
        yield "<p>Nothing has left.</p>"
        return
    count: Counter[tuple[str, str, str]] = Counter()
    sent: Counter[tuple[str, str, str]] = Counter()
    for row in rows:
        key = (row.study, row.recipient, row.message)
        count[key] += 1
        sent[key] += row.bytes
    cells = [
        (study, _code(to[:16]), message, str(number), size(sent[key]))
        for key, number in sorted(count.items())
        for study, to, message in [key]
    ]
    yield from _table(("study", "coordinator's key", "message", "#times", "#size"), cells)
    total, spent = sum(row.bytes for row in rows), [r.epsilon for r in rows if r.epsilon]
    epsilon = (
        f"Epsilon spent on a cohort so far: at most {max(spent):.2f}."
        if spent
        else ("No differential privacy: no epsilon was spent.")
    )
    span = f"{rows[0].time} to {rows[-1].time}"
    yield f"<p>{len(rows)} messages, {size(total)} in all, {escape(span)}. {epsilon}</p>"


def _rules(config: SiteConfig) -> Iterator[str]:
    rules = config.release
    if rules is None:
        yield "<p>None: nothing leaves.</p>"
        return
    who = "somebody here approves each answer" if rules.approval == "human" else "no approval"
    cancers = rules.cancers or config.cancers
    yield from _table(
        ("rule", "value"),
        [
            ("approval", f"{rules.approval}: {who}"),
            ("at least", f"{rules.minimum_patients} patients, {rules.minimum_events} events"),
            ("counts", f"rounded to {rules.round_counts_to}"),
            ("messages", ", ".join(rules.messages)),
            ("cancers", ", ".join(cancers)),
            ("purposes", ", ".join(rules.purposes)),
            ("size of one answer", f"at most {rules.max_megabytes} MB"),
            ("membership audit", _audit(rules)),
            ("differential privacy", _privacy(config)),
        ],
    )


def _audit(rules: ReleasePolicy) -> str:
    if rules.audit is None:
        return "shown to who approves; blocks nothing"
    return f"blocks an expert whose AUROC may be above {rules.audit.max_auroc_upper:g}"


def _privacy(config: SiteConfig) -> str:
    if config.privacy is None:
        return "none"
    limit, delta = config.privacy.epsilon, config.privacy.delta
    return f"epsilon {limit:g} for ever, delta {delta:g}, of each cohort"


def _messages(rows: list[Row]) -> Iterator[str]:
    cells = [
        (
            str(row.number),
            row.time,
            _Html(f"{escape(row.message)}<br>{_code(row.task)}"),
            size(row.bytes),
            row.approved,
            "" if row.epsilon is None else f"{row.epsilon:.2f}",
            _Html(f"{escape(row.checked)}<br>{_code(row.sha256[:16])}"),
        )
        for row in rows
    ]
    heads = ("#row", "time", "message", "#size", "approved", "#epsilon", "checked; SHA-256")
    yield from _table(heads, cells)


def _code(text: str) -> _Html:
    return _Html(f"<code>{escape(text)}</code>")


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """Yield a table; a heading that begins with # is of numbers."""
    kinds = [" class='n'" if head.startswith("#") else "" for head in heads]
    yield "<table><thead><tr>"
    for head, kind in zip(heads, kinds, strict=True):
        yield f"<th{kind}>{escape(head.lstrip('#'))}</th>"
    yield "</tr></thead><tbody>"
    for row in rows:
        yield "<tr>"
        for cell, kind in zip(row, kinds, strict=True):
            yield f"<td{kind}>{cell if isinstance(cell, _Html) else escape(cell)}</td>"
        yield "</tr>"
    yield "</tbody></table>"
