"""From the cells of the studies to rows and tables: effects of orders, signals beside them, hits and calibrated errors."""

import csv
import math

import numpy as np

from megatron_commute import calibration, lockin

KINDS = ("trained", "untrained", "mixture")


def loss_of(losses, target, settings, weights):
    """Held-out loss of a target from {name: loss}: a domain, or "mixture", the trained domains by the run's weights."""
    if target == "mixture":
        return sum(w * losses[name] for w, name in zip(weights, settings.domains, strict=True))
    return losses[target]


def kind_of(target, settings):
    return "mixture" if target == "mixture" else "trained" if target in settings.domains else "untrained"


def targets(settings):
    return (*settings.domains, *settings.others, "mixture")


def half_difference(cell, target, settings, reading):
    """(L_12 - L_21) / 2 in nats of a `pair` cell; reading: index into its readings, 0 at the switch, -1 after the tail."""
    losses = [loss_of(cell[order][reading][1], target, settings, cell["weights"]) for order in ("12", "21")]
    return (losses[0] - losses[1]) / 2


def mean_and_error(values):
    """Mean and standard error over paired seeds; the error is NaN for one value."""
    values = np.asarray(values, dtype=np.float64)
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), float(error)


def wave_effect(cell, target, settings):
    """Lock-in: half difference of the orders demodulated from the readings after the blocks, and its standard error.

    Second differences remove the trend of the loss; neighbours share readings, which the factor 1.5 accounts for.
    """
    read = np.array([loss_of(x, target, settings, cell["weights"]) for x in cell["readings"]])[1:]
    signs = np.array(cell["signs"], dtype=np.float64)
    inner = signs[1:-1] * lockin.second_differences(read[:, None])[:, 0]
    mean, error = (
        mean_and_error(inner) if len(inner) else (float(signs[-1] * (read[-1] - read[0]) / 2), math.nan)
    )
    return mean, 1.5 * error


def signal_rows(found, settings, size, run, weights):
    """One row for each state, window and target of a run: truth with its error, and every signal (None where absent)."""
    rows = []
    for window, states in ((w.steps, w.states) for w in size.windows if run in w.runs):
        previous = {}
        for step in states:
            prefix = f"{run}/{step}/{window}/"
            truths = [cell for key, cell in found.items() if key.startswith(f"{prefix}truth/")]
            for target in targets(settings) if truths else ():
                truth, error = mean_and_error([half_difference(c, target, settings, -1) for c in truths])
                switch, switch_error = mean_and_error(
                    [half_difference(c, target, settings, 0) for c in truths]
                )
                row = {
                    "run": run,
                    "step": step,
                    "window": window,
                    "target": target,
                    "kind": kind_of(target, settings),
                }
                row |= {"truth": truth, "truth_se": error, "at_switch": switch, "at_switch_se": switch_error}
                row["seeds"] = len(truths)
                row["persistence"] = previous.get(target)
                row |= _signals(found, settings, f"{run}/{step}/", prefix, target)
                previous[target] = truth
                rows.append(row)
    return rows


def _signals(found, settings, state, prefix, target):
    """Every signal of one state and target: positive where the first domain, trained last, is predicted to help."""
    signals = {"constant": {settings.domains[0]: 1.0, settings.domains[1]: -1.0}.get(target)}
    for metric in ("identity", "adam"):
        cell = found.get(f"{state}P/{metric}")
        if cell is not None:
            t = cell["targets"].index(target)
            signals[f"P {metric}"] = cell["P"][t]
            signals[f"recency {metric}"] = cell["u_g"][t][0] - cell["u_g"][t][1]
    cell = found.get(f"{state}tilt")
    if cell is not None:
        sides = [loss_of(cell[side], target, settings, cell["weights"]) for side in ("minus", "plus")]
        signals["tilt"] = sides[0] - sides[1]
    pairs = [cell for key, cell in found.items() if key.startswith(f"{prefix}rollout")]
    if pairs:
        for name, reading in (("rollout", -1), ("rollout at switch", 0)):
            halves = [half_difference(cell, target, settings, reading) for cell in pairs]
            signals[name] = float(np.mean(halves))
    cell = found.get(f"{prefix}wave")
    if cell is not None:
        signals["lock-in"], signals["lock-in_se"] = wave_effect(cell, target, settings)
    return signals


SIGNALS = (
    *("constant", "P identity", "P adam", "recency identity", "recency adam", "tilt"),
    *("rollout at switch", "rollout", "lock-in", "persistence"),
)


SURE = 0.99  # confidence with which an effect must differ from zero to count; one cell in a hundred does by chance


def significant(row):
    return (
        row["seeds"] > 1 and abs(row["truth"]) > calibration.student(row["seeds"] - 1, SURE) * row["truth_se"]
    )


def judged(rows, signal, kind):
    """How `signal` predicts the significant effects on targets of `kind`: hits, rank correlation, error in dex.

    The error is the median |log10| of calibrated over true magnitude; the scale is the median of the other states of the
    same run and window, so no effect calibrates itself. The correlation is the mean of Spearman's over runs and windows.
    """
    usable = [r for r in rows if r["kind"] == kind and r.get(signal) is not None]
    cells = [r for r in usable if significant(r)]
    hits = sum(r[signal] * r["truth"] > 0 for r in cells)
    low, high = calibration.wilson(hits, len(cells)) if cells else (math.nan, math.nan)
    errors = []
    for r in cells:
        peers = [
            o for o in cells if (o["run"], o["window"]) == (r["run"], r["window"]) and o["step"] != r["step"]
        ]
        ratios = [math.log10(abs(o["truth"] / o[signal])) for o in peers if o[signal]]
        if ratios and r[signal]:
            errors.append(abs(math.log10(abs(r["truth"] / r[signal])) - float(np.median(ratios))))
    return {
        "signal": signal,
        "kind": kind,
        "cells": len(usable),
        "significant": len(cells),
        "hits": hits,
        "hit_low": low,
        "hit_high": high,
        "rank_correlation": _rank_correlation(usable, signal),
        "error_dex": float(np.median(errors)) if errors and signal != "constant" else math.nan,
    }


def _rank_correlation(rows, signal):
    from scipy.stats import spearmanr

    found = []
    for place in sorted({(r["run"], r["window"]) for r in rows}):
        here = [(r[signal], r["truth"]) for r in rows if (r["run"], r["window"]) == place]
        x, y = np.array(here).T
        if len(here) > 2 and np.ptp(x) > 0 and np.ptp(y) > 0:
            found.append(spearmanr(x, y).statistic)
    return float(np.mean(found)) if found else math.nan


def write_csv(path, rows):
    """Rows (dicts) as CSV, columns in order of first appearance, numbers in full precision."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
