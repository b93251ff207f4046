"""Pictures of what predictions are worth: measured effects, signals beside them, and schedules that rest on scores."""

from __future__ import annotations

import numpy as np

from megatron_commute import calibration, series
from megatron_commute.drawing import (
    COLOURS,
    GREY,
    STYLE,
    Picture,
    canvas,
    label,
    percent,
    sample_unit,
    scale,
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


def foretold(run):
    """What every signal foretold beside what was measured, at the last comparison."""
    rows = [row for row in series.comparisons(run) if row[0] == run.judgements[-1]["sample"]]
    if not rows:
        return None
    signals = list(dict.fromkeys(row[1] for row in rows))
    figure, panels = canvas(run, len(run.names), height=1.25, sharey=True, over_samples=False)
    # the constant foretells a sign only: it is drawn at the size of what was measured
    told = np.array([[row[3] for row in rows if row[1] == signal] for signal in signals], dtype=np.float64)
    value, se = (np.array([row[i] for row in rows[: len(run.names)]], dtype=np.float64) for i in (4, 5))
    constant = np.array([signal == calibration.LAST for signal in signals])
    told[constant] = np.sign(told[constant]) * np.abs(value)
    bar = calibration.student(rows[0][6]) * np.nan_to_num(se)
    factor, power, wide = scale(panels, told, np.abs(value) + bar)
    for k, axes in enumerate(panels):
        axes.axhline(0, color="black", linewidth=0.8)
        axes.axhspan(
            (value[k] - bar[k]) / factor, (value[k] + bar[k]) / factor, color=GREY, alpha=0.2, linewidth=0
        )
        fill = "black" if np.isfinite(se[k]) else "white"
        axes.errorbar(
            [0], value[k] / factor, bar[k] / factor, fmt="o", color="black", mfc=fill, elinewidth=0.9
        )
        for x, signal in enumerate(signals, 1):
            constant = signal == calibration.LAST
            style = {"color": GREY, "markerfacecolor": "white"} if constant else {"color": COLOURS[0]}
            axes.plot([x], told[x - 1, k] / factor, "s" if constant else "o", markersize=5, **style)
        axes.set_title(label(run.names[k]))
        axes.set_xlim(-0.5, len(signals) + 0.5)
    names = ["measured", *(label(signal) for signal in signals)]
    panels[-1].set_xticks(range(len(names)), names, rotation=25, ha="right", rotation_mode="anchor")
    figure.supylabel(f"effect ({_effect_unit(power)})", fontsize=STYLE["font.size"])
    caption = (
        f"The last of {len(run.judgements)} comparisons, at sample {rows[0][0]:,}. Black with its 95 % interval, which the "
        f"grey band repeats: the measured {SAID}. Beside it what each signal had foretold. Hollow: the constant “the domain "
        f"trained last gains”, a sign without a size.{wide}"
    )
    return Picture("foretold", "Foretold and measured", caption, figure)


def calibrated(run):
    """Hit rate and scale of every signal with their intervals."""
    book = calibration.book_of(run.judgements)
    names = [name for name in sorted(book) if calibration.judged(book[name]).n]
    if not names:
        return None
    figure, _ = canvas(run, 1, height=1.6 + 0.5 * len(names), over_samples=False)
    figure.clear()
    hits, scales = figure.subplots(2, 1)  # each with an axis of its own
    for y, name in enumerate(names):
        found, constant = calibration.judged(book[name]), name == calibration.LAST
        style = {"fmt": "s" if constant else "o", "color": GREY if constant else COLOURS[0]}
        bar = [[found.rate - found.low], [found.high - found.rate]]
        hits.errorbar([100 * found.rate], [y], xerr=100 * np.maximum(bar, 0), **style)
        if constant or found.scale is None:
            continue
        if found.scale_low is not None:
            bar = [[found.scale - found.scale_low], [found.scale_high - found.scale]]
            scales.errorbar([found.scale], [y], xerr=np.maximum(bar, 0), **style)
        else:
            scales.plot([found.scale], [y], "o", color=COLOURS[0], markerfacecolor="white")
    for axes, at, words in ((hits, 50, "right signs (%)"), (scales, 1, "measured / foretold size")):
        axes.axvline(at, color="black", linewidth=0.8)
        axes.set_yticks(range(len(names)), [label(name) for name in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlabel(words)
    hits.set_xlim(-2, 102)
    scales.set_xscale("log")
    scales.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    scales.xaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "25" else "")
    caption = (
        f"What {len(run.judgements)} comparisons with effects measured later say of each signal. Bars: 95 % intervals, "
        "Wilson's for the signs, Student's on the logarithm for the size; lines: chance, and faithful size. Grey square: "
        "the constant “the domain trained last gains”, which foretells no size. Hollow: a single comparison."
    )
    return Picture("calibration", "Calibration of the signals", caption, figure)


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
