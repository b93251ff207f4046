"""Every series of a record as rows of numbers, unrounded, for CSV files."""

from __future__ import annotations

import numpy as np

from megatron_commute.report import series


def tables(run):
    """Every series of a series.Run as {file name: (headers, rows)}."""
    names = list(run.names)
    left = [np.nan if budget is None else budget for budget in run.budgets]
    sample, used = series.served(run)
    plain = {
        "train_loss": series.losses(run, "train"),
        "valid_loss": series.losses(run, "valid"),
        "weights": series.weights(run),
        "served": (sample, used),
        "budget_left": (sample, np.array(left) - used),
    }
    result = {key: (["sample", *names], _joined(*pair)) for key, pair in plain.items()}
    overhead = _joined(*series.overhead(run))
    result["overhead"] = (["sample", "fraction_of_training_time", "probe_seconds"], overhead)
    for key in ("score", "s", "P"):
        result[key] = _measured(run, key)
    result |= {name: _lines(*columns) for name, columns in _told(run).items()}
    result["summary"] = series.summary_rows(run)
    if run.analysis:
        of_a_run = (
            "train_loss",
            "served",
            "budget_left",
            "overhead",
        )
        for name in (*of_a_run, *_told(run)):
            del result[name]
        result["improvable"] = (
            ["step", "sample", "target", "earlier", "later"],
            [[probe["step"], probe["sample"], run.targets[t], *pair]
             for probe, t, pairs in series.improvable(run) for pair in pairs],
        )  # fmt: skip
    return result


def _told(run):
    """{file name: (lines, their keys)} of what is written down as it stands."""
    decision = ("step", "sample", "lr", "effective_sample", "reason")
    control = ("step", "sample", "freeze", "weights", "caps", "effective_sample", "error")
    return {
        "decisions": (run.probes, decision),
        "skips": (run.skips, ("step", "sample", "reason", "failures", "off")),
        "interventions": (run.interventions, control),
    }


def _lines(lines, keys):
    headers = ["learning_rate" if key == "lr" else key for key in keys]
    return headers, [[line.get(key) for key in keys] for line in lines]


def _measured(run, key):
    """Headers and rows of P, s or score: one row for each number."""
    sample, value, error = series.measured(run, key)
    places = ["first", "second"] if key == "P" else ["domain"]
    cells = [at for at in np.ndindex(value.shape) if len(set(at[2:])) == len(places)]
    rows = [
        [sample[at[0]], run.targets[at[1]], *(run.names[k] for k in at[2:]), value[at], error[at]]
        for at in cells
    ]
    return ["sample", "target", *places, "value", "standard_error"], rows


def _joined(sample, *columns):
    return [[n, *row] for n, row in zip(sample.tolist(), np.column_stack(columns).tolist(), strict=True)]
