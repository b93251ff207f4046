"""One line of a record as named numbers for TensorBoard and its like: the series of the report
while a run goes on.

Names are KIND/DOMAIN; with target `each` KIND/TARGET/DOMAIN; P/FIRST/SECOND for each pair once,
since P is antisymmetric. Words (reasons, skips) stay in the record.
"""

from __future__ import annotations

import itertools
import math

import numpy as np

# kinds of numbers by domain, under their names in the record
_LOSS = ("train", "valid", "served")
_PROBE = ("score", "score_se", "s", "s_se", "weights_next")


def of(line, names, budgets):
    """[(name, float)] of a line (a dict of plain values, as in the record); none for events that
    hold no series.

    names, budgets: of the K domains, budgets in samples or None. Missing and non-finite numbers are
    left out.
    """
    found = {"loss": _loss, "probe": _probe}.get(line["event"], _nothing)
    pairs = found(line, names, budgets)
    if "probe_seconds" in (line.get("timing") or {}) and line["event"] in ("probe", "skip"):
        pairs += [(key, line["timing"].get(key)) for key in ("probe_seconds", "overhead")]
    known = [pair for pair in pairs if isinstance(pair[1], int | float)]
    return [(name, float(value)) for name, value in known if math.isfinite(value)]


def safe(listen, say=print):
    """`listen` of lines, told of nothing more once its writer has failed: curves are not worth a
    training run.
    """
    listeners = [listen]

    def told(line):
        for one in list(listeners):
            try:
                one(line)
            except Exception as fault:
                listeners.clear()
                say(f"commute: no more scalars, the writer failed: {type(fault).__name__}: {fault}")

    return told


def _nothing(line, names, budgets):
    return []


def _loss(line, names, budgets):
    pairs = [pair for kind in _LOSS for pair in _by_domain(kind, line.get(kind), names)]
    pairs += _by_domain("weights", line.get("weights"), names)
    left = {
        n: b - line["served"][n]
        for n, b in zip(names, budgets, strict=True)
        if b is not None and "served" in line
    }
    pairs += _by_domain("budget_left", left, names)
    return [
        *pairs,
        ("learning_rate", line.get("lr")),
        ("step_seconds", (line.get("timing") or {}).get("step_seconds")),
    ]


def _probe(line, names, budgets):
    pairs = [pair for kind in _PROBE for pair in _by_domain(kind, line.get(kind), names)]
    return pairs + [pair for kind in ("P", "P_se") for pair in _by_pair(kind, line.get(kind), names)]


def _by_domain(kind, values, names):
    """(KIND/DOMAIN, number) of {name: number}, of an array [K], or of [K, K] with a target in
    front.
    """
    if isinstance(values, dict):
        return [(f"{kind}/{name}", value) for name, value in values.items()]
    return _by_target(
        kind,
        values,
        names,
        1,
        lambda kind, row: [(f"{kind}/{n}", v) for n, v in zip(names, row, strict=True)],
    )


def _by_pair(kind, values, names):
    """(KIND/FIRST/SECOND, number) of a matrix [K, K], or of [K, K, K] with a target in front."""
    pairs = list(itertools.combinations(range(len(names)), 2))
    return _by_target(
        kind, values, names, 2, lambda kind, M: [(f"{kind}/{names[i]}/{names[j]}", M[i][j]) for i, j in pairs]
    )


def _by_target(kind, values, names, rank, told):
    """told(kind, values), or that of every target where the values have an axis more than `rank`;
    [] of None.
    """
    if values is None:
        return []
    if np.ndim(values) == rank:
        return told(kind, values)
    return [pair for t, part in zip(names, values, strict=True) for pair in told(f"{kind}/{t}", part)]
