"""Figures of `megatron-commute bilingual`, drawn from the rows of the tables alone."""

import numpy as np

from megatron_commute.experiments import bilingual_paper as paper
from megatron_commute.report.drawing import COLOURS, GREY, MARKERS, house_style


def signed_log(panel, axis, threshold):
    """A scale of `axis` ("x" or "y") that is logarithmic beyond +-threshold."""
    from matplotlib.ticker import NullLocator, SymmetricalLogLocator

    getattr(panel, f"set_{axis}scale")("symlog", linthresh=threshold)
    line = getattr(panel, f"{axis}axis")
    locator = SymmetricalLogLocator(base=10, linthresh=threshold)
    locator.set_params(numticks=6)
    line.set_major_locator(locator)
    line.set_minor_locator(NullLocator())
    line.set_major_formatter(lambda x, _: f"{x:g}".replace("-", "−"))


def save(path, size, plot):
    """Write one PNG; plot: (figure) -> None."""
    from matplotlib.figure import Figure

    with house_style():
        figure = Figure(figsize=size, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06)
        plot(figure)
        figure.savefig(path, metadata={"Software": None})
    return str(path)


def loss_plane(figure, found, effect_rows, settings, size, run):
    """The paper's figure 3 (4): held-out losses of both languages along the base run and after both
    orders of every strength, read at the window's end and after the common tail.
    """
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    steps, losses = paper.base_readings(found, run)
    first, second = settings.domains[:2]
    for panel, reading, title in zip(
        panels, ("end", "tail"), ("at the window's end", f"after {size.tail} common steps"), strict=True
    ):
        late = steps >= size.starts[0] + size.window
        panel.plot(
            losses[first][late],
            losses[second][late],
            color=COLOURS[0],
            marker=".",
            ms=3,
            lw=1,
            label="base run",
        )
        for i, start in enumerate(size.starts):
            _front(panel, found, effect_rows, settings, size, run, start, reading, MARKERS[i])
        panel.set_title(title)
        panel.set_xlabel(f"held-out loss, {first} (nats per token)")
    panels[0].set_ylabel(f"held-out loss, {second} (nats per token)")
    shown = {
        "ncols": 5,
        "fontsize": 7.5,
        "title": "both orders at three strengths, same budgets",
        "title_fontsize": 7.5,
    }
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", **shown)


def _front(panel, found, effect_rows, settings, size, run, start, reading, marker):
    """One iso-budget series: both orders at three strengths around the base of the same number of
    steps.
    """
    strengths = paper.RUNS[run][1]
    key = f"{run}/{start}/{max(strengths)}/"
    bases = [cell["base"][0 if reading == "end" else -1][1] for k, cell in found.items() if k.startswith(key)]
    if not bases:
        return
    x0, y0 = (np.mean([base[name] for base in bases]) for name in settings.domains[:2])
    rows = {
        (r["delta"], r["order"], r["target"]): r for r in effect_rows if (r["run"], r["step"]) == (run, start)
    }
    places = [(delta, "12") for delta in sorted(strengths, reverse=True)] + [(0, "")]
    places += [(delta, "21") for delta in strengths]
    x, y, ex, ey = [], [], [], []
    for delta, order in places:
        for values, errors, origin, name in (
            (x, ex, x0, settings.domains[0]),
            (y, ey, y0, settings.domains[1]),
        ):
            row = rows.get((delta, order, name))
            values.append(origin + (row[reading] if row else 0.0))
            errors.append(row[f"{reading}_se"] if row else 0.0)
    label = f"from step {start}"
    panel.errorbar(
        x, y, np.nan_to_num(ey), np.nan_to_num(ex), color=COLOURS[1], marker=marker, ms=4, lw=1, label=label
    )
    panel.annotate("12", (x[0], y[0]), textcoords="offset points", xytext=(3, 3), fontsize=7, color=GREY)


def effects(figure, effect_rows, settings, size, run):
    """Half difference of the orders against the strength, per target: at the window's end and after
    the tail.
    """
    names = [*settings.domains, "mixture"]
    panels = figure.subplots(1, len(names), sharey=True)
    strongest = max(paper.RUNS[run][1])
    for panel, name in zip(panels, names, strict=True):
        for offset, reading, colour in ((-0.12, "end", COLOURS[0]), (0.12, "tail", COLOURS[1])):
            both = {}
            for row in effect_rows:
                if (row["run"], row["delta"], row["target"]) == (run, strongest, name):
                    both.setdefault(row["step"], {})[row["order"]] = row
            values = [(b["12"][reading] - b["21"][reading]) / 2 for b in both.values()]
            errors = [np.hypot(b["12"][f"{reading}_se"], b["21"][f"{reading}_se"]) / 2 for b in both.values()]
            place = np.arange(len(values)) + offset
            label = "at the window's end" if reading == "end" else f"after {size.tail} common steps"
            panel.errorbar(
                place, values, errors, fmt="o" if reading == "end" else "s", ms=4, color=colour, label=label
            )
        panel.axhline(0, color=GREY, lw=0.8)
        panel.set_xticks(range(len(both)), [str(step) for step in both])
        panel.set_title(name)
        panel.set_xlabel("step at which the window begins")
    panels[0].set_ylabel("(L after 12 − L after 21) / 2, nats")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
