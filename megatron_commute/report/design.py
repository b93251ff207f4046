"""The page of a schedule that was planned before a run: what it does to every domain, and how to
use it.
"""

from __future__ import annotations

import numpy as np

from megatron_commute.report.markup import document, figure, listed, named, section, table, text

USE = (
    "Train with mode: fixed and controller: {law: flow} in the mixture file; or with mode: fixed and "
    "schedule: schedule.csv, which is this schedule, whatever the learning rates of that run."
)


def page(run, picture):
    """HTML text. run: series.Run of a start line with law flow's plan; picture: of picture_flow."""
    title = f"Planned order of data: {', '.join(run.names)}"
    headers, told = rows(run.names, run.flow, run.start["samples"])
    notes = "".join(f"<p>Note: {text(note)}</p>\n" for note in run.start["warnings"])
    body = [
        f"<header>\n<h1>{text(title)}</h1>\n{listed(_facts(run))}\n{notes}</header>\n",
        section("Schedule", f'<div class="pictures">{figure(picture)}</div>'),
        section("Domains", table(headers, [[named(row[0]), *map(text, row[1:])] for row in told], "domains")),
        section("How to use it", f"<p>{text(USE)}</p>"),
    ]
    return document(title, body)


def _facts(run):
    start, flow = run.start, run.flow
    target = ", ".join(f"{name} {share:.3g}" for name, share in zip(run.names, flow["target"], strict=True))
    return {
        "law": f"flow, strength {flow['strength']:g}",
        "steps": f"{start['train_iters']:,}",
        "samples": f"{start['samples']:,}",
        "global batch": f"{start['global_batch']:,} samples",
        "target": target,
        "memory": f"{flow['memory']:g}",
        "first steps at shares": f"{flow['kept']:,}",
        "peak learning rate": f"{flow['scale']['peak']:g}",
    }


def rows(names, flow, samples):
    """Headers and rows of text: shares, bounds that the weights reach, and when half of a domain's
    samples are used.

    flow: of a start line; samples: of the run.
    """
    headers = [
        "domain",
        "samples",
        "share",
        "target",
        "range",
        "least weight",
        "greatest weight",
        "half used at",
    ]
    edges = np.append(flow["segments"]["sample"], samples)
    weights, found = np.array(flow["segments"]["weights"]), []
    used = np.vstack([np.zeros(len(names)), np.cumsum(weights * np.diff(edges)[:, None], axis=0)])
    for k, name in enumerate(names):
        total = used[-1, k]
        half = f"{np.interp(total / 2, used[:, k], edges) / samples:.0%} of the run" if total else "-"
        cells = [name, f"{total:,.0f}", f"{total / samples:.3g}", f"{flow['target'][k]:.3g}"]
        cells += [f"{flow['ranges'][k]:+.3g}".replace("-", "−")]
        found.append([*cells, f"{weights[:, k].min():.3g}", f"{weights[:, k].max():.3g}", half])
    return headers, found
