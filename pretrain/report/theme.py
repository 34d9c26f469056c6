"""The look of a report, and pieces of it: everything that a run says is escaped here before it becomes markup."""

import html
import json
from collections.abc import Iterable, Sequence
from typing import Any

from pretrain.config.held_out import parted
from pretrain.report.events import brief

_SPELLED = {"f1": "F1", "bleu": "BLEU", "chrf": "chrF", "rouge": "ROUGE", "mrr": "MRR", "ndcg": "nDCG"}


def esc(value: Any) -> str:
    return html.escape(str(value))


def table(kind: str, rows: Iterable[Sequence[Any]], header: Sequence[str] = ()) -> str:
    """Rows of values, below a header if there is one. `kind` lays them out: `facts` (a name and what it is), `figures`
    (a name and numbers), `texts` (columns of text) or `events` (time, kind, words); on a phone the last two have the
    cells of a row one below the other, each with the name of its column.
    """
    head = "".join(f"<th>{esc(name)}</th>" for name in header)
    names = [f' data-name="{esc(name)}"' for name in header] if kind == "texts" else []
    body = ""
    for row in rows:
        attributes = [*names, *[""] * (len(row) - len(names))]
        cells = (f"<td{said}>{esc(brief(cell))}</td>" for said, cell in zip(attributes, row, strict=True))
        body += f"<tr>{''.join(cells)}</tr>"
    return f'<div class="wide"><table class="{kind}">{f"<tr>{head}</tr>" if head else ""}{body}</table></div>'


def records(named: dict[str, dict[str, Any]]) -> str:
    """{name: {column: value}} as a table, fractions to four digits."""
    columns = list(dict.fromkeys(column for record in named.values() for column in record))
    rows = [[name, *(record.get(column, "") for column in columns)] for name, record in named.items()]
    return table("figures", rows, ["", *map(words, columns)])


def facts(text: str) -> str:
    """A JSON object as a table; any other text as it is."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        return f"<pre>{esc(text)}</pre>" if text.strip() else ""
    return table("facts", found.items())


def details(title: str, body: str) -> str:
    """Something that is read when it is asked for."""
    return f"<details><summary>{title}</summary>{body}</details>" if body else ""


def section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>" if body else ""


def words(name: str) -> str:
    """A column's name as words: macro_f1 is macro F1, and so is val_macro_f1, the same of validation; val_news/macro_f1
    is news macro F1.
    """
    of_set, figure = parted(name) if name.startswith("val_") else ("", name)
    return " ".join([*filter(None, [of_set]), *(_SPELLED.get(word, word) for word in figure.split("_"))])


CSS = """
:root { color-scheme: light dark; --paper: #fcfcfa; --card: #ffffff; --ink: #1c1e21; --muted: #6a6f76;
  --line: #e4e4df; --accent: #2456c7; --second: #d2571e; --third: #1d7f4a; --fourth: #8a3fb5;
  --fifth: #9a7400; --sixth: #0b7f90; --bad: #c02626; }
@media (prefers-color-scheme: dark) { :root { --paper: #14161a; --card: #1b1e23; --ink: #e6e6e3; --muted: #969ba3;
  --line: #2f343b; --accent: #7aa7ff; --second: #ff9d66; --third: #62cf92; --fourth: #cf98f2;
  --fifth: #e0bd4a; --sixth: #5fc9da; --bad: #ff6b6b; } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 76rem; padding: 2.5rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif }
h1 { margin: 0; font-size: 2rem; line-height: 1.2; letter-spacing: -.02em; overflow-wrap: anywhere }
h2 { margin: 2.75rem 0 .75rem; font-size: 1.15rem } h3 { margin: 1rem 0 .35rem; font-size: .85rem; color: var(--muted) }
header p, small, time { color: var(--muted) } header p { margin: .35rem 0 0 } p { overflow-wrap: anywhere }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 1px; margin: 1.75rem 0;
  background: var(--card); border: 1px solid var(--line); border-radius: 10px; overflow: hidden }
dl > div { padding: .9rem 1.1rem; box-shadow: 1px 0 var(--line), 0 1px var(--line) }
dt { font-size: .8rem; color: var(--muted) }
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
th, td { padding: .4rem 1rem .4rem 0; text-align: left; vertical-align: top }
th { color: var(--muted); font-weight: 400 } td { border-top: 1px solid var(--line) }
tr:first-child td { border-top: 0 }
.facts td:first-child { min-width: 9rem } .facts td:last-child { width: 100%; overflow-wrap: anywhere }
.figures { width: auto } .figures th, .figures td { text-align: right; white-space: nowrap }
.figures td { font-variant-numeric: tabular-nums }
.figures td:first-child { position: sticky; left: 0; background: var(--paper); text-align: left }
.texts td { min-width: 9.5rem; overflow-wrap: anywhere } .texts td:first-child { width: 45% }
.events td { overflow-wrap: anywhere } .events td:last-child { width: 100% }
.events td:nth-child(-n+2) { white-space: nowrap } .events td:first-child { color: var(--muted) }
.events td:nth-child(2) { font-weight: 600 }
@media (max-width: 40rem) { .figures td:first-child { white-space: normal; min-width: 9rem }
  .texts :is(tbody, tr, td), .events :is(tbody, tr) { display: block } .texts tr:has(th) { display: none }
  :is(.texts, .events) td:nth-child(n) { width: auto; border-top: 0; padding: .1rem 0 }
  :is(.texts, .events) tr { border-top: 1px solid var(--line); padding: .5rem 0 }
  .events td:nth-child(n) { display: inline; padding-right: .6rem } .events td:nth-child(3) { display: block }
  .texts td:not(:empty)::before { content: attr(data-name) ": "; color: var(--muted) } }
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
