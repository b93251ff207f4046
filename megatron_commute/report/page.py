"""The HTML page of a run: one file, no network, readable on a phone, on paper and without
JavaScript.

Every name, reason or number that comes from a record passes through markup.text.
"""

from __future__ import annotations

import numpy as np

from megatron_commute.report import analysis as report_analysis
from megatron_commute.report import series
from megatron_commute.report.markup import (
    FIND,
    by_domain,
    document,
    figure,
    listed,
    named,
    section,
    table,
    text,
    unbroken,
)
from megatron_commute.settings.memory import in_units


def page(run, pictures):
    """The report as HTML text. run: series.Run; pictures: drawing.Picture each."""
    shown = f'<div class="pictures">{"".join(map(figure, pictures))}</div>' if pictures else ""
    if run.analysis:
        tables = [section("Checkpoints", report_analysis.checkpoints(run))]
    else:
        tables = [section("Decisions", decisions(run)), section("Skipped probes", skips(run))]
    body = [
        header(run),
        loud(run),
        section("Summary", summary(run)),
        section("What this record lacks", missing(run)),
        section("Pictures", shown),
        *tables,
        section("Interventions", interventions(run)),
    ]
    return document(title(run), body)


def title(run):
    return f"Order of data{' at checkpoints' * run.analysis}: {', '.join(run.names)}"


def header(run):
    """Title and the facts of the run that a reader needs to judge its numbers."""
    start, last = run.start, (run.probes or [{}])[-1]
    target, held = start.get("target"), start.get("memory")
    if isinstance(target, list):
        target = ", ".join(f"{name} {share:.3g}" for name, share in zip(run.names, target, strict=True))
    step = max([line["step"] for line in (*run.losses, *run.probes, *run.skips, run.end) if line], default=0)
    facts = {
        "mode": f"{start.get('mode')}, analysed afterwards" if run.analysis else start.get("mode"),
        "steps": f"{step:,} of {start['train_iters']:,}" if start.get("train_iters") else f"{step:,}",
        "samples": f"{run.samples:,} of {start['samples']:,}" if start.get("samples") else f"{run.samples:,}",
        "sample length": f"{start['seq_length']:,} tokens" if start.get("seq_length") else None,
        "global batch": f"{start['global_batch']:,} samples" if start.get("global_batch") else None,
        "parameters": f"{start['parameters']:,}" if start.get("parameters") else None,
        "target": target,
        "checkpoints": f"{len(run.probes)} analysed" if run.analysis else None,
        "probes": None if run.analysis else _finished(run),
        "samples of a probe": f"{last['samples']} a domain" if last.get("samples") else None,
        "method": ", ".join(str(last[key]) for key in ("method", "metric", "direction") if last.get(key))
        or None,
        "memory of a probe": f"{held['mode']}, {in_units(held['bytes'])} a rank" if held else None,
        "law": (start.get("controller") or {}).get("law")
        if (start.get("mode") == "act" or run.flow is not None) and not run.analysis
        else None,
        "confidence": f"{100 * run.confidence:g} %",
        "seed": start.get("seed"),
        "mixture file (sha256)": (start.get("config") or "")[:12] or None,
    }
    told = start["analysis"].get("notes") if run.analysis else start.get("warnings")
    notes = "".join(f"<p>Note: {text(note)}</p>\n" for note in told or [])
    return f"<header>\n<h1>{text(title(run))}</h1>\n{listed(facts)}\n{notes}</header>\n"


def _finished(run):
    return f"{run.count('probe', run.probes):,} finished, {run.count('skip', run.skips):,} skipped"


def loud(run):
    if not series.uncalibrated(run):
        return ""
    return (
        '<p class="loud" role="note">Acting on an uncalibrated signal: the weights of this run follow a '
        "signal that was not compared with effects at the end of a run.</p>\n"
    )


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


def missing(run):
    notes = lacks(run)
    return "<ul>" + "".join(f"<li>{text(note)}</li>" for note in notes) + "</ul>" if notes else ""


def lacks(run):
    """What the record cannot show, one plain sentence each."""
    notes = [line.get("text") for line in run.notes if line.get("text")]
    for event, kept in (("loss", run.losses), ("probe", run.probes)):
        if run.count(event, kept) > len(kept):
            notes.append(
                f"This page shows {len(kept):,} of the {run.count(event, kept):,} {event} lines, evenly "
                "spaced; --export writes all of them."
            )
    if run.torn:
        notes.append("The last line is torn: the run was ended while writing it. It is left out.")
    if not run.analysis:  # losses of training, decisions and their cost belong to a run
        notes += _lacks_of_a_run(run)
    scores_only = sum(1 for probe in run.probes if probe.get("P") is None)
    if scores_only:
        notes.append(
            f"{scores_only} of {len(run.probes)} probes worked with probe.memory scores, which does not "
            "measure P."
        )
    for key in ("P", "score"):
        _, value, error = series.measured(run, key)
        if (np.isfinite(value) & ~np.isfinite(error)).any():
            notes.append(
                f"Some {key} have no standard error; they are drawn without bars and marked as uncertain."
            )
    return notes


def _lacks_of_a_run(run):
    notes = []
    if run.end is None:
        notes.append(
            f"There is no end line: the run goes on or was stopped. Its lines reach sample {run.samples:,}."
        )
    elif (left := run.end.get("left")) is not None:
        notes.append(
            f"The run ended early, at sample {run.end['sample']:,}, with {left['samples']:,} samples to come"
            f"{_left_of_budgets(run, left['budgets'])}. A restart with its last checkpoint goes on."
        )
    if not run.probes:
        notes.append("There is no finished probe, so there are no scores, no P and no decisions.")
    for kind, word in (("train", "training"), ("valid", "validation")):
        known = np.isfinite(series.losses(run, kind)[1]).any(0)
        unknown = [name for name, seen in zip(run.names, known, strict=True) if not seen]
        if unknown:
            notes.append(f"No {word} loss of {', '.join(unknown)} was recorded.")
    if run.probes and not len(series.measured(run, "score")[0]):
        notes.append("No probe has a full score; decisions cannot be compared with what the law acted on.")
    if all(budget is None for budget in run.budgets):
        notes.append("No domain has a budget, so there is no burn-down.")
    if run.probes and not len(series.overhead(run)[0]):
        notes.append("No probe has a timing, so the overhead is unknown.")
    return notes


def _left_of_budgets(run, left):
    given = dict(zip(run.names, run.budgets, strict=True))
    parts = [
        f"{name} {count:,} of {given[name]:,}" for name, count in left.items() if given[name] is not None
    ]
    return f"; left of the budgets: {', '.join(parts)}" if parts else ""


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
        rows.append(
            [
                step,
                sample,
                by_domain(run.names, found, power),
                by_domain(run.names, _weights(probe)),
                force,
                reason,
            ]
        )
    return f"{FIND}\n{table(headers, rows, 'decisions')}"


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
