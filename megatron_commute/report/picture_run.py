"""Pictures of what a run did: its weights, losses, budgets, what its probes cost, and a replay
beside it.
"""

from __future__ import annotations

import numpy as np

from megatron_commute.report import series
from megatron_commute.report.drawing import (
    COLOURS,
    GREY,
    MANY,
    MARKERS,
    STYLE,
    Picture,
    canvas,
    label,
    legend,
    line,
    percent,
    sample_unit,
)


def weights(run):
    """Weights in force as steps, and where decisions changed them or let them stay."""
    sample, value = series.weights(run)
    figure, (axes,) = canvas(run, 1)
    unit = sample_unit(run)[0]
    for k in range(len(run.names)):
        steps = np.append(sample, run.span) / unit, np.append(value[:, k], value[-1, k])
        axes.step(*steps, where="post", **line(k))
    planned = [p["effective_sample"] for p in series.moves(run)]
    changed = [n for n in planned if n <= run.samples]
    stayed = [p["sample"] for p in run.probes if p.get("effective_sample") is None]
    for points, style in (
        (changed, {"color": "black", "marker": "^"}),
        (stayed, {"color": GREY, "marker": "|"}),
    ):
        size = 6 if len(points) <= MANY else 3
        on_axis = {"transform": axes.get_xaxis_transform(), "linestyle": "none", "markersize": size}
        axes.plot(np.array(points) / unit, np.full(len(points), 0.03), **on_axis, **style)
    axes.set_ylim(0, None)
    axes.yaxis.set_major_formatter(percent)
    axes.set_ylabel("weight (% of samples)")
    legend(figure, run.names)
    caption = (
        f"Share of each domain among the samples drawn. Triangles: where a decision took "
        f"effect ({len(changed)}); grey ticks: probes after which the weights stayed ({len(stayed)})."
    )
    if run.analysis:
        caption = (
            "Share of each domain among the samples drawn, as planned and as the checkpoints (ticks) hold it."
        )
    later = len(planned) - len(changed)
    caption += f" Decisions for samples not reached: {later}." if later else ""
    return Picture(name="weights", title="Weights in force", caption=caption, figure=figure)


def losses(run):
    """Training and validation loss of every domain, two panels on one scale."""
    pair = {kind: series.losses(run, kind) for kind in ("train", "valid")}
    pair = {kind: both for kind, both in pair.items() if np.isfinite(both[1]).any()}
    if not pair:
        return None
    figure, panels = canvas(run, len(pair), height=2.1, sharey=True)
    words = {"train": "training", "valid": "held-out" if run.analysis else "validation"}
    for axes, (kind, (sample, value)) in zip(panels, pair.items(), strict=True):
        for k in range(len(run.names)):
            known = np.isfinite(value[:, k])
            dots = {"marker": MARKERS[k % len(MARKERS)]} if known.sum() <= MANY else {}
            axes.plot(sample[known] / sample_unit(run)[0], value[known, k], **line(k), **dots)
        axes.set_ylabel(f"{words[kind]} loss\n(nats per token)")
    legend(figure, run.names)
    caption = (
        "Mean loss per token of each domain: training since the line before, validation on its own data."
    )
    if run.analysis:
        caption = "Mean loss per token of each domain at the checkpoints, on held-out sequences of its own."
    return Picture(name="losses", title="Loss of each domain", caption=caption, figure=figure)


def budgets(run):
    """What is left of each budget, and how far that is from the straight line of a constant
    mixture.
    """
    sample, used = series.served(run)
    limited = [k for k, budget in enumerate(run.budgets) if budget]
    if not limited or len(sample) < 2:
        return None
    figure, (left, ahead) = canvas(run, 2, height=2.1)
    unit, total = sample_unit(run)[0], run.start.get("samples") or run.samples
    constant = {"color": GREY, "linewidth": 1, "linestyle": (0, (1, 1.5))}
    left.plot([0, total / unit], [1, 0], **constant)
    ahead.axhline(0, **constant)
    for k in limited:
        remaining = 1 - used[:, k] / run.budgets[k]
        left.plot(sample / unit, remaining, **line(k))
        ahead.plot(sample / unit, remaining - (1 - sample / total), **line(k))
    left.set_ylim(-0.02, 1.02)
    left.set_ylabel("budget left\n(% of the domain's)")
    largest = np.abs(ahead.dataLim.intervaly).max()
    ahead.set_ylim(
        -max(0.01, 1.1 * largest), max(0.01, 1.1 * largest)
    )  # whole samples round to about nothing
    ahead.set_ylabel("left more than constant\n(% of the domain's)")
    for axes in (left, ahead):
        axes.yaxis.set_major_formatter(percent)
    legend(figure, [run.names[k] for k in limited], limited)
    endless = [run.names[k] for k in range(len(run.names)) if k not in limited]
    caption = (
        "Samples of each domain not yet served, as a share of its budget. Dotted: a constant mixture at "
        "budget shares; above it a domain is used later, below it earlier. Below: "
        "the difference."
    )
    caption += f" Without a budget: {', '.join(endless)}." if endless else ""
    return Picture(name="budgets", title="Budgets", caption=caption, figure=figure)


def overhead(run):
    """What the probes cost: share of training time so far, and seconds of each."""
    sample, share, seconds = series.overhead(run)
    if not len(sample):
        return None
    figure, panels = canvas(run, 2, height=1.5)
    series_of = ((100 * share, "probes so far (% of\ntraining time)"), (seconds, "one probe\n(seconds)"))
    for axes, (value, words) in zip(panels, series_of, strict=True):
        axes.plot(
            sample / sample_unit(run)[0], value, color=COLOURS[0], marker="o" if len(sample) <= MANY else None
        )
        axes.set_ylim(0, 1.15 * np.nanmax(value, initial=0.0) or 1.0)
        axes.set_ylabel(words)
    caption = "Time spent in probes since the start as a share of training time, and the time of each probe."
    return Picture(name="overhead", title="Cost of the probes", caption=caption, figure=figure)


def replayed(run, found):
    """A replay.Told beside what happened."""
    figure, panels = canvas(run, len(run.names), height=1.35)
    unit, (sample, value) = sample_unit(run)[0], series.weights(run)
    rows = [row for row in found.decisions if row.weights is not None]
    at = np.array([row.effective_sample for row in rows]) / unit
    for k, axes in enumerate(panels):
        colour = COLOURS[k % len(COLOURS)]
        steps = np.append(sample, run.span) / unit, np.append(value[:, k], value[-1, k])
        axes.step(*steps, where="post", color=GREY)
        before, after = (np.array([getattr(row, key)[k] for row in rows]) for key in ("before", "weights"))
        axes.vlines(at, before, after, color=colour, linewidth=1.2)
        axes.plot(at, after, "o", color=colour)
        axes.yaxis.set_major_formatter(percent)
        axes.set_title(label(run.names[k]))
    figure.supylabel("weight (% of samples)", fontsize=STYLE["font.size"])
    caption = f"Grey: what happened. Dots: where law {found.law} would have gone from there."
    return Picture(name="replay", title=f"Replay of law {found.law}", caption=caption, figure=figure)
