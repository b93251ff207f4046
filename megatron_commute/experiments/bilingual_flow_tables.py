"""Tables and pictures of study `flow`: change of every final loss against the constant mixture of
the same seed.
"""

import math

import numpy as np

from megatron_commute import intervals
from megatron_commute.experiments import bilingual_figures as figures
from megatron_commute.experiments import bilingual_tables as tables

AXES = {
    "memory": "memory c",
    "kept": "first steps at the planned mixture",
    "strength": "strength",
    "length": "steps of the run",
    "target": "target",
    "shares": "setting",
    "epochs": "epochs of Russian",
    "rate": "peak learning rate",
    "domains": "domains",
    "size": "parameters",
}
TICKS = {"base": {"rate": "1e-3", "domains": "K = 3", "size": "0.08M"}}
LINEAR = 5.0  # percent, beyond which the main picture is logarithmic
LOGARITHMIC = ("memory", "kept", "length")


def loss_of(losses, name, shares, target):
    """A loss from {domain: loss}: "target" (weights f64[K] over the shares), "mixture", "even",
    "untrained", or a domain, whose pieces NAME:1/2 count alike.
    """
    trained = [losses[domain] for domain in shares]
    if name in ("target", "mixture", "even"):
        weights = {"target": target, "mixture": list(shares.values())}.get(name, np.ones(len(trained)))
        return float(np.dot(weights, trained) / np.sum(weights))
    if name == "untrained":
        return float(np.mean([loss for domain, loss in losses.items() if domain not in shares]))
    return float(np.mean([loss for domain, loss in losses.items() if domain.partition(":")[0] == name]))


def names_of(losses, shares):
    """Losses of a table, in its order."""
    domains = dict.fromkeys(domain.partition(":")[0] for domain in losses)
    rest = ("untrained",) if len(losses) > len(shares) else ()
    return ("target", *domains, "mixture", "even", *rest)


def rows(found, cases):
    """One row for each case and loss with at least two pairs of seeds: percent of the constant
    mixture's final loss, with its 95 % interval over the pairs, and the one-sided probability of so
    high a change where there is no harm.
    """
    result = []
    for case in cases:
        shares, target = case.shares, case.weights
        keys = [(case.key(seed), case.base.key(seed)) for seed in case.seeds]
        pairs = [[found[key]["losses"] for key in both] for both in keys if all(key in found for key in both)]
        if len(pairs) < 2:
            continue
        for name in names_of(pairs[0][0], shares):
            ours, base = np.array(
                [[loss_of(losses, name, shares, target) for losses in pair] for pair in pairs]
            ).T
            about = {"question": case.question, "x": case.x, "variant": case.variant, "style": case.style}
            about |= {"steps": case.steps, "schedule": case.schedule, "target": case.target, "loss": name}
            result.append({**about, **change(ours, base)})
    return result


def change(ours, base):
    """Paired change f64[n] against f64[n]: mean, 95 % interval, both also in percent, and P(as high
    | no harm).
    """
    from scipy.special import stdtr

    n, moved = len(ours), np.asarray(ours) - np.asarray(base)
    error = moved.std(ddof=1) / math.sqrt(n)
    interval, mean = intervals.student(n - 1) * error, float(np.mean(base))
    worse = 1.0 if error == 0 else float(1 - stdtr(n - 1, moved.mean() / error))
    told = {"seeds": n, "constant": mean, "change": float(moved.mean()), "interval": float(interval)}
    told |= {"percent": 100 * told["change"] / mean, "percent_interval": 100 * told["interval"] / mean}
    return {**told, "worse": worse}


def holm(chances):
    """Probabilities f64[n], adjusted so that those below 5 % are wrong together in at most 5 %
    (Holm 1979).
    """
    order = np.argsort(chances)
    raised = np.asarray(chances)[order] * np.arange(len(order), 0, -1)
    result = np.empty(len(order))
    result[order] = np.minimum(1.0, np.maximum.accumulate(raised))
    return result


def judged(all_rows):
    """Is any target worse than constant? One row for each style and target of law flow, Holm over
    all of them.
    """
    asked = {"flow, low-resource": ("target", "handbook_russian"), "flow, even": ("target", "untrained")}
    chosen = [row for row in all_rows if row["loss"] in asked.get(row["schedule"], ())]
    keys = ("style", "schedule", "loss", "seeds", "percent", "percent_interval", "worse")
    adjusted = holm([row["worse"] for row in chosen]) if chosen else []
    return [{**{k: row[k] for k in keys}, "holm": float(p)} for row, p in zip(chosen, adjusted, strict=True)]


def short(all_rows):
    """A line for each case: target, the worst of the trained domains outside it, mixture and even,
    in percent.
    """
    lines = {}
    for row in all_rows:
        place = (row["question"], row["x"], row["style"], row["steps"], row["schedule"], row["target"])
        line = lines.setdefault(place, dict(zip(("question", "x", "style", "steps"), place, strict=False)))
        line |= {"schedule": row["schedule"], "to": row["target"], "seeds": row["seeds"]}
        line[row["loss"]] = f"{row['percent']:+.2f} ± {row['percent_interval']:.2f}"
    return list(lines.values())


def written(folder, part, found, cases):
    """Write the table and the pictures of a part; (text, files)."""
    from tabulate import tabulate

    all_rows = rows(found, cases)
    path = folder / f"{part}.csv"
    tables.write_csv(path, all_rows)
    text, files = tabulate(short(all_rows), headers="keys"), [str(path)]
    if part == "main":
        verdicts = judged(all_rows)
        tables.write_csv(folder / "verdicts.csv", verdicts)
        text += "\n\n" + tabulate(verdicts, headers="keys", floatfmt=".3g")
        picture = figures.save(folder / "main.png", (8.6, 6.4), lambda figure: draw_main(figure, all_rows))
        return text, [*files, str(folder / "verdicts.csv"), picture]
    for question in dict.fromkeys(row["question"] for row in all_rows):
        here = [row for row in all_rows if row["question"] == question]
        styles = list(dict.fromkeys(row["style"] for row in here))
        picture = folder / (f"{part}.png" if question == part else f"{part}_{question}.png")
        size = (2.2 + 2.1 * len(styles), 3.6)
        files.append(figures.save(picture, size, lambda figure, h=here, s=styles: draw_curves(figure, h, s)))
    return text, files


def draw_main(figure, all_rows):
    """Change of every final loss under every schedule, a panel for each style."""
    schedules = list(dict.fromkeys(row["schedule"] for row in all_rows))
    names = [name for name in dict.fromkeys(row["loss"] for row in all_rows) if name not in ("target",)]
    styles = list(dict.fromkeys(row["style"] for row in all_rows))
    panels = figure.subplots(len(styles), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for panel, style in zip(panels, styles, strict=True):
        for i, schedule in enumerate(schedules):
            here = {r["loss"]: r for r in all_rows if (r["style"], r["schedule"]) == (style, schedule)}
            if here:
                place = np.arange(len(names)) + 0.1 * (i - (len(schedules) - 1) / 2)
                _points(panel, place, [here[name] for name in names], i, schedule, "")
        panel.axhline(0, color=figures.GREY, lw=0.8)
        if max(abs(row["percent"]) for row in all_rows) > LINEAR:
            panel.set_yscale("symlog", linthresh=LINEAR)
            panel.set_yticks([-LINEAR, 0, LINEAR, 4 * LINEAR, 16 * LINEAR])
            panel.yaxis.set_major_formatter(lambda y, _: f"{y:g}".replace("-", "−"))
            panel.minorticks_off()
        panel.set_title(f"learning rate: {style}")
    figure.supylabel("change of the final loss against the constant mixture (%)", fontsize=9.5)
    panels[-1].set_xticks(range(len(names)), [name.replace("_", "\n") for name in names])
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7.5)


def _points(panel, place, chosen, i, label, line):
    values, errors = ([row[key] for row in chosen] for key in ("percent", "percent_interval"))
    style = {"color": figures.COLOURS[i % 8], "marker": figures.MARKERS[i % 8], "ms": 4, "lw": 1, "ls": line}
    panel.errorbar(place, values, errors, label=label, capsize=2, **style)


def draw_curves(figure, chosen, styles):
    """The question's change of every loss against x, a panel for each style; other schedules beside
    each other.
    """
    question = chosen[0]["question"]
    names = [
        name for name in dict.fromkeys(row["loss"] for row in chosen) if name not in ("even", "untrained")
    ]
    if not any(row["variant"] != "base" or row["target"] != "low-resource" for row in chosen):
        names.remove("target")
    panels = figure.subplots(1, len(styles), sharey=True, squeeze=False)[0]
    for panel, style in zip(panels, styles, strict=True):
        here = [row for row in chosen if row["style"] == style]
        several = len({(row["x"], row["schedule"]) for row in here}) > len({row["x"] for row in here})
        ticks = list(dict.fromkeys((row["x"], row["schedule"] if several else "") for row in here))
        number = question in LOGARITHMIC or question == "strength"
        places = [x for x, _ in ticks] if number else np.arange(len(ticks))
        for i, name in enumerate(names):
            points = {(r["x"], r["schedule"] if several else ""): r for r in here if r["loss"] == name}
            known = [(at, points[tick]) for at, tick in zip(places, ticks, strict=True) if tick in points]
            shift = (i - (len(names) - 1) / 2) * 0.02
            if known:
                at = [p * (1 + shift) if number else p + 4 * shift for p, _ in known]
                _points(panel, at, [row for _, row in known], i, name, "-" if number else "")
        panel.axhline(0, color=figures.GREY, lw=0.8)
        if question in LOGARITHMIC:
            panel.set_xscale("log")
            panel.minorticks_off()
        words = [TICKS.get(x, {}).get(question, f"{x:g}" if number else x) for x, _ in ticks]
        words = [f"{word}\n{told}" if told else word for word, (_, told) in zip(words, ticks, strict=True)]
        turned = {} if number else {"rotation": 30, "ha": "right", "fontsize": 7.5}
        panel.set_xticks(places, words, **turned)
        panel.set(xlabel=AXES[question], title=f"learning rate: {style}")
    panels[0].set_ylabel("change of the final loss (%)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7.5)
