"""Figures of `megatron-commute quadratic`: fields and bracket, losses along the flow, Table 1, the
search.
"""

from __future__ import annotations

import numpy as np

from megatron_commute import bracket
from megatron_commute.experiments import quadratic_search
from megatron_commute.experiments.quadratic_domains import quadratic
from megatron_commute.experiments.quadratic_tables import HALF, Swap
from megatron_commute.report.drawing import COLOURS, GREY, house_style


def draw(out_dir, tables):
    """Writes four PNG files into out_dir and returns their paths; tables: of `quadratic.study`."""
    from matplotlib.figure import Figure

    paths = []
    with house_style():
        for name, size, plot in (
            ("figure1_fields", (6.4, 3.5), _fields),
            ("figure2_losses", (4.6, 4.4), _losses),
            ("figure3_table1", (6.4, 2.9), lambda figure: _table1(figure, tables)),
            ("figure4_corollary", (6.4, 3.4), _corollary),
        ):
            figure = Figure(figsize=size, layout="constrained")
            figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06)
            plot(figure)
            paths.append(out_dir / f"{name}.png")
            figure.savefig(paths[-1], metadata={"Software": None})
    return paths


def plane():
    """The two-dimensional problem of figures 1 and 2: two long valleys that cross, minima apart."""
    angles, spectra = np.radians([25.0, 100.0]), np.array([1.0, 0.08])
    turns = [np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]) for a in angles]
    A = np.array([(turn * spectra) @ turn.T for turn in turns])
    return quadratic(A, np.array([[-1.0, 0.3], [1.0, -0.2]]))


def _fields(figure):
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    problem = plane()
    side = np.linspace(-2.4, 2.4, 13)
    grid = np.stack(np.meshgrid(side, side), -1)
    g = problem.gradients(grid)
    for k in range(2):
        _arrows(left, grid, -g[..., k, :], COLOURS[k])
        left.plot(
            *problem.b[k], "*", color=COLOURS[k], ms=11, mec="white", label=f"domain {k + 1} and its minimum"
        )
    left.set_title("Training on one domain")
    fine = np.linspace(-2.6, 2.6, 261)
    P = Swap(problem).bracket(np.stack(np.meshgrid(fine, fine), -1))
    shades = {"1 first ends lower": "#cfe3f2", "2 first ends lower": "#f8dcc6"}
    right.contourf(fine, fine, P, [-np.inf, 0, np.inf], colors=list(shades.values()))
    for name, shade in shades.items():
        right.plot([], [], "s", color=shade, ms=9, label=name)
    shift = g[..., 0, :] @ problem.A[1] - g[..., 1, :] @ problem.A[0]
    _arrows(right, grid, shift, "black")
    right.set_title("Bracket: 1 first minus 2 first")
    for axis in (left, right):
        axis.set(aspect="equal", xlabel="parameter 1", xlim=(-2.6, 2.6), ylim=(-2.6, 2.6))
    left.set_ylabel("parameter 2")
    figure.legend(loc="outside lower center", ncols=4, fontsize=7.5, handletextpad=0.3)


def _arrows(axis, grid, field, colour):
    length = np.linalg.norm(field, axis=-1, keepdims=True)
    field = field / np.maximum(length, 1e-12) * np.sqrt(length / length.max())
    axis.quiver(*np.moveaxis(grid, -1, 0), *np.moveaxis(field, -1, 0), color=colour, scale=16, width=0.004)


def _losses(figure):
    axis = figure.subplots()
    problem = plane()
    flow = problem.flow(HALF)
    times = np.concatenate([[0], np.geomspace(0.01, 300, 300)])
    names = {True: "one loss rises by over 1 % on the way", False: "neither does"}
    for angle in np.arange(0, 2 * np.pi, np.pi / 12):
        start = 2.2 * np.array([np.cos(angle), np.sin(angle)])
        losses = np.array([problem.losses(flow(start, time)) for time in times])
        rises = bool((losses > 1.01 * np.minimum.accumulate(losses)).any())
        colour, style = (COLOURS[1], "-") if rises else (COLOURS[0], "--")
        axis.plot(*losses.T, color=colour, ls=style, lw=1.1, label=names.pop(rises, None))
        axis.plot(*losses[0], ".", color=colour, ms=5)
    axis.plot(*losses[-1], "o", color="black", ms=5, label="minimum of the even mixture")
    axis.set(xlabel="loss of domain 1", ylabel="loss of domain 2", title="Constant weights 1/2, 1/2")
    axis.set(xscale="log", yscale="log")
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_major_formatter("{x:g}")
    figure.legend(loc="outside lower center", fontsize=7.5)


def _table1(figure, tables):
    axes = figure.subplots(1, 2, sharey=True)
    small = [r for r in tables["readings"] if r["reading"].startswith("n = 2")]
    for axis, start in zip(axes, (0.1, 3.0), strict=True):
        for rows, name, offset, marker, colour in (
            (tables["table1"], "ours, n = 100", -0.2, "o", COLOURS[0]),
            (small, "ours, n = 2", 0.0, "s", COLOURS[2]),
            (None, "the paper", 0.2, "D", COLOURS[1]),
        ):
            of_paper, rows = rows is None, [r for r in rows or small if r["t"] == start]
            median = np.array([r["paper" if of_paper else "median"] for r in rows])
            bars = [r["paper_pm"] for r in rows]
            if not of_paper:
                bars = [median - [r["q10"] for r in rows], [r["q90"] for r in rows] - median]
            axis.errorbar(
                np.arange(3) + offset, median, bars, fmt=marker, color=colour, capsize=2, label=name
            )
        axis.axhline(1, color=GREY, lw=0.8)
        axis.set_xticks(range(3), [f"{r['dt']:g}" for r in rows])
        axis.set(xlabel="window, flow time", title=f"after flow time {start:g}")
    axes[0].set_ylabel("measured / predicted")
    axes[0].legend(loc="lower left", fontsize=7.5)


def _corollary(figure):
    s = quadratic_search
    _, problem, theta0, budgets = s.problem_of(0, 2)
    found, _ = s.search(problem, theta0, budgets, s.TIME, s.STEPS, budgets)
    top, bottom = figure.subplots(2, 1, sharex=True)
    edges = np.linspace(0, s.TIME, s.STEPS + 1)
    constant = np.tile(budgets, (s.STEPS, 1))
    for weights, name, style, colour in (
        (constant, "constant mixture", "--", GREY),
        (found, "after the search", "-", COLOURS[0]),
    ):
        top.stairs(weights[:, 0], edges, color=colour, ls=style, lw=1.5, label=name)
        brackets = s.trajectory(problem, theta0, weights, s.TIME, budgets)
        gap = [np.subtract(*bracket.scores(pulled, budgets)) for pulled, _ in brackets]
        bottom.plot(edges[1:-1], gap, color=colour, ls=style, lw=1.5)
    mixed = np.isfinite(s.mixed_gaps([pulled for pulled, _ in brackets], found))[:, 0]
    bottom.plot(
        edges[1:-1][mixed], np.array(gap)[mixed], "o", color=COLOURS[1], ms=4, label="both domains in use"
    )
    bottom.axhline(0, color=GREY, lw=0.8)
    top.set(ylabel="weight of domain 1", ylim=(-0.05, 1.05))
    bottom.set(ylabel="score gap s1 - s2", xlabel="flow time")
    top.legend(loc="center", bbox_to_anchor=(0.62, 0.8), fontsize=7.5)
    bottom.legend(loc="lower left", fontsize=7.5)
    top.set_title("Where the best schedule still mixes, the score gap is zero (Corollary 3.2b)")
