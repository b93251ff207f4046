"""Pictures of the criterion: scores and P of every probe, with error bars."""

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
    sample_unit,
    scale,
)


def scores(run):
    """Full score and s of every domain with error bars, one picture per target."""
    known = {key: series.measured(run, key) for key in ("score", "s")}
    known = {key: arrays for key, arrays in known.items() if len(arrays[0])}
    return [_scores_of(run, known, t, target) for t, target in enumerate(run.targets)] if known else []


def _scores_of(run, known, t, target):
    figure, panels = canvas(run, len(run.names), height=1.25, sharey=True)
    factor, power, wide = scale(panels, *(arrays[1][:, t] for arrays in known.values()))
    aside = {"score": 0.0, "s": 0.012 * run.span}
    for k, axes in enumerate(panels):
        axes.axhline(0, color="black", linewidth=0.8)
        for key, (sample, value, error) in known.items():
            sure = series.certain(run, value[:, t, k], error[:, t, k])
            x = (sample + aside[key]) / sample_unit(run)[0]
            y, bar = value[:, t, k] / factor, np.nan_to_num(error[:, t, k]) / factor
            colour, marker = (COLOURS[k % len(COLOURS)], "o") if key == "score" else (GREY, "s")
            axes.errorbar(x, y, yerr=bar, fmt="none", ecolor=colour, elinewidth=0.9)
            dots = {"linestyle": "none", "marker": marker, "markersize": 4 if len(x) <= MANY else 2}
            axes.plot(x[sure], y[sure], color=colour, **dots)
            axes.plot(x[~sure], y[~sure], color=colour, markerfacecolor="white", **dots)
        axes.set_title(label(run.names[k]))
    figure.supylabel(f"score ({_bracket_unit(power)})", fontsize=STYLE["font.size"])
    caption = (
        "Above zero: delaying the domain lowers the target loss. Circles: the full score, what a law acts on "
        "(with the terms of a changing learning rate and of weight decay, relative to the mixture's). Grey "
        f"squares, a little to the right: s = P w alone. {_bars(run)} Filled: zero lies outside the "
        f"{100 * run.confidence:g} % interval.{wide}"
    )
    single = len(run.targets) == 1
    title = "Scores" if single else f"Scores, target {target}"
    name = "scores" if single else f"scores_{t + 1}"
    return Picture(name=name, title=title, caption=caption, figure=figure)


def brackets(run):
    """P: its course for two domains; heat maps of last probe and mean for more, per target."""
    sample, P, error = series.measured(run, "P")
    if not len(sample) or len(run.names) < 2:
        return []
    if len(run.names) == 2:
        return [_course(run, sample, P[..., 0, 1], error[..., 0, 1])]
    maps = []
    for t, target in enumerate(run.targets):
        tail, words = ("", "") if len(run.targets) == 1 else (f"_{t + 1}", f", target {target}")
        last = f"P at the last probe, sample {sample[-1]:,}{words}"
        mean = f"P, mean of {len(sample)} probes{words}"
        maps.append(_heat_map(run, f"P_last{tail}", last, P[-1, t], error[-1, t]))
        maps.append(
            _heat_map(run, f"P_mean{tail}", mean, *series.mean_with_error(P[:, t], error[:, t]), len(P))
        )
    return maps


def _course(run, sample, value, error):
    """P_12 of two domains at every probe; value, error: [n, T]."""
    figure, (axes,) = canvas(run, 1)
    factor, power, wide = scale([axes], value)
    axes.axhline(0, color="black", linewidth=0.8)
    for t in range(value.shape[1]):
        x = (sample + 0.012 * t * run.span) / sample_unit(run)[0]
        y, bar = value[:, t] / factor, np.nan_to_num(error[:, t]) / factor
        axes.errorbar(x, y, yerr=bar, **line(t), marker=MARKERS[t], linewidth=0.8, elinewidth=0.9)
    first, second = run.names
    axes.set_ylabel(f"P of {label(first)}, then {label(second)}\n({_bracket_unit(power)})")
    if value.shape[1] > 1:
        legend(figure, [f"target {label(name)}" for name in run.targets])
    ends = f"{first} first and {second} second ends with a higher target loss than mixing the two"
    title, caption = f"P of {first} and {second}", f"Above zero: {ends}. {_bars(run)}{wide}"
    return Picture(name="P", title=title, caption=caption, figure=figure)


def _heat_map(run, name, title, P, error, probes=1):
    """P[K, K] as colours centred on zero, numbers in one power of ten, the certain ones bold."""
    import matplotlib

    K = len(run.names)
    names = [label(name, 12) for name in run.names]
    tilted = K > 3 or max(map(len, names)) > 8
    figure, (axes,) = canvas(run, 1, height=3.6 + 0.08 * K + 0.4 * tilted, over_samples=False)
    factor, power = series.power_of_ten(P)
    scaled, bars = np.where(np.eye(K, dtype=bool), np.nan, P / factor), error / factor
    limit = np.nanmax(np.abs(scaled), initial=0.0) or 1.0
    colours = matplotlib.colormaps["PuOr_r"].resampled(41)
    cells = axes.pcolormesh(scaled, cmap=colours, vmin=-limit, vmax=limit, edgecolors="white", linewidth=1.5)
    sure = series.certain(run, P, error, probes)
    for i, j in np.argwhere(np.isfinite(scaled)):
        dark = np.dot(colours(0.5 + scaled[i, j] / (2 * limit))[:3], (0.3, 0.6, 0.1)) < 0.5
        text = f"{scaled[i, j]:+.1f}".replace("-", "−") + (f"\n±{bars[i, j]:.1f}" if K <= 4 else "")
        style = {
            "weight": "bold" if sure[i, j] else "normal",
            "color": "white" if dark else "black",
            "in_layout": False,
        }
        axes.text(j + 0.5, i + 0.5, text, ha="center", va="center", fontsize=9 if K <= 4 else 8, **style)
    axes.set_aspect("equal")
    axes.invert_yaxis()
    tilt = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if tilted else {}
    axes.set_xticks(np.arange(K) + 0.5, names, **tilt)
    axes.set_yticks(np.arange(K) + 0.5, names)
    axes.set(xlabel="second", ylabel="first")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(cells, ax=axes, location="bottom", aspect=30)
    bar.outline.set_visible(False)
    bar.set_label(f"P ({_bracket_unit(power)})")
    caption = (
        "Orange: the row's domain first and the column's second ends with a higher target loss than mixing "
        f"the two. ±: one standard error. Bold: zero lies outside the {100 * run.confidence:g} % interval."
    )
    caption += " The error of the mean takes the probes as independent." if probes > 1 else ""
    return Picture(name=name, title=title, caption=caption, figure=figure)


def _bars(run):
    """What the error bars are, in words."""
    return f"Error bars: one standard error over {run.splits} splits of a probe's samples."


def _bracket_unit(power):
    """Unit of P and of the scores, in a power of ten."""
    return f"{power} nats per token / (flow time)²".strip()
