"""Pictures of a run from its decision log alone: `report` for one HTML file, `export` for PNG, SVG and CSV.

The same record gives the same bytes.
"""

from __future__ import annotations

import csv
import pathlib

import numpy as np

from megatron_commute import calibration, record, series
from megatron_commute.drawing import (
    COLOURS,
    GREY,
    MARKERS,
    STYLE,
    Picture,
    canvas,
    house_style,
    label,
    legend,
    line,
    percent,
    sample_unit,
    scale,
)
from megatron_commute.report import page
from megatron_commute.series import summary_rows

__all__ = ["export", "pictures", "report", "summary_rows"]

MANY = 40  # more points than this are drawn small or without markers


def report(run, out=None):
    """Write the report of a run as one self-contained HTML file and return its path.

    run: a record, or the folder that holds one. out: the file to write, by default report.html beside the
    record. Raises FileNotFoundError where there is no record, ValueError where it is damaged or has no start.
    """
    file = record.find(run)
    out = pathlib.Path(out) if out else file.with_name("report.html")
    lines = record.read(file)
    written = sum(1 for text in file.read_bytes().split(b"\n") if text)
    events = series.by_event(lines, file)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(events, pictures(events), torn=written - len(lines)), encoding="utf-8")
    return out


def export(run, out_dir):
    """Write every picture as PNG and SVG and every series as CSV into out_dir; return the paths written.

    run: a record, or the folder that holds one; errors as in `report`.
    """
    events = series.by_event(record.read(run), run)
    folder = pathlib.Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for picture in pictures(events):
        paths += [folder / f"{picture.name}.svg", folder / f"{picture.name}.png"]
        paths[-2].write_text(picture.svg(), encoding="utf-8")
        picture.save_png(paths[-1])
    for name, (headers, rows) in series.tables(events).items():
        paths.append(folder / f"{name}.csv")
        with open(paths[-1], "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([headers, *rows])
    return paths


def pictures(run):
    """Every Picture a series.Run has numbers for, in the order of the report."""
    with house_style():
        drawn = [_weights(run), _budgets(run), _losses(run), _overhead(run), *_scores(run), *_brackets(run)]
        drawn += [_effects(run), _calibration(run)]
    return [picture for picture in drawn if picture is not None]


def _weights(run):
    """Weights in force as steps, and where decisions changed them or let them stay."""
    sample, value = series.weights(run)
    figure, (axes,) = canvas(run, 1)
    unit = sample_unit(run)[0]
    for k in range(len(run.names)):
        steps = np.append(sample, max(run.samples, 1)) / unit, np.append(value[:, k], value[-1, k])
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
    later = len(planned) - len(changed)
    caption += f" Decisions for samples not reached: {later}." if later else ""
    return Picture("weights", "Weights in force", caption, figure)


def _losses(run):
    """Training and validation loss of every domain, two panels on one scale."""
    pair = {kind: series.losses(run, kind) for kind in ("train", "valid")}
    pair = {kind: both for kind, both in pair.items() if np.isfinite(both[1]).any()}
    if not pair:
        return None
    figure, panels = canvas(run, len(pair), height=2.1, sharey=True)
    words = {"train": "training", "valid": "validation"}
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
    return Picture("losses", "Loss of each domain", caption, figure)


def _scores(run):
    """Full score and s of every domain with error bars, one picture per target."""
    known = {key: series.measured(run, key) for key in ("score", "s")}
    known = {key: arrays for key, arrays in known.items() if len(arrays[0])}
    return [_scores_of(run, known, t, target) for t, target in enumerate(run.targets)] if known else []


def _scores_of(run, known, t, target):
    figure, panels = canvas(run, len(run.names), height=1.25, sharey=True)
    factor, power, wide = scale(panels, *(arrays[1][:, t] for arrays in known.values()))
    aside = {"score": 0.0, "s": 0.012 * max(run.samples, 1)}
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
    return Picture("scores" if single else f"scores_{t + 1}", title, caption, figure)


def _brackets(run):
    """P: its course for two domains; heat maps of last probe and mean for more, a pair per target."""
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
        x = (sample + 0.012 * t * run.samples) / sample_unit(run)[0]
        y, bar = value[:, t] / factor, np.nan_to_num(error[:, t]) / factor
        axes.errorbar(x, y, yerr=bar, **line(t), marker=MARKERS[t], linewidth=0.8, elinewidth=0.9)
    first, second = run.names
    axes.set_ylabel(f"P of {label(first)}, then {label(second)}\n({_bracket_unit(power)})")
    if value.shape[1] > 1:
        legend(figure, [f"target {label(name)}" for name in run.targets])
    ends = f"{first} first and {second} second ends with a higher target loss than mixing the two"
    return Picture("P", f"P of {first} and {second}", f"Above zero: {ends}. {_bars(run)}{wide}", figure)


def _heat_map(run, name, title, P, error, probes=1):
    """P[K, K] as colours centred on zero, numbers in one power of ten, the certain ones bold."""
    import matplotlib

    K = len(run.names)
    figure, (axes,) = canvas(run, 1, height=2.2 + 0.3 * K, over_samples=False)
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
    names = [label(name, 12) for name in run.names]
    axes.set_aspect("equal")
    axes.invert_yaxis()
    tilt = (
        {}
        if K <= 3 and max(map(len, names)) <= 8
        else {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    )
    axes.set_xticks(np.arange(K) + 0.5, names, **tilt)
    axes.set_yticks(np.arange(K) + 0.5, names)
    axes.set(xlabel="second", ylabel="first")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(cells, ax=axes, shrink=0.85)
    bar.outline.set_visible(False)
    bar.set_label(f"P ({_bracket_unit(power)})")
    caption = (
        "Orange: the row's domain first and the column's second ends with a higher target loss than mixing "
        f"the two. ±: one standard error. Bold: zero lies outside the {100 * run.confidence:g} % interval."
    )
    caption += " The error of the mean takes the probes as independent." if probes > 1 else ""
    return Picture(name, title, caption, figure)


def _budgets(run):
    """What is left of each budget, and how far that is from the straight line of a constant mixture."""
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
    return Picture("budgets", "Budgets", caption, figure)


def _overhead(run):
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
    return Picture("overhead", "Cost of the probes", caption, figure)


def _effects(run):
    """Measured effects of every domain with error bars."""
    sample, value, error = series.effects(run)
    if not len(sample):
        return None
    figure, panels = canvas(run, len(run.names), height=1.25, sharey=True)
    factor, power = series.power_of_ten(value)
    for k, axes in enumerate(panels):
        axes.axhline(0, color="black", linewidth=0.8)
        x, y, bar = sample / sample_unit(run)[0], value[:, k] / factor, error[:, k] / factor
        axes.errorbar(x, y, yerr=bar, fmt="o", color=COLOURS[k % len(COLOURS)], elinewidth=0.9)
        axes.set_title(label(run.names[k]))
    figure.supylabel(
        f"effect ({power} nats per unit of weight)".replace("( ", "("), fontsize=STYLE["font.size"]
    )
    kind = (run.start.get("response") or {}).get("kind", "")
    caption = (
        f"Measured by {kind}: change of the target loss, judged after a common tail, per unit of weight moved onto the "
        "domain and given back later. Above zero: the domain earlier raises the loss. Error bars: one standard error."
    )
    return Picture("effects", "Measured effects", caption, figure)


def _calibration(run):
    """Hit rate and scale of every signal with their intervals."""
    book = calibration.book_of(run.judgements)
    names = [name for name in sorted(book) if calibration.judged(book[name]).n]
    if not names:
        return None
    figure, _ = canvas(run, 1, height=1.6 + 0.5 * len(names), over_samples=False)
    figure.clear()
    hits, scales = figure.subplots(2, 1)  # each with an axis of its own
    for y, name in enumerate(names):
        found, colour = calibration.judged(book[name]), GREY if name == calibration.LAST else COLOURS[0]
        bar = [[found.rate - found.low], [found.high - found.rate]]
        hits.errorbar([100 * found.rate], [y], xerr=100 * np.maximum(bar, 0), fmt="o", color=colour)
        if found.scale is not None and found.scale_low is not None:
            bar = [[found.scale - found.scale_low], [found.scale_high - found.scale]]
            scales.errorbar([found.scale], [y], xerr=np.maximum(bar, 0), fmt="o", color=colour)
        elif found.scale is not None:
            scales.plot([found.scale], [y], "o", color=colour, markerfacecolor="white")
    for axes, at, words in ((hits, 50, "right signs (%)"), (scales, 1, "measured / foretold size")):
        axes.axvline(at, color="black", linewidth=0.8)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlabel(words)
    hits.set_xlim(-2, 102)
    scales.set_xscale("log")
    scales.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    scales.xaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "25" else "")
    caption = (
        f"What {len(run.judgements)} comparisons with effects measured later say of each signal. Bars: 95 % intervals, "
        "Wilson's for the signs, Student's on the logarithm for the size; lines: chance, and faithful size. Grey: the "
        "constant “the domain trained last gains”. Hollow: a single comparison. Foretold sizes of constants mean nothing."
    )
    return Picture("calibration", "Calibration of the signals", caption, figure)


def replayed(run, found, out):
    """Draw a replay.Told beside what happened and write it to `out` (.png or .svg). run: a record or its folder."""
    events, out = series.by_event(record.read(run), run), pathlib.Path(out)
    if out.suffix not in (".png", ".svg"):
        raise ValueError(f"--out {out}: write a name that ends in .png or .svg")
    with house_style():
        figure, panels = canvas(events, len(events.names), height=1.35)
        unit, (sample, value) = sample_unit(events)[0], series.weights(events)
        for k, axes in enumerate(panels):
            end = max(events.samples, 1) / unit
            axes.step(
                np.append(sample / unit, end), np.append(value[:, k], value[-1, k]), where="post", color=GREY
            )
            rows = [row for row in found.decisions if row.weights is not None]
            at = np.array([row.effective_sample for row in rows]) / unit
            before, after = (
                np.array([getattr(row, key)[k] for row in rows]) for key in ("before", "weights")
            )
            axes.vlines(at, before, after, color=COLOURS[k % len(COLOURS)], linewidth=1.2)
            axes.plot(at, after, "o", color=COLOURS[k % len(COLOURS)])
            axes.yaxis.set_major_formatter(percent)
            axes.set_title(label(events.names[k]))
        figure.supylabel("weight (% of samples)", fontsize=STYLE["font.size"])
    words = f"Grey: what happened. Dots: where law {found.law} would have gone from there."
    picture = Picture("replay", f"Replay of law {found.law}", words, figure)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".svg":
        out.write_text(picture.svg(), encoding="utf-8")
    else:
        picture.save_png(out)
    return out


def _bars(run):
    """What the error bars are, in words."""
    return f"Error bars: one standard error over {run.splits} splits of a probe's samples."


def _bracket_unit(power):
    """Unit of P and of the scores, in a power of ten."""
    return f"{power} nats per token / (flow time)²".strip()
