"""Tables and pictures of study `online`: gains over going on as before, and what part of the best
gain they are.
"""

import math

import numpy as np

from megatron_commute import intervals
from megatron_commute.experiments import bilingual_figures as figures
from megatron_commute.experiments import bilingual_tables as tables
from megatron_commute.experiments.bilingual_flow_tables import change, loss_of
from megatron_commute.experiments.bilingual_flow_variants import BASE

LOSSES = (*BASE, "mixture")
SHAPES = {"target": (7.6, 4.8), "length": (7.6, 4.4)}


def of(losses, name, loss):
    """f64[n]: a loss of schedule `name`, or of the shares as a mixture, over seeds."""
    return np.array([loss_of(one[name], loss, BASE, np.array(list(BASE.values()))) for one in losses])


def ratio(gains, most):
    """(mean of gains f64[n] over mean of `most` f64[n], its 95 % interval over paired seeds by
    linear propagation).
    """
    gains, most = np.asarray(gains), np.asarray(most)
    found = gains.mean() / most.mean()
    error = (gains - found * most).std(ddof=1) / math.sqrt(len(gains)) / abs(most.mean())
    return float(found), float(intervals.student(len(gains) - 1) * error)


def tried(losses, then, about):
    """Rows of what each schedule of the grid changes of the new target's loss, against the old
    plan.
    """
    base = of(losses, "old plan", then)
    return [
        {**about, "schedule": name, **change(of(losses, name, then), base)}
        for name in losses[0]
        if name != "old plan"
    ]


def recovered(losses, best, about):
    """Rows of part `target`: every loss under every schedule against the old plan; for the new
    target also the part of the best one's gain.
    """
    rows = []
    for name in losses[0]:
        for loss in LOSSES if name != "old plan" else ():
            base = of(losses, "old plan", loss)
            row = {**about, "schedule": name, "loss": loss, **change(of(losses, name, loss), base)}
            if loss == about["then"] and name != best:
                part = ratio(base - of(losses, name, loss), base - of(losses, best, loss))
                row |= dict(zip(("part", "part_interval"), part, strict=True))
            rows.append(row)
    return rows


def kept(losses, about):
    """Rows of part `length`: every loss against the constant mixture under the same rates; for the
    target also the part of the gain of the run that knew its length.
    """
    rows = []
    for name in ("changed", "known"):
        for loss in LOSSES:
            base, ours = of(losses, f"constant, {name}", loss), of(losses, name, loss)
            row = {**about, "schedule": name, "loss": loss, **change(ours, base)}
            if loss == "russian" and name == "changed":
                most = of(losses, "constant, known", loss) - of(losses, "known", loss)
                row |= dict(zip(("part", "part_interval"), ratio(base - ours, most), strict=True))
            rows.append(row)
    return rows


def written(folder, part, rows):
    """Write the table and the picture of a part; (text, files)."""
    from tabulate import tabulate

    path = folder / f"{part}.csv"
    tables.write_csv(path, rows)
    if part == "memory":
        return tabulate(rows, headers="keys", floatfmt=".3g"), [str(path)]
    picture = figures.save(
        folder / f"{part}.png", SHAPES[part], lambda figure: draw(figure, rows, "length" in rows[0])
    )
    return tabulate(_short(rows), headers="keys"), [str(path), picture]


def _place(row):
    """(setting of a panel, name of the schedule without the grid's)."""
    where = f"{row['length']:g} x steps" if "length" in row else f"{row['first']}, then {row['then']}"
    return where, row["schedule"].partition(":")[0]


def _short(rows):
    """A line for each setting and schedule."""
    lines = {}
    for row in rows:
        line = lines.setdefault((*_place(row), row["style"]), {"setting": _place(row)[0]})
        line |= {"style": row["style"], "schedule": row["schedule"]}
        line[row["loss"]] = f"{row['percent']:+.2f} ± {row['percent_interval']:.2f}"
        if "part" in row:
            line["part"] = f"{row['part']:.0%} ± {row['part_interval']:.0%}"
    return list(lines.values())


def draw(figure, rows, lengths):
    """Change of every loss, a row of panels for each setting, a column for each rate style."""
    settings = list(dict.fromkeys(_place(row)[0] for row in rows))
    styles = list(dict.fromkeys(row["style"] for row in rows))
    names = list(dict.fromkeys(_place(row)[1] for row in rows))
    panels = figure.subplots(len(settings), len(styles), sharex=True, sharey=True, squeeze=False)
    for line, setting in zip(panels, settings, strict=True):
        for panel, style in zip(line, styles, strict=True):
            for i, name in enumerate(names):
                here = [row for row in rows if (*_place(row), row["style"]) == (setting, name, style)]
                place = np.arange(len(here)) + 0.18 * (i - (len(names) - 1) / 2)
                values, errors = ([row[key] for row in here] for key in ("percent", "percent_interval"))
                look = {"color": figures.COLOURS[i], "marker": figures.MARKERS[i], "ms": 4, "ls": ""}
                panel.errorbar(place, values, errors, label=name, capsize=2, **look)
            panel.set_visible(any((_place(row)[0], row["style"]) == (setting, style) for row in rows))
            panel.axhline(0, color=figures.GREY, lw=0.8)
            panel.set_title(f"{setting}\n{style}", fontsize=8.5)
            panel.set_xticks(range(len(LOSSES)), LOSSES, rotation=30, ha="right", fontsize=7.5)
    base = "the constant mixture" if lengths else "the old plan"
    figure.supylabel(f"change of the final loss\nagainst {base} (%)", fontsize=9)
    known = {}
    for panel in panels.ravel():
        known |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    figure.legend(known.values(), known, loc="outside lower center", ncols=4, fontsize=8)
