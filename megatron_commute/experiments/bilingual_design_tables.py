"""Tables and pictures of study `design`."""

import numpy as np

from megatron_commute.experiments import bilingual_figures as figures
from megatron_commute.experiments import bilingual_tables as tables

SHOWN = {"target": "Russian", "english": "English", "code": "code", "mixture": "mixture"}  # losses
DOMAINS = {"english": "English", "russian": "Russian", "code": "code", "mixture": "mixture"}


def written(folder, part, rows):
    """Write the table and the picture of a part; (text, files)."""
    from tabulate import tabulate

    path = folder / f"{part}.csv"
    tables.write_csv(path, rows)
    files, text = [str(path)], tabulate(short(rows), headers="keys", floatfmt=".3g")
    if part == "curvature":
        files.append(figures.save(folder / "curvature.png", (6.4, 3.2), lambda f: draw_curvature(f, rows)))
    elif part == "memory":
        files.append(figures.save(folder / "memory.png", (6.4, 3.2), lambda f: draw_memory(f, rows)))
    elif part not in ("folding", "criterion", "halves"):
        shown, height = (DOMAINS, 4.6) if part == "targets" else (SHOWN, 3.6)
        size = 7.4, height
        files.append(figures.save(folder / f"{part}.png", size, lambda f: draw_changes(f, rows, shown)))
    return text, files


def short(rows):
    """A line for each schedule, changes in percent; rows without changes as they are."""
    if not rows or "percent" not in rows[0]:
        return rows
    lines = {}
    for row in rows:
        line = lines.setdefault((row["x"], row["style"], row["schedule"], row.get("against")), {})
        line |= {key: row[key] for key in ("x", "style", "schedule", "against", "peak") if key in row}
        line[row["name"]] = f"{row['percent']:+.2f} ± {row['percent_interval']:.2f}"
    return list(lines.values())


def draw_changes(figure, rows, shown):
    """Change of the losses `shown` {name: label}, a panel for each rate schedule."""
    rows = [row for row in rows if row.get("against") in (None, "constant")]
    styles = list(dict.fromkeys(row["style"] for row in rows))
    panels = figure.subplots(1, len(styles), sharey=True, squeeze=False)[0]
    for panel, style in zip(panels, styles, strict=True):
        here = [row for row in rows if row["style"] == style]
        places = list(dict.fromkeys((row["x"], row["schedule"]) for row in here))
        for i, (name, label) in enumerate(shown.items()):
            own = {(row["x"], row["schedule"]): row for row in here if row["name"] == name}
            at = np.arange(len(places)) + 0.12 * (i - 1.5)
            values = [own[place]["percent"] for place in places]
            errors = [own[place]["percent_interval"] for place in places]
            about = {
                "color": figures.COLOURS[i],
                "marker": figures.MARKERS[i],
                "ms": 4,
                "ls": "",
                "capsize": 2,
            }
            panel.errorbar(at, values, errors, label=label, **about)
        several = len({x for x, _ in places}) > 1
        many = len(places) > 5
        words = [(", " if many else "\n").join(place if several else place[1:]) for place in places]
        turned = {"rotation": 90} if many else {"rotation": 30, "ha": "right"}
        panel.set_xticks(range(len(places)), words, fontsize=7.5, **turned)
        panel.axhline(0, color=figures.GREY, lw=0.8)
        panel.set_title(f"learning rate: {style}")
    panels[0].set_ylabel("change of the final loss (%)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7.5)


def draw_memory(figure, rows):
    """Memory that fits the influences best, in every setting."""
    places = list(dict.fromkeys(row["x"] for row in rows))
    styles = list(dict.fromkeys(row["style"] for row in rows))
    panel = figure.subplots()
    for i, style in enumerate(styles):
        here = [row for row in rows if row["style"] == style]
        at = [places.index(row["x"]) + 0.12 * (i - 1) for row in here]
        about = {"color": figures.COLOURS[i], "marker": figures.MARKERS[i], "ms": 4, "ls": ""}
        panel.plot(at, [row["memory"] for row in here], label=style, **about)
    panel.axhline(2.5, color=figures.GREY, lw=0.8, ls="--")
    panel.set_xticks(range(len(places)), places, rotation=20, ha="right", fontsize=7.5)
    panel.set_ylabel("fitted memory c")
    figure.legend(loc="outside lower center", ncols=3, fontsize=7.5)


def draw_curvature(figure, rows):
    """Memory that the curvature along each gradient tells, against the fitted one."""
    panel = figure.subplots()
    names = list(dict.fromkeys(row["along"] for row in rows))
    for i, name in enumerate(names):
        here = [row for row in rows if row["along"] == name]
        at = [row["fitted"] * (1 + 0.03 * i) for row in here]
        middle = [row["measured"] for row in here]
        bars = [[m - row["least"] for m, row in zip(middle, here, strict=True)]]
        bars.append([row["greatest"] - m for m, row in zip(middle, here, strict=True)])
        about = {"color": figures.COLOURS[i], "marker": figures.MARKERS[i], "ms": 4, "ls": "", "capsize": 2}
        panel.errorbar(at, middle, bars, label=f"along {name}", **about)
    panel.set_yscale("symlog", linthresh=1.0)
    panel.set_xlabel("memory that fits the influences")
    panel.set_ylabel("memory by curvature\n(median and range over the run)")
    figure.legend(loc="outside lower center", ncols=4, fontsize=7.5)
