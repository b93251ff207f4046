"""The parts that a report is put together from: style sheet, script, escaped text, tables,
sections.

Every name, reason or number that comes from a record passes through `text`.
"""

from __future__ import annotations

import base64
import hashlib
import re
from html import escape

STYLE = """
:root { color-scheme: light; --ink: #1f2937; --soft: #6b7280; --line: #e5e7eb; --accent: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 70rem; color: var(--ink); background: #fff;
  overflow-wrap: anywhere;
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 3rem 0 .75rem; }
p { margin: .5rem 0; max-width: 44rem; }
.soft, figcaption { color: var(--soft); font-size: .85rem; line-height: 1.45; }
.soft { max-width: 60rem; }
.loud { margin: 1.5rem 0 0; padding: .9rem 1.1rem; max-width: none; border-left: .4rem solid #b45309;
  background: #fef3c7; font-weight: 600; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .9rem 1.5rem;
  margin: 1.5rem 0; }
dt { color: var(--soft); font-size: .85rem; }
dd { margin: 0; }
.wide { grid-column: 1 / -1; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); border-bottom: 1px solid var(--soft); }
th, td { padding: .45rem .9rem .45rem 0; vertical-align: top; overflow-wrap: break-word; }
#summary td:first-child { min-width: 6.5rem; }
.name, td:last-child { overflow-wrap: anywhere; }
td { border-bottom: 1px solid var(--line); }
.pictures { columns: 2; column-gap: 3rem; }
figure { margin: 0; padding-bottom: 2.5rem; break-inside: avoid; }
figure h3 { font-size: 1rem; margin: 0 0 .25rem; }
figure svg { display: block; width: 100%; height: auto; }
.find { display: block; margin: 0 0 .75rem; font-size: .9rem; }
.find[hidden] { display: none; }
input { font: inherit; width: 14rem; max-width: 100%; padding: .35rem .6rem; border: 1px solid var(--soft);
  border-radius: .3rem; }
input:focus-visible { outline: 2px solid var(--accent); }
@media screen and (max-width: 48rem) {
  body { padding: 1.5rem 1rem 3rem; }
  .pictures { columns: 1; }
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  table, tbody, tr, td { display: block; }
  tr { padding: .6rem 0; border-bottom: 1px solid var(--line); }
  tr[hidden] { display: none; }
  td { display: grid; grid-template-columns: 8.5rem minmax(0, 1fr); column-gap: .5rem; padding: .15rem 0;
    border: 0; }
  td.empty { display: none; }
  input { width: 9rem; }
  td::before { content: attr(data-label); color: var(--soft); grid-row: 1 / span 99; }
  td > * { grid-column: 2; }
}
@media print {
  @page { margin: 14mm; }
  html { font-size: 11px; }
  body { padding: 0; max-width: none; }
  h2 { margin-top: 1.5rem; break-after: avoid; }
  th, td { padding: .25rem .5rem .25rem 0; }
  .pictures { column-gap: 1.5rem; }
  figure { padding-bottom: 1.2rem; }
  .find { display: none !important; }
  tr[hidden] { display: table-row; }
  tr, .loud { break-inside: avoid; }
  .loud { border: 2pt solid #000; }
}
"""
SCRIPT = """
const box = document.querySelector(".find"), count = box && box.querySelector("output");
const rows = Array.from(document.querySelectorAll(".find + table tbody tr"));
function show() {
  const words = box.querySelector("input").value.toLowerCase().split(/\\s+/).filter(Boolean);
  let seen = 0;
  for (const row of rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every(word => text.includes(word));
    seen += !row.hidden;
  }
  count.textContent = seen + " of " + rows.length;
}
if (box) { box.hidden = false; box.addEventListener("input", show); show(); }
"""
EMPTY = ' class="empty"'  # not shown where a row is a list
FIND = """<label class="find" hidden>Show rows with
<input type="search" autocomplete="off"> <output></output></label>"""


def text(value):
    return escape(str(value), quote=True)


def unbroken(value):
    """Escaped text whose pairs 'a → b', 'a ± b' and 'a / b' stay on one line."""
    return re.sub(r" ([→±/]) ", "\u00a0\\1\u00a0", text(value))


def named(name):
    """An escaped name; a long one may be broken anywhere."""
    return f'<span class="name">{text(name)}</span>' if len(name) > 20 else text(name)


def document(title, body):
    """A whole page of HTML sections, which fetches nothing and runs no script but SCRIPT."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(title)}</title>
<style>{STYLE}</style>
<body>
{"".join(body)}
<script>{SCRIPT}</script>
</body>
</html>
"""


def listed(facts):
    """A list of {name: value}; what is None is left out."""
    return f"<dl>{''.join(_fact(name, value) for name, value in facts.items() if value is not None)}</dl>"


def _fact(name, value):
    wide = ' class="wide"' if len(str(value)) > 48 else ""
    return f"<div{wide}><dt>{text(name)}</dt><dd>{text(value)}</dd></div>"


def figure(picture):
    svg = picture.svg().replace("<svg ", f'<svg role="img" aria-label="{text(picture.title)}" ', 1)
    caption = f"<figcaption>{text(picture.caption)}</figcaption>"
    return f'<figure id="{text(picture.name)}"><h3>{text(picture.title)}</h3>{svg}{caption}</figure>\n'


def section(heading, content):
    return f"<section>\n<h2>{text(heading)}</h2>\n{content}\n</section>\n" if content else ""


def table(headers, rows, name=""):
    """Rows of cells that are HTML already, "-" where there is nothing; each cell repeats its header
    for narrow screens.
    """
    head = "".join(f'<th scope="col">{text(h)}</th>' for h in headers)
    cells = (
        "".join(
            f'<td data-label="{text(h)}"{EMPTY if c == "-" else ""}>{c}</td>'
            for h, c in zip(headers, row, strict=True)
        )
        for row in rows
    )
    body = "\n".join(f"<tr>{row}</tr>" for row in cells)
    return f'<table id="{name}">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>'


def by_domain(names, values, power=""):
    """A cell with one line for each domain, and one for the common power of ten of its values,
    which are text.
    """
    common = f"<div>× {power}</div>" if power else ""
    pairs = zip(names, values, strict=True)
    return "".join(f"<div>{named(name)}\u00a0{unbroken(value)}</div>" for name, value in pairs) + common
