"""Pictures of what predictions are worth: measured effects, signals beside them, and schedules that rest on scores."""

from __future__ import annotations

import numpy as np

from megatron_commute import series
from megatron_commute.drawing import (
    COLOURS,
    GREY,
    STYLE,
    Picture,
    canvas,
    label,
    percent,
    sample_unit,
)

SAID = "change of the target loss, judged after a common tail, per unit of weight moved onto the domain and given back later"


def effects(run):
    """Measured effects of every domain with error bars."""
    sample, value, error = series.effects(run)
    if not len(sample):
        return None
    figure, panels = canvas(run, len(run.names), height=1.25)
    factor, power = series.power_of_ten(value)
    for k, axes in enumerate(panels):
        axes.axhline(0, color="black", linewidth=0.8)
        x, y, bar = sample / sample_unit(run)[0], value[:, k] / factor, error[:, k] / factor
        axes.errorbar(x, y, yerr=np.nan_to_num(bar), fmt="o", color=COLOURS[k % len(COLOURS)], elinewidth=0.9)
        axes.set_title(label(run.names[k]))
    figure.supylabel(f"effect ({_effect_unit(power)})", fontsize=STYLE["font.size"])
    kind = (run.start.get("response") or {}).get("kind", "")
    caption = (
        f"Measured by {kind}: {SAID}. Above zero: the domain earlier raises the loss. Error bars: one standard error. "
        "Each domain has its own scale: effects of rare ones are the least certain."
    )
    return Picture("effects", "Measured effects", caption, figure)


def _steps(sample, value, end, unit):
    return np.append(sample, end) / unit, np.append(value, value[-1])


def replayed(run, found):
    """A replay.Told beside what happened."""
    figure, panels = canvas(run, len(run.names), height=1.35)
    unit, (sample, value) = sample_unit(run)[0], series.weights(run)
    rows = [row for row in found.decisions if row.weights is not None]
    at = np.array([row.effective_sample for row in rows]) / unit
    for k, axes in enumerate(panels):
        colour = COLOURS[k % len(COLOURS)]
        axes.step(*_steps(sample, value[:, k], run.span, unit), where="post", color=GREY)
        before, after = (np.array([getattr(row, key)[k] for row in rows]) for key in ("before", "weights"))
        axes.vlines(at, before, after, color=colour, linewidth=1.2)
        axes.plot(at, after, "o", color=colour)
        axes.yaxis.set_major_formatter(percent)
        axes.set_title(label(run.names[k]))
    figure.supylabel("weight (% of samples)", fontsize=STYLE["font.size"])
    words = f"Grey: what happened. Dots: where law {found.law} would have gone from there."
    return Picture("replay", f"Replay of law {found.law}", words, figure)


def _effect_unit(power):
    return f"{power} nats per unit of weight".strip()
