"""The HTML page of a run: one file, no network, readable on a phone, on paper and without JavaScript.

Every name, reason or number that comes from a record passes through `escape`.
"""

from __future__ import annotations

import base64
import hashlib
import re
from html import escape

from megatron_commute import calibration, series
from megatron_commute.memory import in_units

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
.pictures { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 2.5rem 3rem;
  align-items: start; }
.tall { grid-row: span 2; }
figure { margin: 0; break-inside: avoid; }
figure h3 { font-size: 1rem; margin: 0 0 .25rem; }
figure svg { display: block; width: 100%; height: auto; }
.find { display: block; margin: 0 0 .75rem; font-size: .9rem; }
.find[hidden] { display: none; }
input { font: inherit; width: 14rem; max-width: 100%; padding: .35rem .6rem; border: 1px solid var(--soft);
  border-radius: .3rem; }
input:focus-visible { outline: 2px solid var(--accent); }
@media screen and (max-width: 48rem) {
  body { padding: 1.5rem 1rem 3rem; }
  .pictures { grid-template-columns: minmax(0, 1fr); }
  .tall { grid-row: auto; }
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  table, tbody, tr, td { display: block; }
  tr { padding: .6rem 0; border-bottom: 1px solid var(--line); }
  tr[hidden] { display: none; }
  td { display: grid; grid-template-columns: 8.5rem minmax(0, 1fr); column-gap: .5rem; padding: .15rem 0;
    border: 0; }
  td::before { content: attr(data-label); color: var(--soft); grid-row: 1 / span 99; }
  td > * { grid-column: 2; }
}
@media print {
  @page { margin: 14mm; }
  html { font-size: 11px; }
  body { padding: 0; max-width: none; }
  h2 { margin-top: 1.5rem; break-after: avoid; }
  th, td { padding: .25rem .5rem .25rem 0; }
  .pictures { gap: 1.2rem 1.5rem; }
  .find { display: none !important; }
  tr[hidden] { display: table-row; }
  tr, .loud { break-inside: avoid; }
  .loud { border: 2pt solid #000; }
}
"""
SCRIPT = """
const box = document.querySelector(".find"), count = box && box.querySelector("output");
const rows = Array.from(document.querySelectorAll("#decisions tbody tr"));
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
FIND = """<label class="find" hidden>Show rows with
<input type="search" autocomplete="off"> <output></output></label>"""


def page(run, pictures, torn=0):
    """The report as HTML text. run: series.Run; pictures: drawing.Picture each; torn: unreadable lines."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    body = [
        header(run),
        loud(run),
        section("Summary", summary(run)),
        section("What this record lacks", missing(run, torn)),
        section(
            "Pictures", f'<div class="pictures">{"".join(map(figure, pictures))}</div>' if pictures else ""
        ),
        section("Calibration of the signals", calibrated(run)),
        section("Decisions", decisions(run)),
        section("Interventions", interventions(run)),
        section("Skipped probes", skips(run)),
    ]
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(title(run))}</title>
<style>{STYLE}</style>
<body>
{"".join(body)}
<script>{SCRIPT}</script>
</body>
</html>
"""


def text(value):
    return escape(str(value), quote=True)


def unbroken(value):
    """Escaped text whose pairs 'a → b', 'a ± b' and 'a / b' stay on one line."""
    return re.sub(r" ([→±/]) ", "\u00a0\\1\u00a0", text(value))


def named(name):
    """An escaped name; a long one may be broken anywhere."""
    return f'<span class="name">{text(name)}</span>' if len(name) > 20 else text(name)


def title(run):
    return f"Order of data: {', '.join(run.names)}"


def section(heading, content):
    return f"<section>\n<h2>{text(heading)}</h2>\n{content}\n</section>\n" if content else ""


def header(run):
    """Title and the facts of the run that a reader needs to judge its numbers."""
    start, last = run.start, (run.probes or [{}])[-1]
    target, held = start.get("target"), start.get("memory")
    if isinstance(target, list):
        target = ", ".join(f"{name} {share:.3g}" for name, share in zip(run.names, target, strict=True))
    step = max([line["step"] for line in (*run.losses, *run.probes, *run.skips, run.end) if line], default=0)
    facts = {
        "mode": start.get("mode"),
        "steps": f"{step:,} of {start['train_iters']:,}" if start.get("train_iters") else f"{step:,}",
        "samples": f"{run.samples:,} of {start['samples']:,}" if start.get("samples") else f"{run.samples:,}",
        "sample length": f"{start['seq_length']:,} tokens" if start.get("seq_length") else None,
        "global batch": f"{start['global_batch']:,} samples" if start.get("global_batch") else None,
        "parameters": f"{start['parameters']:,}" if start.get("parameters") else None,
        "target": target,
        "probes": f"{len(run.probes)} finished, {len(run.skips)} skipped",
        "samples of a probe": f"{last['samples']} a domain" if last.get("samples") else None,
        "method": ", ".join(str(last[key]) for key in ("method", "metric", "direction") if last.get(key))
        or None,
        "memory of a probe": f"{held['mode']}, {in_units(held['bytes'])} a rank" if held else None,
        "law": (start.get("controller") or {}).get("law") if start.get("mode") == "act" else None,
        "confidence": f"{100 * run.confidence:g} %",
        "seed": start.get("seed"),
        "mixture file (sha256)": (start.get("config") or "")[:12] or None,
    }
    notes = "".join(f"<p>Note: {text(warning)}</p>\n" for warning in start.get("warnings") or [])
    items = "".join(fact(name, value) for name, value in facts.items() if value is not None)
    return f"<header>\n<h1>{text(title(run))}</h1>\n<dl>{items}</dl>\n{notes}</header>\n"


def fact(name, value):
    wide = ' class="wide"' if len(str(value)) > 48 else ""
    return f"<div{wide}><dt>{text(name)}</dt><dd>{text(value)}</dd></div>"


def loud(run):
    if not series.uncalibrated(run):
        return ""
    return (
        '<p class="loud" role="note">Acting on an uncalibrated signal: the weights of this run follow a signal '
        "whose predictions have not stood the comparison with measured effects.</p>\n"
    )


def table(headers, rows, name=""):
    """Rows of cells that are HTML already; each cell repeats its header for narrow screens."""
    head = "".join(f'<th scope="col">{text(h)}</th>' for h in headers)
    cells = (
        "".join(f'<td data-label="{text(h)}">{c}</td>' for h, c in zip(headers, row, strict=True))
        for row in rows
    )
    body = "\n".join(f"<tr>{row}</tr>" for row in cells)
    return f'<table id="{name}">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>'


def summary(run):
    headers, rows = series.summary_rows(run)
    own = " The numbers of a domain are for itself as the target." if len(run.targets) > 1 else ""
    note = (
        "Losses in nats per token, first → last reading. Score, s and P of the last probe, ± one standard "
        f"error, in nats per token / (flow time)², flow time being learning rate × steps.{own} A score above "
        "zero: delaying the domain lowers the target loss. s = P w is the score without the terms of a "
        "changing learning rate and of weight decay. P above zero: the row's domain first and the named one "
        "second ends with a higher target loss than mixing the two."
    )
    cells = [[named(row[0]), *map(unbroken, row[1:])] for row in rows]
    return f'{table(headers, cells, "summary")}\n<p class="soft">{text(note)}</p>'


def missing(run, torn):
    notes = series.lacks(run, torn)
    return "<ul>" + "".join(f"<li>{text(note)}</li>" for note in notes) + "</ul>" if notes else ""


def figure(picture):
    svg = picture.svg().replace("<svg ", f'<svg role="img" aria-label="{text(picture.title)}" ', 1)
    caption = f"<figcaption>{text(picture.caption)}</figcaption>"
    tall = ' class="tall"' if picture.name == "scores" else ""  # the two heat maps fit beside it
    return f'<figure id="{text(picture.name)}"{tall}><h3>{text(picture.title)}</h3>{svg}{caption}</figure>\n'


def calibrated(run):
    """What every signal was worth when it was compared with effects measured later, judged after a common tail."""
    if not run.judgements:
        return ""
    headers, rows = calibration.table(calibration.book_of(run.judgements))
    note = (
        f"{len(run.judgements)} times every signal's word on each domain was compared with the effect measured after it, "
        "where that differs from zero with 95 % confidence. A hit has the right sign. The last column compares with the "
        "constant “the domain trained last gains”, which needs no measurement: half of hits minus misses beyond its own."
    )
    cells = [[text(cell) for cell in row] for row in rows]
    return f'{table(headers, cells, "calibrations")}\n<p class="soft">{text(note)}</p>'


def decisions(run):
    """Every finished probe: what it found, what the weights did, and why."""
    if not run.probes:
        return "<p>No probe was finished.</p>"
    key = "score" if len(series.measured(run, "score")[0]) == len(run.probes) else "s"
    _, value, error = series.measured(run, key)
    headers = ["step", "sample", key, "weights", "in force from", "reason"]
    rows = []
    for n, probe in enumerate(run.probes):
        when = probe.get("effective_sample")
        factor, power = series.power_of_ten(value[n], error[n])
        found = [series.with_error(*(series.own(a[n], k)[k] / factor for a in (value, error)))
                 for k in range(len(run.names))]  # fmt: skip
        step, sample = f"{probe['step']:,}", f"{probe['sample']:,}"
        force = "stay" if when is None else f"sample {when:,}"
        reason = text(probe.get("reason") or "not recorded")
        rows.append([step, sample, _lines(run, found, power), _lines(run, _weights(probe)), force, reason])
    return f"{FIND}\n{table(headers, rows, 'decisions')}"


def _lines(run, values, power=""):
    """One line per domain, and one for their common power of ten."""
    pairs = zip(run.names, values, strict=True)
    common = f"<div>× {power}</div>" if power else ""
    return "".join(f"<div>{named(name)}\u00a0{unbroken(value)}</div>" for name, value in pairs) + common


def _weights(probe):
    now, after = probe["weights"], probe["weights_next"]
    moved = probe.get("effective_sample") is not None
    return [f"{a:.3f} → {b:.3f}" if moved else f"{a:.3f}" for a, b in zip(now, after, strict=True)]


def interventions(run):
    """What people wrote into the control file while the run went on."""
    rows = []
    for line in run.interventions:
        said = [f"{key} {line[key]}" for key in ("freeze", "weights", "caps") if line.get(key) is not None]
        what = f"ignored: {line['error']}" if line.get("error") else ", ".join(said)
        when = "" if line.get("effective_sample") is None else f"sample {line['effective_sample']:,}"
        rows.append([text(cell) for cell in (f"{line['step']:,}", f"{line['sample']:,}", what, when)])
    return table(["step", "sample", "control file", "in force from"], rows, "interventions") if rows else ""


def skips(run):
    """Probes that ended without a result, with the reason the ranks agreed on."""
    if not run.skips:
        return "<p>None.</p>"
    rows = []
    for skip in run.skips:
        off = "; probing is off from here on" if skip.get("off") else ""
        cells = (
            f"{skip['step']:,}",
            f"{skip['sample']:,}",
            skip.get("failures"),
            f"{skip.get('reason')}{off}",
        )
        rows.append([text(cell) for cell in cells])
    return table(["step", "sample", "failures in a row", "reason"], rows, "skips")
