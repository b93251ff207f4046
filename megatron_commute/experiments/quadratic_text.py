"""The tables of `megatron-commute quadratic` for reading, with what they say."""

from __future__ import annotations

import numpy as np

from megatron_commute.experiments.quadratic_tables import STARTS, WINDOWS


def report(tables, seeds):
    """All tables of `quadratic.study` as one text."""
    parts = [
        _table1(tables["table1"], seeds),
        _readings(tables["readings"]),
        _one_problem(tables["one_problem"]),
    ]
    parts += [_errata(tables["errata"]), _full_loss(tables["full_loss"]), _corollary(tables["corollary"])]
    return "\n\n".join(parts)


def _table(title, rows, headers):
    from tabulate import tabulate

    return f"{title}\n{tabulate(rows, headers, disable_numparse=True)}"


def _table1(rows, seeds):
    cells = {(r["t"], r["dt"]): r for r in rows}
    lines = []
    for start in STARTS:
        row = [cells[start, window] for window in WINDOWS]
        ours = [f"{r['median']:.3f} ± {r['half_range']:.3f}" for r in row]
        lines.append([f"{start:g}", *ours, *(f"{r['paper']:.3f} ± {r['paper_pm']:.3f}" for r in row)])
    headers = ["t", *(f"ours {w:g}" for w in WINDOWS), *(f"paper {w:g}" for w in WINDOWS)]
    title = f"Table 1: measured EL_12 / (P_12 dt^2 / 2); {seeds} problems, median ± half the 90-10 range"
    return _table(title, lines, headers)


def _readings(rows):
    names = list(dict.fromkeys(r["reading"] for r in rows))
    lines = []
    for name in names:
        mine = [r for r in rows if r["reading"] == name]
        far = max(abs(r["median"] - r["paper"]) for r in mine)
        near = sum(abs(r["median"] - r["paper"]) < 0.01 for r in mine)
        cells = [f"{r['median']:.3f} ± {r['half_range']:.3f}" for r in mine if r["dt"] == WINDOWS[-1]]
        lines.append([name, *cells, f"{near} of {len(mine)}", f"{far:.3f}"])
    paper = [
        f"{r['paper']:.3f} ± {r['paper_pm']:.3f}" for r in rows[: len(rows) // len(names)] if r["dt"] == 0.1
    ]
    lines.append(["the paper", *paper, "", ""])
    headers = ["reading", *(f"t = {t:g}" for t in STARTS), "cells within .01", "furthest"]
    return _table(
        "Why the paper's Table 1 may differ (dt = 0.1 shown; the CSV has all cells)", lines, headers
    )


def _one_problem(rows):
    lines = []
    for n in dict.fromkeys(r["n"] for r in rows):
        mine = [r for r in rows if r["n"] == n]
        for of in ("median", "half_range"):
            cells = [f"{r[f'{of}_q10']:.3f} to {r[f'{of}_q90']:.3f}" for r in mine]
            lines.append([f"n = {n}", of.replace("_", " "), *cells, f"{mine[0]['close']:.0%}"])
    headers = ["", "of theta0", *(f"t = {t:g}" for t in STARTS), "medians all within .02"]
    return _table(
        "One problem, only theta0 drawn anew (dt = 0.1): 10 to 90 % of the problems", lines, headers
    )


def _errata(rows):
    lines = [[r["place"], r["printed"], f"{r['ratio']:+.3f}", r["holds"]] for r in rows]
    return _table(
        "Printed formulas against measurement", lines, ["place", "printed", "measured/printed", "holds"]
    )


def _full_loss(rows):
    lines = []
    for r in rows:
        if r["e"] == WINDOWS[1]:
            ratio = f"{r['median']:.4f} ± {r['half_range']:.4f}"
            lines.append([r["domains"], f"{r['decay']:g}", r["rates"], ratio, f"{r['with_s_alone']:.4g}"])
    headers = ["domains", "weight decay", "learning rate", "measured/full score", "measured/s alone"]
    return _table(f"The full prediction, windows of {WINDOWS[1]:g}", lines, headers)


def _corollary(rows):
    lines = []
    for domains in dict.fromkeys(r["domains"] for r in rows):
        mine = [r for r in rows if r["domains"] == domains]
        mean = {key: float(np.mean([r[key] for r in mine])) for key in mine[0]}
        total = {key: sum(r[key] for r in mine) for key in ("switches", "allowed", "allowed_local")}
        arcs = [r["gap_found"] for r in mine if r["mixed_found"] > 0]
        gap = f"{float(np.median(arcs)):.4f}" if arcs else "-"
        line = [domains, len(mine), f"{mean['gain_percent']:.2f} %", f"{mean['mixed_found']:.0%}", gap]
        line += [f"{mean[f'improvable_{name}']:.0%}" for name in ("constant", "found")]
        lines.append([*line, *(f"{total[k]} of {total['switches']}" for k in ("allowed", "allowed_local"))])
    headers = ["domains", "problems", "gain", "still mixed", "gap there", "improvable before", "after"]
    headers += ["switches allowed", "by local direction"]
    title = "Corollary 3.2(b): schedules found by search; gap as a part of the constant mixture's"
    return _table(title, lines, headers)
