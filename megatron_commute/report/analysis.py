"""The section that only an analysis of checkpoints has: the optimality of each checkpoint."""

from __future__ import annotations

import os

import numpy as np

from megatron_commute.report import series
from megatron_commute.report.markup import FIND, by_domain, named, table, text, unbroken


def checkpoints(run):
    """One row for each checkpoint and target: scores, brackets beyond their error, and the check of
    optimality.
    """
    if not run.probes:
        return "<p>No checkpoint was measured.</p>"
    headers = ["step", "sample", "target", "score", "P beyond its error", "order proven better", "checkpoint"]
    rows = [
        _row(run, n, t, pairs) for n, probe in enumerate(run.probes) for t, pairs in _verdicts(run, probe)
    ]
    note = (
        "Score and P in nats per token / (flow time)², ± one standard error; beyond its error: zero lies "
        f"outside the {100 * run.confidence:g} % interval. Order proven better (Corollary 3.2(b)): moving "
        "weight so, for one window against the next, lowers the target loss, outside that interval. Where "
        "none is named the weights pass as locally optimal, or the probe was too small to tell."
    )
    return f'{FIND}\n{table(headers, rows, "checkpoints")}\n<p class="soft">{note}</p>'


def _verdicts(run, probe):
    """(target t, pairs) of a probe; pairs None where the record has no check."""
    return list(enumerate(probe.get("improvable") or [None] * len(run.targets)))


def _row(run, n, t, pairs):
    probe = run.probes[n]
    _, value, error = series.measured(run, "score")
    factor, power = series.power_of_ten(value[n, t], error[n, t])
    scores = [
        series.with_error(a / factor, b / factor) for a, b in zip(value[n, t], error[n, t], strict=True)
    ]
    folder = (probe.get("checkpoint") or {}).get("folder", "")
    moves = "".join(f"<div>{named(a)} earlier, {named(b)} later</div>" for a, b in pairs or [])
    return [
        f"{probe['step']:,}",
        f"{probe['sample']:,}",
        text(run.targets[t]),
        by_domain(run.names, scores, power),
        _brackets(run, n, t),
        moves or ("not checked" if pairs is None else "none"),
        text(os.path.basename(folder.rstrip("/\\"))),
    ]


def _brackets(run, n, t):
    """The brackets of probe n outside their interval, each pair with the order that ends higher
    first.
    """
    if run.probes[n].get("P") is None:
        return "not measured"
    _, P, error = series.measured(run, "P")  # every checkpoint is probed in one mode of memory
    P, error = P[n, t], error[n, t]
    sure = series.certain(run, P, error) & (P > 0)
    factor, power = series.power_of_ten(P[sure], error[sure])
    common = f" × {power}" if power else ""
    found = [(i, j, series.with_error(P[i, j] / factor, error[i, j] / factor)) for i, j in np.argwhere(sure)]
    lines = [
        f"<div>{named(run.names[i])} then {named(run.names[j])} {unbroken(told)}{common}</div>"
        for i, j, told in found
    ]
    return "".join(lines) or "none"
