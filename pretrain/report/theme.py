"""The look of a report, and pieces of it: everything that a run says is escaped here before it becomes markup."""

import html
import json
from collections.abc import Iterable, Sequence
from typing import Any

_SPELLED = {"f1": "F1", "bleu": "BLEU", "chrf": "chrF", "rouge": "ROUGE", "mrr": "MRR", "ndcg": "nDCG"}


def esc(value: Any) -> str:
    return html.escape(str(value))


def brief(value: Any) -> str:
    """A value for a reader: numbers to four digits."""
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(brief, value)) or "none" if isinstance(value, list) else str(value)


def table(rows: Iterable[Sequence[Any]], header: Sequence[str] = ()) -> str:
    """Rows of values, below a header if there is one."""
    head = "".join(f"<th>{esc(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{esc(brief(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table>{f"<tr>{head}</tr>" if head else ""}{body}</table></div>'


def records(named: dict[str, dict[str, Any]]) -> str:
    """{name: {column: value}} as a table, fractions to four digits."""
    columns = list(dict.fromkeys(column for record in named.values() for column in record))
    rows = [[name, *(_figure(record.get(column, "")) for column in columns)] for name, record in named.items()]
    return table(rows, ["", *map(words, columns)])


def _figure(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


def facts(text: str) -> str:
    """A JSON object as a table; any other text as it is."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        return f"<pre>{esc(text)}</pre>" if text.strip() else ""
    return table(found.items())


def details(title: str, body: str) -> str:
    """Something that is read when it is asked for."""
    return f"<details><summary>{title}</summary>{body}</details>" if body else ""


def section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>" if body else ""


def words(name: str) -> str:
    """A column's name as words: macro_f1 is macro F1, and so is val_macro_f1, the same of validation."""
    return " ".join(_SPELLED.get(word, word) for word in name.removeprefix("val_").split("_"))


CSS = """
:root { color-scheme: light dark; --paper: #fcfcfa; --card: #ffffff; --ink: #1c1e21; --muted: #6a6f76;
  --line: #e4e4df; --accent: #2456c7; --second: #d2571e; }
@media (prefers-color-scheme: dark) { :root { --paper: #14161a; --card: #1b1e23; --ink: #e6e6e3; --muted: #969ba3;
  --line: #2f343b; --accent: #7aa7ff; --second: #ff9d66; } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 76rem; padding: 2.5rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif }
h1 { margin: 0; font-size: 2rem; line-height: 1.2; letter-spacing: -.02em; overflow-wrap: anywhere }
h2 { margin: 2.75rem 0 .75rem; font-size: 1.15rem } h3 { margin: 1rem 0 .35rem; font-size: .85rem; color: var(--muted) }
header p, small, time { color: var(--muted) } header p { margin: .35rem 0 0 }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 1px; margin: 1.75rem 0;
  background: var(--line); border: 1px solid var(--line); border-radius: 10px; overflow: hidden }
dl > div { padding: .9rem 1.1rem; background: var(--card) } dt { font-size: .8rem; color: var(--muted) }
dd { margin: .1rem 0 0; font-size: 1.6rem; font-weight: 600; font-variant-numeric: tabular-nums }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem }
figure { margin: 0; padding: .9rem 1rem .5rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px }
figcaption { margin-bottom: .4rem; font-size: .9rem; font-weight: 600 }
svg { display: block; width: 100%; height: auto; font-family: inherit }
pre { margin: 0; padding: .9rem 1.1rem; overflow-x: auto; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; font: .84rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere } pre b { color: var(--accent) }
.wide { overflow-x: auto } table { width: 100%; border-collapse: collapse; font-size: .88rem }
th, td { padding: .4rem 1rem .4rem 0; text-align: left; vertical-align: top; overflow-wrap: anywhere }
th { color: var(--muted); font-weight: 400 } td { border-top: 1px solid var(--line) }
td:first-child { white-space: nowrap } td:last-child { width: 100% }
tr:first-child td { border-top: 0 } td b { white-space: nowrap }
details { margin-top: 1.25rem } summary { cursor: pointer; padding: .3rem 0; font-size: 1.15rem; font-weight: 600 }
details > :last-child { margin-top: .5rem }
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
