"""The picture of law flow: learning rate, profile and weights of a run on one sample axis."""

from __future__ import annotations

import dataclasses

import numpy as np

from megatron_commute.report import series
from megatron_commute.report.drawing import (
    COLOURS,
    GREY,
    MARKERS,
    Picture,
    canvas,
    legend,
    line,
    percent,
    sample_unit,
)

SHOWN = 16  # at most, nearly, of the markers of one domain


def planned(run):
    """Rate, profile and planned weights of a run, with the weights that its steps used; None under
    another law.
    """
    if run.flow is None:
        return None
    whole = dataclasses.replace(run, samples=run.start["samples"])
    figure, (rate, profile, weights) = canvas(whole, 3, height=1.55)
    unit, end = sample_unit(whole)[0], run.start["samples"]
    curves = run.flow["curves"]
    kept = run.flow.get("kept_samples", run.flow["kept"] * run.start["global_batch"])  # 0.2.0 had one batch
    at = np.array(curves["sample"]) / unit
    factor, power = series.power_of_ten(np.array(curves["rate"]))
    rate.plot(at, np.array(curves["rate"]) / factor, color="black")
    rate.set_ylabel(f"learning rate\n({power or '1'})")
    rate.set_ylim(0, None)
    profile.axhline(0, color=GREY, linewidth=0.8)
    counts = np.array(curves["sample"]) >= kept  # before, p may be below 0 and moves nothing
    profile.plot(at[counts], np.array(curves["profile"])[counts], color="black")
    profile.set_ylabel("profile p\n(0 least, 1 most)")
    profile.set_ylim(-0.06, 1.06)
    sample = np.append(run.flow["segments"]["sample"], end) / unit
    value = np.array(run.flow["segments"]["weights"], dtype=float)
    _, seen = series.in_force(run)
    for k in range(len(run.names)):
        weights.step(sample, np.append(value[:, k], value[-1, k]), where="post", **line(k))
    for k in range(seen.shape[1]):
        _seen(weights, run, k, unit)
    weights.set_ylim(0, None)
    weights.yaxis.set_major_formatter(percent)
    weights.set_ylabel("weight\n(% of samples)")
    for axes in (rate, profile, weights):
        axes.axvspan(0, kept / unit, color=GREY, alpha=0.15, linewidth=0)
    legend(figure, run.names)
    return Picture(
        name="flow",
        title="Learning rate, profile and weights of law flow",
        caption=_caption(run, len(seen)),
        figure=figure,
    )


def _seen(axes, run, k, unit):
    """Markers: the weights of domain k that steps used, each in the middle of its step."""
    sample, value = series.in_force(run)
    some = max(1, len(sample) // SHOWN)
    style = {"linestyle": "none", "marker": MARKERS[k % len(MARKERS)], "markevery": some}
    middle = (sample - run.start["global_batch"] / 2) / unit
    axes.plot(middle, value[:, k], color=COLOURS[k % len(COLOURS)], **style)


def _caption(run, seen):
    told = (
        "Profile: how much a sample counts by the rate it is trained at and what later training leaves of "
        f"it (memory {run.flow['memory']:g}). Lines below: planned weights, which follow the profile within "
        "budgets and bounds."
    )
    if run.flow["kept"]:
        told += f" Grey: the first {run.flow['kept']:,} steps stay at the planned mixture."
    if seen:
        told += " Markers: weights that steps of the run used."
    return told
