"""What an analysis leaves behind beside its record: rows, tables as CSV and text."""

import csv

import numpy as np

from megatron_commute import bracket, intervals
from megatron_commute.settings import text_files


def improvable(line, plan, splits, confidence):
    """Corollary 3.2(b) at a probe line, by target: [[[earlier, later], ...], ...] names of the
    pairs whose order the measurement says to change, beyond its error; empty lists where the
    weights pass as locally optimal.
    """
    score, gap_se = (np.array(line[key], dtype=np.float64) for key in ("score", "gap_se"))
    score, gap_se = np.atleast_2d(score), gap_se.reshape(-1, *gap_se.shape[-2:])
    error = intervals.student(splits - 1, confidence) * np.where(np.isfinite(gap_se), gap_se, np.inf)
    found = [
        bracket.improvable(s, np.array(line["weights"]), e, plan.minimum, plan.maximum)
        for s, e in zip(score, error, strict=True)
    ]
    return [[[plan.names[j], plan.names[i]] for i, j in np.argwhere(pairs)] for pairs in found]


def summary(line, names, splits, confidence):
    """One checkpoint as a row: step, sample, scores by target and domain, brackets beyond their
    error, verdict.
    """
    q = intervals.student(splits - 1, confidence)
    one = np.ndim(line["s"]) == 1
    rows = []
    for t, target in enumerate(["the mixture"] if one else names):
        at = (lambda key, t=t: _numbers(line[key]) if one else _numbers(line[key])[t]) if line else None
        pairs = []
        if line["P"] is not None:
            P, se = at("P"), at("P_se")
            sure = bracket.may_switch(P, q * np.nan_to_num(se, nan=np.inf))
            pairs = [
                {"first": names[i], "second": names[j], "P": float(P[i, j]), "P_se": float(se[i, j])}
                for i, j in np.argwhere(~sure)
            ]
        scores = {n: [float(a), float(b)] for n, a, b in zip(names, at("score"), at("score_se"), strict=True)}
        rows.append(
            {"target": target, "scores": scores, "certain": pairs, "improvable": line["improvable"][t]}
        )
    return {"step": line["step"], "sample": line["sample"], "targets": rows}


def _numbers(value):
    return np.array(value, dtype=np.float64)


def write_table(path, probes, names):
    """Every number of every probe as CSV: step, sample, target, quantity, domain, other domain,
    value, standard error.
    """
    with text_files.replacing(path) as file:
        table = csv.writer(file)
        table.writerow(
            [
                "step",
                "sample",
                "target",
                "quantity",
                "domain",
                "other",
                "value",
                "standard_error",
                "improvable",
            ]
        )
        for line in probes:
            one = np.ndim(line["s"]) == 1
            for t, target in enumerate(["mixture"] if one else names):
                where = (line["step"], line["sample"], target)
                for key in ("s", "score"):
                    value, se = ((line[k] if one else line[k][t]) for k in (key, f"{key}_se"))
                    table.writerows(
                        (*where, key, n, "", *pair, "") for n, *pair in zip(names, value, se, strict=True)
                    )
                if line["P"] is None:
                    continue
                P, se = ((line[k] if one else line[k][t]) for k in ("P", "P_se"))
                better = {tuple(pair) for pair in line["improvable"][t]}
                for i, a in enumerate(names):
                    for j, b in enumerate(names):
                        if i != j:
                            told = (P[i][j], se[i][j], int((a, b) in better))
                            table.writerow((*where, "P", a, b, *told))
    return path


def headers(confidence):
    """Headers of `text_rows`."""
    return ["step", "sample", "target", "scores", f"brackets beyond their {confidence:.0%} error", "optimal?"]


def text_rows(summaries):
    """One row of text per checkpoint and target."""
    rows = []
    for found in summaries:
        for one in found["targets"]:
            scores = ", ".join(f"{n} {a:+.3g}±{b:.2g}" for n, (a, b) in one["scores"].items())
            certain = one["certain"]
            pairs = ", ".join(
                f"{p['first']} then {p['second']} {p['P']:+.3g}±{p['P_se']:.2g}" for p in certain
            )
            moves = ", ".join(f"{i} earlier, {j} later" for i, j in one["improvable"])
            verdict = f"no: {moves}" if moves else "no order proven wrong"
            rows.append([found["step"], found["sample"], one["target"], scores, pairs or "none", verdict])
    return rows
