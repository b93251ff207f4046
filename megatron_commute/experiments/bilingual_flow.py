"""Study `flow`: what schedules that follow the learning rate change at equal budgets.

Every run serves its budgets exactly through the product's own Mixture; seeds are paired with the
constant mixture, which sees the same start and the same sequences of every domain. Seeds and
sequences that choose are not those that report.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import numpy as np
import torch

from megatron_commute.decide import flow
from megatron_commute.design import cells
from megatron_commute.experiments import bilingual_flow_tables as tables
from megatron_commute.experiments.bilingual_flow_variants import UNTRAINED_TEXT, VARIANTS
from megatron_commute.experiments.bilingual_schedules import Decider, Pace, changes
from megatron_commute.experiments.bilingual_tables import refuse_unknown_parts, write_csv
from megatron_commute.experiments.bilingual_trainer import Text, Trainer
from megatron_commute.mixture import Mixture
from megatron_commute.settings.rates import RateSchedule, rates

BATCH, JUDGED = 30, 768  # sequences of a step; of every domain at most, on which a reported run is judged
STYLES = ("WSD", "cosine", "constant", "linear")
TWO, THREE = STYLES[:2], STYLES[:3]
LAWS = ("late", "tau-tail", "tilt", "odm")
MEMORIES, STRENGTHS = (1.0, 2.5, 5.0, 10.0), (0.25, 0.5, 1.0)
WINDOWS = ((0.6, 0.9, 3.0), (0.7, 1.0, 3.3), (0.3, 0.7, 2.0))  # begin, end, times its share
FIRST_CHOOSING = 101  # seeds from here on choose, smaller ones report


@dataclasses.dataclass(frozen=True)
class Size:
    """How much of the study is run."""

    parts: tuple = (
        "strength",
        "target",
        "shares",
        "constants",
        "main",
        "length",
        "longer-constants",
        "epochs",
        "rate",
        "domains",
        "size",
    )
    # of the study, in their order
    steps: int = 500
    # of a run
    middle: int = 2000
    # steps of the longer runs that choose
    lengths: tuple = (500, 1000, 2000, 4000, 8000)
    # steps of the runs of part `length`
    long: int = 4000
    # lengths from here on have `few` seeds
    seeds: int = 6
    # paired, that report
    few: int = 3
    # paired, that report on long runs
    choosing: int = 3
    # paired, that choose


QUICK = Size(steps=20, middle=40, lengths=(20, 40), long=40, seeds=2, few=2, choosing=2)


class Case(NamedTuple):
    """One schedule in one setting over its seeds: the point at x of a question's curve."""

    question: str
    x: float | str
    style: str
    schedule: str
    seeds: tuple
    steps: int
    kind: str = "constant"
    options: tuple = ()
    target: str = "low-resource"
    variant: str = "base"

    def key(self, seed):
        told = " ".join(f"{name}={value}" for name, value in self.options)
        return "/".join([self.variant, self.style, str(self.steps), f"{self.kind} {told}".strip(), str(seed)])

    def job(self, seed):
        arguments = {"variant": self.variant, "style": self.style, "steps": self.steps, "kind": self.kind}
        return self.key(seed), run, {**arguments, "options": dict(self.options), "seed": seed}

    @property
    def base(self):
        """The constant mixture in its place."""
        return self._replace(kind="constant", options=(), schedule="constant")

    @property
    def shares(self):
        """Of the samples, by trained domain."""
        return VARIANTS[self.variant].shares

    @property
    def weights(self):
        """Target f64[K] over the trained domains: the low-resource one, "even", or one by name."""
        wanted = VARIANTS[self.variant].target if self.target == "low-resource" else {self.target: 1.0}
        wanted = dict.fromkeys(self.shares, 1.0) if self.target == "even" else wanted
        total = math.fsum(wanted.values())
        return np.array([wanted.get(domain, 0.0) / total for domain in self.shares])


def flowing(case, schedule="flow", *, strength=1.0, memory=None, kept=None, rule=flow.ranges):
    """`case` with law flow, constants written out: a cell outlives a change of defaults.

    rule: (target, shares, strength) -> ranges f64[K].
    """
    reach = rule(case.weights, np.array(list(case.shares.values())), strength)
    reach = [round(float(r), 6) for r in reach - reach.min()]
    kept = flow.kept_steps(case.steps) if kept is None else kept
    options = {"ranges": reach, "memory": flow.MEMORY if memory is None else memory, "kept": kept}
    return case._replace(schedule=schedule, kind="flow", options=tuple(options.items()))


def logarithmic(target, shares, strength):
    """Another rule for ranges: by log(1 + the target's share over the domain's)."""
    return strength * flow.RANGE * np.log1p(target / shares) / math.log1p(flow.RATIO)


def rate_of(style, steps, peak):
    """Megatron's flags: warm-up over a twentieth, least rate a tenth, WSD decay of a fifth."""
    decay = max(1, steps // 5) if style == "WSD" else None
    flags = {"lr": peak, "min_lr": peak / 10, "train_iters": steps, "lr_warmup_iters": steps // 20}
    return RateSchedule(**flags, lr_decay_style=style, lr_wsd_decay_iters=decay)


def run(settings, folder, variant, style, steps, kind, options, seed):
    """One run: {"losses": final by domain, "served", "told": [[step, share of the least one]]}."""
    chosen = VARIANTS[variant]
    domains, shares = tuple(chosen.shares), np.array(list(chosen.shares.values()))
    others = tuple(name for name in UNTRAINED_TEXT if name not in domains)
    own = {"domains": domains, "others": others, "batch": BATCH, "optimizer": "adamw", "weight_decay": 0.1}
    own = dataclasses.replace(settings, **own, **chosen.changes, lr=settings.lr * chosen.rate, steps=steps)
    budgets = [round(steps * BATCH * share) for share in shares]
    budgets[0] += steps * BATCH - sum(budgets)
    most = {name: max(1, round(part * budgets[domains.index(name)])) for name, part in chosen.limits.items()}
    text = _text(dataclasses.replace(own, steps=1, lr=1.0), tuple(most.items()))
    planned = rates(rate_of(style, steps, own.lr))
    trainer = Trainer(own, text, seed=seed, rates=planned)
    mixture = Mixture(shares, budgets, samples=steps * BATCH)
    for sample, weights in changes(kind, options, planned, budgets, shares, BATCH):
        mixture.schedule(weights, sample)
    pace = Pace(steps, max(1, steps // 20), max(2, steps // 5))
    name = {"late": "low-resource-last"}.get(kind, kind if kind in LAWS else "constant")
    decide = Decider(size=pace, schedule=name, trainer=trainer, mixture=mixture, shares=shares)
    told = []
    for step in range(steps):
        if step % pace.every == 0:
            decide(step)
            told.append([step, round(float(mixture.weights[decide.low]), 4)])
        taken, _ = mixture.take(BATCH)
        trainer.step(None, np.bincount(taken, minlength=len(domains)))
    assert mixture.served.tolist() == budgets
    trainer.held = {
        name: judging(text, name, seed >= FIRST_CHOOSING).to(trainer.device) for name in trainer.held
    }
    return {"losses": trainer.losses(), "served": budgets, "told": told}


@functools.lru_cache(maxsize=2)
def _text(settings, limits):
    """Text of a process's runs, opened once."""
    return Text(settings, dict(limits))


def judging(text, name, choosing):
    """Held-out sequences i64[n, t + 1]: those for choosing a schedule, or those for a report."""
    held, probe = text.settings.held, text.settings.probe
    if choosing:
        return torch.cat([text.held(name), text.probe(name, range(probe))])
    return text.probe(name, range(probe, min(probe + JUDGED, len(text.valid[name]) - held)))


def cases(part, size, found):
    """The cases of a part; those of `main` need the cells of its windows."""
    return {
        "strength": lambda: _strength(size),
        "target": lambda: _target(size),
        "shares": lambda: _shares(size),
        "constants": lambda: _constants(size, size.steps),
        "longer-constants": lambda: _constants(size, size.middle),
        "main": lambda: _main(size, found),
        "length": lambda: _lengths(size),
        "epochs": lambda: _variants("epochs", size, ("1 epoch", "4 epochs", "16 epochs")),
        "rate": lambda: _variants("rate", size, ("base", "a third of the rate")),
        "domains": lambda: _variants("domains", size, ("K = 2", "base", "K = 5", "K = 8")),
        "size": lambda: _variants("size", size, ("base", "0.5M")),
    }[part]()


PARTS = Size().parts


def _strength(size):
    """Strengths of the law; like all parts up to `main`, on seeds that choose."""
    return [
        flowing(Case("strength", x, style, "", _choosing(size), size.steps), f"strength {x:g}", strength=x)
        for style in THREE
        for x in STRENGTHS
    ]


def _target(size):
    """Rules for the ranges of another target than one domain."""
    found = []
    for style in TWO:
        case = Case("target", "even", style, "", _choosing(size), size.steps, target="even")
        found += [flowing(case, f"linear x {s:g}", strength=s) for s in (1.0, 2.0)]
        found += [flowing(case, "logarithmic", rule=logarithmic)]
    return found


def _shares(size):
    """The law as it is, in other shares."""
    case = Case("shares", "", "", "", _choosing(size), size.steps)
    names = ("low-resource code", "low-resource English")
    return [flowing(case._replace(style=style, x=x, variant=x)) for style in TWO for x in names]


def _constants(size, steps):
    """Memory and kept steps of the law in runs of `steps`."""
    found, kept = [], flow.kept_steps(steps)
    for style in TWO:
        case = Case("memory", 0, style, "", _choosing(size), steps)
        found += [flowing(case._replace(x=c), f"memory {c:g}", memory=c, kept=kept) for c in MEMORIES]
        for n in (kept // 2, kept, kept * 2):
            to = case._replace(question="kept", x=n)
            found += [flowing(to, f"kept {n}", memory=2.5, kept=n)]
    return found


def _windows(size):
    """Choosing seeds: windows of the low-resource domain."""
    return [
        Case("window", i, style, f"{b:g} to {e:g} x {n:g}", _choosing(size), size.steps)._replace(
            kind="window", options=(("window", [b, e, n]),)
        )
        for style in STYLES
        for i, (b, e, n) in enumerate(WINDOWS)
    ]


def _main(size, found):
    """Every schedule under every style, on reporting seeds."""
    result, tried = [], tables.rows(found, _windows(size))
    for style in STYLES:
        case = Case("main", 0, style, "", tuple(range(1, size.seeds + 1)), size.steps)
        result += [flowing(case, "flow, low-resource"), flowing(case._replace(target="even"), "flow, even")]
        result.append(flowing(case, "flow, harm 0.002", strength=flow.strength_within(0.002)))
        best = [row for row in tried if (row["style"], row["loss"]) == (style, "target")]
        if best:
            window = WINDOWS[min(best, key=lambda row: row["percent"])["x"]]
            options = (("window", list(window)),)
            result.append(case._replace(kind="window", options=options, schedule="best window"))
        result += [case._replace(kind=law, schedule=law) for law in LAWS]
    return result


def _lengths(size):
    found = []
    for steps in size.lengths:
        seeds = tuple(range(1, (size.few if steps >= size.long else size.seeds) + 1))
        found += [flowing(Case("length", steps, style, "", seeds, steps)) for style in TWO]
    return found


def _variants(question, size, names):
    seeds = tuple(range(1, size.seeds + 1))
    return [
        flowing(Case(question, name, style, "", seeds, size.steps, variant=name))
        for style in TWO
        for name in names
    ]


def _choosing(size):
    return tuple(range(FIRST_CHOOSING, FIRST_CHOOSING + size.choosing))


def jobs(wanted):
    """Jobs of cases and of the constant mixture beside them, each once: the low-resource target
    first, seed after seed.
    """
    seeds = dict.fromkeys(seed for case in wanted for seed in case.seeds)
    first = [case for case in wanted if case.kind == "flow" and case.target == "low-resource"]
    ordered = [
        each.job(seed)
        for some in (first, wanted)
        for seed in seeds
        for case in some
        if seed in case.seeds
        for each in (case.base, case)
    ]
    return list({key: (key, work, arguments) for key, work, arguments in ordered}.values())


def study(settings, folder, size, processes, say):
    """Run what is missing of the parts, write for each its table and pictures; (text, files)."""
    refuse_unknown_parts(size.parts, PARTS)
    tell = lambda cell: say(f"{cell['key']}: {cell['timing']['seconds']:.0f} s")  # noqa: E731
    text, files = [], []
    for part in size.parts:
        if part == "main":
            first = [case for case in cases(part, size, {}) if case.kind == "flow"]
            cells.fill(folder, settings, jobs(first), processes, tell)
            tried = cells.fill(folder, settings, jobs(_windows(size)), processes, tell)
            write_csv(folder / "windows.csv", tables.rows(tried, _windows(size)))
        wanted = cases(part, size, cells.read(folder))
        found = cells.fill(folder, settings, jobs(wanted), processes, tell)
        shown, written = tables.written(folder, part, found, wanted)
        text.append(shown)
        files += written
    return "\n\n".join(text), files
