"""Study `end-to-end`: final losses under equal budgets when different schedules decide when each
domain is used.

Three domains with budgets in shares .6, .1 and .3. Every schedule serves the same samples through
the product's own Mixture, exactly; only the order differs, so `proportional` and the mean weights
of any trajectory ARE the constant mixture. Seeds are paired: a seed fixes the start and what each
domain delivers.
"""

import dataclasses
import math

import numpy as np

from megatron_commute import intervals
from megatron_commute.design import cells
from megatron_commute.experiments import bilingual_figures as figures
from megatron_commute.experiments import bilingual_tables as tables
from megatron_commute.experiments.bilingual_schedules import Decider
from megatron_commute.experiments.bilingual_trainer import Text, Trainer
from megatron_commute.mixture import Mixture

DOMAINS, SHARES = ("english", "russian", "code"), (0.6, 0.1, 0.3)
LOW = int(np.argmin(SHARES))
SCHEDULES = ("constant", "low-resource-last", "tau-tail", "odm", "tilt")
SETTINGS = {"constant rate": {}, "cosine": {"optimizer": "adamw", "decay": "cosine", "weight_decay": 0.1}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """How large the study is."""

    steps: int = 1000
    # of a run
    every: int = 50
    # steps between decisions
    end: int = 200
    # last steps, in which low-resource-last spends the rest of the budget
    seeds: int = 5
    # paired


QUICK = Size(steps=40, every=4, end=8, seeds=2)


def study(settings, folder, quick, processes, say):
    """Run what is missing, write end_to_end.csv (a row for each schedule and loss) and
    final_losses.png; (text, files).
    """
    size, found = QUICK if quick else Size(), {}
    for name, changes in SETTINGS.items():
        own = dataclasses.replace(settings, domains=DOMAINS, others=(), steps=size.steps, batch=30, **changes)
        jobs = [
            (
                f"{name}/{schedule}/{seed}",
                run,
                {"rate": name, "schedule": schedule, "seed": seed, "quick": quick},
            )
            for seed in range(1, size.seeds + 1)
            for schedule in SCHEDULES
        ]
        found = cells.fill(
            folder,
            own,
            jobs,
            processes,
            lambda cell: say(f"{cell['key']}: {cell['timing']['seconds']:.0f} s"),
        )
    rows = summary(found, size)
    tables.write_csv(folder / "end_to_end.csv", rows)
    picture = figures.save(folder / "final_losses.png", (7.6, 4.6), lambda figure: draw(figure, rows))
    weights = figures.save(
        folder / "weights.png", (7.6, 3.0), lambda figure: draw_weights(figure, found, size)
    )
    from tabulate import tabulate

    shown = [{k: v for k, v in row.items() if k != "constant"} for row in rows]
    return tabulate(shown, headers="keys", floatfmt=".3g"), [str(folder / "end_to_end.csv"), picture, weights]


def run(settings, folder, rate, schedule, seed, quick):
    """One run: {"losses": final held-out loss by domain, "weights": [[step, w]], "served"}."""
    size = QUICK if quick else Size()
    trainer = Trainer(settings, Text(settings), seed=seed)
    samples = size.steps * settings.batch
    budgets = [round(samples * share) for share in SHARES]
    mixture = Mixture(np.array(SHARES), budgets, samples=samples)
    decide = Decider(size=size, schedule=schedule, trainer=trainer, mixture=mixture, shares=SHARES)
    weights = []
    for step in range(size.steps):
        if step % size.every == 0:
            decide(step)
            weights.append([step, np.asarray(mixture.weights).tolist()])
        domains, _ = mixture.take(settings.batch)
        trainer.step(None, np.bincount(domains, minlength=3))
    assert mixture.served.tolist() == budgets
    return {"losses": trainer.losses(), "weights": weights, "served": budgets}


def summary(found, size):
    """One row for each rate, schedule and loss: change against the constant mixture, 95 % interval
    over paired seeds.
    """
    rows, spread = [], intervals.student(size.seeds - 1) / math.sqrt(size.seeds)
    for rate in SETTINGS:
        for schedule in SCHEDULES:
            pairs = [
                (found.get(f"{rate}/{schedule}/{seed}"), found.get(f"{rate}/constant/{seed}"))
                for seed in range(1, size.seeds + 1)
            ]
            if any(None in pair for pair in pairs):
                continue
            for name in (*DOMAINS, "mixture", "even"):
                ours, base = (
                    [_loss(cell["losses"], name) for cell in column] for column in zip(*pairs, strict=True)
                )
                change = np.array(ours) - np.array(base)
                rows.append(
                    {
                        "rate": rate,
                        "schedule": schedule,
                        "loss": name,
                        "constant": float(np.mean(base)),
                        "change": float(change.mean()),
                        "interval": float(spread * change.std(ddof=1)),
                        "percent": float(100 * change.mean() / np.mean(base)),
                    }
                )
    return rows


def _loss(losses, name):
    if name in losses:
        return losses[name]
    shares = SHARES if name == "mixture" else np.full(len(SHARES), 1 / len(SHARES))
    return sum(share * losses[domain] for share, domain in zip(shares, DOMAINS, strict=True))


def draw(figure, rows):
    """Change of each final loss against the constant mixture, with 95 % intervals over paired
    seeds.
    """
    names, others = (*DOMAINS, "mixture", "even"), SCHEDULES[1:]
    panels = figure.subplots(len(SETTINGS), 1, sharex=True)
    for panel, rate in zip(panels, SETTINGS, strict=True):
        for i, schedule in enumerate(others):
            here = {row["loss"]: row for row in rows if (row["rate"], row["schedule"]) == (rate, schedule)}
            if here:
                place = np.arange(len(names)) + 0.13 * (i - (len(others) - 1) / 2)
                values, errors = ([here[name][key] for name in names] for key in ("change", "interval"))
                style = {"color": figures.COLOURS[i], "marker": figures.MARKERS[i]}
                panel.errorbar(place, values, errors, ls="", ms=4, label=schedule, **style)
        panel.axhline(0, color=figures.GREY, lw=0.8)
        figures.signed_log(panel, "y", 0.01)
        panel.margins(y=0.08)
        panel.set_title(f"AdamW, {rate}" if rate == "cosine" else f"Adam, {rate}")
        panel.set_ylabel("change of final loss (nats)")
    panels[-1].set_xticks(range(len(names)), [*DOMAINS, "mixture .6 .1 .3", "even mixture"])
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=7.5)


def draw_weights(figure, found, size):
    """Weight of the low-resource domain along the first seed of every schedule."""
    panel = figure.subplots()
    for i, schedule in enumerate(SCHEDULES):
        cell = found.get(f"constant rate/{schedule}/1")
        if cell:
            steps, weights = [step for step, _ in cell["weights"]], [w[LOW] for _, w in cell["weights"]]
            colour = figures.COLOURS[(i - 1) % len(figures.COLOURS)] if i else figures.GREY
            panel.step(
                [*steps, size.steps],
                [*weights, weights[-1]],
                where="post",
                color=colour,
                lw=1.2,
                label=schedule,
            )
    panel.set(xlabel="step", ylabel=f"weight of {DOMAINS[LOW]}", title="first seed, Adam, constant rate")
    figure.legend(loc="outside right center", fontsize=7.5)
