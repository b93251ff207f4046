"""Pictures of a design: influences, the schedule, its proof and what it costs. The lines of
design.jsonl are all that they are drawn from.
"""

from __future__ import annotations

import numpy as np

from megatron_commute.report import series
from megatron_commute.report.drawing import COLOURS, GREY, MARKERS, WIDTH, Picture, legend, line, percent

SHOWN = 4  # losses at most whose influences are drawn, the target's own first


def pictures(events):
    """Every Picture of a design. events: {event: [lines]} of its record."""
    asked, found = events["design"][0], events.get("influences", [None])[0]
    drawn = []
    if found:
        drawn.append(_influences(asked, found, events.get("road", [])))
    outcome = events["outcome"][-1]
    if outcome["schedule"]:
        drawn.append(_schedule(asked, outcome["schedule"]))
    proofs = events.get("proof", [])
    if proofs:
        drawn.append(_effects(asked, proofs[-1]))
    if events.get("road"):
        drawn.append(_trade(asked, events["road"], proofs))
    return drawn


def _figure(rows, height):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    figure.get_layout_engine().set(w_pad=0.07)
    return figure, panels


def _influences(asked, found, roads):
    values, names = np.array(found["values"]), asked["names"]
    steps = asked["proxy"]["steps"]
    of_target = np.tensordot(np.array(asked["target"]), values[: len(names)], 1)
    shown, alone = [("the target", of_target)], asked["target"].count(0) == len(names) - 1
    for j, (loss, own) in enumerate(zip(asked["losses"], values, strict=True)):
        if not (alone and j < len(names) and asked["target"][j]):  # that is the target itself
            shown.append((loss, own))
    shown = shown[:SHOWN]
    figure, panels = _figure(len(shown) + 1, 1.5)
    at = (np.arange(values.shape[1]) + 0.5) / values.shape[1]
    for axes, (loss, own) in zip(panels, shown, strict=False):
        helped = -own * steps  # as if the weight were raised all along
        mean = helped @ np.array(asked["shares"])
        for k in range(len(names)):
            style = line(k) | {"marker": "none"}
            axes.plot(at, helped[:, k] - mean, **style)
        axes.axhline(0, color=GREY, linewidth=0.8)
        axes.axvspan(0, found["reached"] / steps, color=GREY, alpha=0.15, linewidth=0)
        axes.set_ylabel(f"gain of {loss}\n(nats per unit\nof weight)", fontsize=8)
    flow = next((road["road"] for road in roads if road["road"]["name"] == "flow"), None)
    if flow:
        pattern, edges = np.array(flow["pattern"]), np.array(flow["edges"])
        k = int(np.argmax(np.abs(pattern).max(0)))
        own = -of_target[:, k] * steps + of_target @ np.array(asked["shares"]) * steps
        p = pattern[:, k] / pattern[:, k].max() * np.nanmax(own)
        panels[0].step(edges, np.append(p, p[-1]), where="post", color="black", linewidth=1, linestyle=":")
    rate = np.array(asked["rates"]["rate"])
    factor, power = series.power_of_ten(rate)
    panels[-1].plot(asked["rates"]["at"], rate / factor, color="black")
    panels[-1].set_ylabel(f"learning rate\n({power or '1'})", fontsize=8)
    panels[-1].set_ylim(0, None)
    panels[-1].set_xlabel("part of the run")
    legend(figure, names)
    caption = (
        "Gain of a final loss from one more unit of weight on a domain at that point of the run, above the "
        "mixture's: the exact derivative through every later step of the proxy. Grey: not differentiated, "
        "the mean of what follows stands there. Dotted: law flow's profile, fitted to its own domain."
    )
    return Picture(name="influences", title="Where samples count", caption=caption, figure=figure)


def _schedule(asked, changes):
    figure, (axes,) = _figure(1, 2.7)
    at = np.array([sample for sample, _ in changes] + [asked["samples"]]) / asked["samples"]
    weights = np.array([w for _, w in changes])
    for k in range(len(asked["names"])):
        axes.step(at, np.append(weights[:, k], weights[-1, k]), where="post", **line(k))
        axes.axhline(asked["shares"][k], color=COLOURS[k % len(COLOURS)], linewidth=0.7, linestyle=":")
    axes.set_ylim(0, None)
    axes.set_xlim(0, 1)
    axes.yaxis.set_major_formatter(percent)
    axes.set_ylabel("weight\n(% of samples)")
    axes.set_xlabel("part of the run")
    legend(figure, asked["names"])
    caption = "The schedule of the run, budgets and bounds exact. Dotted: the constant mixture."
    return Picture(name="schedule", title="The schedule beside the mixture", caption=caption, figure=figure)


def _effects(asked, proof):
    changes = proof["looks"][-1]["changes"]
    figure, (axes,) = _figure(1, 0.5 + 0.32 * len(changes))
    for row, change in enumerate(reversed(changes)):
        colour = COLOURS[0] if change["name"] == "target" else "black"
        style = {"color": colour, "marker": MARKERS[0], "ms": 4, "capsize": 2}
        axes.errorbar(change["percent"], row, xerr=change["percent_interval"], **style)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_yticks(range(len(changes)), [change["name"] for change in reversed(changes)])
    axes.set_xlabel("change of the final loss (%)")
    seeds = proof["looks"][-1]["seeds"]
    caption = (
        f"Against the constant mixture, {seeds} fresh pairs of seeds, on held-out text that planned nothing; "
        f"bars: 95 % intervals, whose error all {len(asked['looks'])} looks share."
    )
    return Picture(
        name="effects", title="What the schedule changes on fresh seeds", caption=caption, figure=figure
    )


def _trade(asked, roads, proofs):
    figure, panels = _figure(2, 1.9)
    for i, entry in enumerate(roads):
        name = "flow, fitted" if entry["road"]["name"] == "flow" else "free segments"
        base = np.array(entry["target"]), 100 * np.array(entry["domains"]).max(1)
        style = {"color": COLOURS[i], "linestyle": ("-", "--")[i % 2]}
        panels[0].plot(entry["strengths"], base[0], label=name, **style)
        panels[1].plot(entry["strengths"], base[1], **style)
        if entry["chosen"]:
            for axes in panels:
                axes.axvline(entry["strength"], color=COLOURS[i], linewidth=0.7, linestyle=":")
    for proof in proofs:
        changes = proof["looks"][-1]["changes"]
        style = {"color": "black", "marker": "o", "ms": 4, "capsize": 2, "linestyle": "none"}
        panels[0].errorbar(proof["strength"], changes[0]["change"], yerr=changes[0]["interval"], **style)
        others = changes[1 : 1 + len(asked["names"])]
        worst = max(others, key=lambda change: change["percent"])
        panels[1].errorbar(proof["strength"], worst["percent"], yerr=worst["percent_interval"], **style)
    panels[1].axhline(100 * asked["harm"], color=GREY, linewidth=0.8, linestyle="--")
    for axes in panels:
        axes.axhline(0, color=GREY, linewidth=0.8)
    panels[0].set_ylabel("change of the\ntarget (nats)")
    panels[1].set_ylabel("worst domain (%)")
    panels[1].set_xlabel("strength (greatest move of a logarithm of weight)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    caption = (
        "Lines: through the constant mixture and the strengths tried of each road, on the recorded seed. "
        "Points: proofs on fresh seeds, 95 % intervals. Dashed: the harm that is allowed. Dotted: the "
        "strength chosen."
    )
    return Picture(name="trade", title="Strength: gain against harm", caption=caption, figure=figure)
