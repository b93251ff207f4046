"""Runs of study `online`: a GPT in mode act under law flow whose target or length changes half-way.

All decisions are the product's: torch_loop.Plugin on a mixture file, its checkpoint and its control
file.
"""

import dataclasses
import functools
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np

from megatron_commute import reduce
from megatron_commute.adapters import torch_loop
from megatron_commute.config import Run
from megatron_commute.decide import control_file
from megatron_commute.experiments.bilingual_flow import BATCH, FIRST_CHOOSING, judging, rate_of
from megatron_commute.experiments.bilingual_flow_variants import BASE, UNTRAINED_TEXT
from megatron_commute.experiments.bilingual_trainer import Text, Trainer, mean_loss
from megatron_commute.record.log import NAME as LOG
from megatron_commute.settings import text_files
from megatron_commute.settings.rates import rates

INSIDE = 0.9  # of what is left of a budget, within a window
LEAD = BATCH  # samples between a decision and its effect
NAMES, SHARES = tuple(BASE), np.array(list(BASE.values()))


def budgets_of(steps):
    """Samples of every domain in a run of so many steps."""
    found = [round(steps * BATCH * share) for share in BASE.values()]
    found[0] += steps * BATCH - sum(found)
    return found


def rates_for(settings, style, steps, planned):
    """Learning rates f64[steps] by flags that a change of length leaves alone: the warm-up is that
    of the planned steps.
    """
    flags = rate_of(style, steps, settings.lr)
    return rates(dataclasses.replace(flags, lr_warmup_iters=planned // 20))


class OnlineRun:
    """A run of the study's GPT in mode act under law flow, with the plug-in's own checkpoints."""

    def __init__(self, settings, *, style, steps, decisions, seed):
        domains = {"domains": NAMES, "others": UNTRAINED_TEXT, "batch": BATCH, "optimizer": "adamw"}
        self.settings = dataclasses.replace(settings, **domains, weight_decay=0.1, steps=steps)
        self.style, self.planned, self.every, self.seed = style, steps, max(1, steps // decisions), seed
        self.text = _text(dataclasses.replace(self.settings, steps=1, lr=1.0))
        self.steps, self.rates = steps, rates_for(self.settings, style, steps, steps)
        self.trainer = Trainer(self.settings, self.text, seed=seed, rates=self.rates)
        self.hook, self.at = None, 0

    def attach(self, place, target, state=None, accept=False, memory=None):
        """Let the plug-in steer from here on, towards target {name: share} or None, as a run begins
        or goes on from a checkpoint's state. Its record and control file lie in `place`. Weights
        move as far as the plan does (rate 1). memory: of law flow, None: its default.
        """
        place.mkdir(parents=True, exist_ok=True)
        law = {"law": "flow", "rate": 1} | ({} if memory is None else {"memory": memory})
        told = self.mixture(target) | {"controller": law}
        text_files.replace(place / "mixture.yaml", json.dumps(told))  # JSON is YAML
        a_run = Run(self.settings.sequence, BATCH, BATCH, 1, self.steps)
        plugin = torch_loop.Plugin(str(place / "mixture.yaml"), a_run)
        model = torch_loop.probe_model(self.trainer.model, mean_loss, BATCH)
        about = (model, reduce.Groups(), place, lambda step: float(self.rates[step]), 0.0)
        state = None if state is None else json.loads(state)
        self.hook = plugin.attach(*about, state=state, accept=accept, say=_nothing)
        self.hook.off = True  # law flow decides without a probe

    def mixture(self, target):
        """A mixture file of the run as JSON values, without its controller."""
        domains = {
            name: {
                "path": f"{self.settings.data}/{name}_train",
                "holdout": f"{self.settings.data}/{name}_valid",
                "budget": budget,
            }
            for name, budget in zip(NAMES, budgets_of(self.steps), strict=True)
        }
        told = {"domains": domains, "target": target, "mode": "act", "every": self.every, "lead": LEAD}
        return told | {"probe": {"samples": 8, "splits": 2}}

    def train(self, end):
        """Go on to step `end`."""
        nothing = np.zeros(BATCH), np.zeros((BATCH, self.settings.sequence + 1), dtype=np.int64)
        for step in range(self.at, end):
            self.hook.begin(step)
            self.trainer.step(None, np.bincount(self.hook.domains, minlength=len(NAMES)))
            self.hook.end(*nothing)
        self.at = end

    def change_length(self, steps):
        """The host goes on with the same flags and another number of steps."""
        self.rates = np.concatenate(
            [self.rates[: self.at], rates_for(self.settings, self.style, steps, self.planned)[self.at :]]
        )
        self.steps, self.trainer.rates = steps, self.rates

    def state(self):
        """What a checkpoint keeps, of training and of the plug-in."""
        return self.trainer.state(), json.dumps(self.hook.state_dict()), self.at

    def load(self, state):
        self.trainer.load(state[0])
        self.at = state[2]

    def losses(self):
        """Final losses by domain, trained or not, on the sequences of the seed's kind; budgets must
        be spent.
        """
        assert self.hook.stream.served.tolist() == budgets_of(self.steps)
        choosing = self.seed >= FIRST_CHOOSING
        self.trainer.held = {
            name: judging(self.text, name, choosing).to(self.trainer.device) for name in self.trainer.held
        }
        return self.trainer.losses()


@functools.lru_cache(maxsize=2)
def _text(settings):
    """Text of a process's runs, opened once."""
    return Text(settings)


def _nothing(line):
    """What a run says on its screen."""


def target_of(name):
    return None if name == "mixture" else {name: 1}


def changed_target(settings, folder, style, first, then, steps, decisions, branches, seed):
    """Cell: one first half, and from its checkpoint a second half for each of the branches {name:
    options}: {"losses": {name: final by domain}}.
    """
    run = OnlineRun(settings, style=style, steps=steps, decisions=decisions, seed=seed)
    half = steps // 2
    found = {}
    with tempfile.TemporaryDirectory() as place:
        run.attach(Path(place, "first"), target_of(first))
        run.train(half - 3)  # the file is there before its sample comes
        state = run.state()
        for number, (name, options) in enumerate(branches.items()):
            here = Path(place, str(number))
            here.mkdir()
            shutil.copy(Path(place, "first", LOG), here)
            run.load(state)
            other = options.get("memory")
            run.attach(here, target_of(first), state[1], accept=other is not None, memory=other)
            ahead = run.hook.stream.ahead(half * BATCH)
            write_control(here, then, options, ahead, steps)
            run.train(steps)
            found[name] = run.losses()
    return {"losses": found, "served": budgets_of(steps)}


def write_control(place, then, options, ahead, steps):
    """Tell a run of its new target, or of a window for it, from half of the run on. ahead: the
    mixture there.
    """
    told = {"from": ahead.index}
    if "window" in options:
        rows = window_rows(options["window"], ahead, NAMES.index(then), steps)
        text = "\n".join(",".join(str(value) for value in row) for row in [("at", *NAMES), *rows])
        text_files.replace(place / "window.csv", text + "\n")
        told["schedule"] = "window.csv"
    elif options.get("strength"):
        told |= {"target": {then: 1}, "strength": options["strength"]}
    else:
        return
    text_files.replace(place / control_file.NAME, json.dumps(told))


def window_rows(window, ahead, low, steps):
    """(sample, *weights) of nine tenths of what domain `low` is still owed between two parts of the
    rest of the run; the others share what it leaves, in proportion to their own rests.
    """
    left = np.array(ahead.budgets, dtype=np.float64) - ahead.served
    begin, half = ahead.index // BATCH, steps - ahead.index // BATCH
    cuts = [begin, *(begin + round(part * half) for part in window), steps]
    parts = np.diff(cuts) * BATCH
    inside = INSIDE if parts[0] + parts[2] else 1.0
    spent = np.array([parts[0], 0.0, parts[2]]) / max(parts[0] + parts[2], 1)
    spent = left[low] * ((1 - inside) * spent + inside * np.array([0, 1, 0]))
    rows = []
    for at, size, used in zip(cuts, parts, spent, strict=False):
        if size:
            share = used / size
            others = np.delete(left, low) / np.delete(left, low).sum() * (1 - share)
            rows.append((at * BATCH, *np.insert(others, low, share).round(9)))
    return rows


def changed_length(settings, folder, style, part, steps, decisions, seed):
    """Cell: {"losses": {name: final by domain}} of a run whose length changes half-way ("changed"),
    of one planned with the true length ("known"), and of the constant mixture under the rates of
    either.
    """
    half, true = steps // 2, round(part * steps)
    found = {}
    about = {"style": style, "decisions": decisions, "seed": seed}
    with tempfile.TemporaryDirectory() as place:
        for name, target in (("changed", {"russian": 1}), ("constant, changed", None)):
            run = OnlineRun(settings, steps=steps, **about)
            run.attach(Path(place, name), target)
            run.train(half)
            state = run.state()
            run.change_length(true)
            run.attach(Path(place, name), target, state=state[1], accept=True)
            run.train(true)
            found[name] = run.losses()
        planned = rates_for(settings, style, true, steps)
        alike = np.array_equal(planned, run.rates)
        for name, target in (("known", {"russian": 1}), ("constant, known", None)):
            if name == "constant, known" and alike:
                found[name] = found["constant, changed"]
                continue
            run = OnlineRun(settings, steps=steps, **about)
            run.change_length(true)
            run.attach(Path(place, name), target)
            run.train(true)
            found[name] = run.losses()
    return {"losses": found, "served": budgets_of(true)}
