"""Runs whose weights law flow plans, on data of three domains and a table for a model: attached, trained, read back."""

import json

import numpy as np
import torch

from megatron_commute import reduce
from megatron_commute.adapters import torch_loop
from megatron_commute.config import Config, Controller, Domain, Plan, Run
from megatron_commute.data.stream import Stream
from megatron_commute.decide import control_file, flow_run
from megatron_commute.decide.steering import Steering
from megatron_commute.mixture import Mixture
from megatron_commute.record import log as record
from megatron_commute.settings.batches import Batches
from megatron_commute.settings.rates import RateSchedule, rate

NAMES, SHARES, LENGTH, BATCH, STEPS = ("en", "ru", "code"), (0.6, 0.1, 0.3), 8, 10, 60
MIXTURE = """domains:
  en: {path: en, budget: 360, holdout: 64}
  ru: {path: ru, budget: 60, holdout: 64}
  code: {path: code, budget: 180, holdout: 64}
target: {ru: 1}
mode: fixed
every: 25
probe: {samples: 8, splits: 2, metric: identity}
measure_budget: 1
controller: {law: flow}
"""

ACT = MIXTURE.replace("mode: fixed", "mode: act").replace("every: 25", "every: 10")
FREE = ACT.replace("law: flow", "law: flow, rate: 1")


def write_data(folder):
    for d, name in enumerate(NAMES):
        tokens = np.random.default_rng(d).integers(32, size=LENGTH * 500 + 1)
        write_indexed(folder / name, tokens)


def write_indexed(prefix, tokens):
    """One document as Megatron's .bin/.idx, written by hand from the format's description."""
    prefix.with_suffix(".bin").write_bytes(tokens.astype("<u2").tobytes())
    head = b"MMIDIDX\0\0" + (1).to_bytes(8, "little") + bytes([8])
    counts = (1).to_bytes(8, "little") + (2).to_bytes(8, "little")
    arrays = np.array([len(tokens)], "<i4").tobytes() + np.array([0], "<i8").tobytes()
    prefix.with_suffix(".idx").write_bytes(head + counts + arrays + np.array([0, 1], "<i8").tobytes())


class Words(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(32, 32)

    def forward(self, tokens):
        return self.table(tokens)


def loss_of(module, tokens):
    return torch.nn.functional.cross_entropy(module(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def cosine(step, steps=STEPS, lr=1e-3):
    return rate(RateSchedule(lr=lr, train_iters=steps, lr_warmup_iters=5), step)


def attached(
    folder, text=MIXTURE, rates=cosine, steps=STEPS, state=None, place="run", run=None, groups=None, **more
):
    if run is None:  # with a run of its own, the mixture file stands there already
        (folder / "mixture.yaml").write_text(text)
    plugin = torch_loop.Plugin(str(folder / "mixture.yaml"), run or Run(LENGTH, BATCH, 5, 1, steps))
    said = []
    model = torch_loop.probe_model(Words(), loss_of, 8, groups=groups)
    state, groups = None if state is None else json.loads(state), groups or reduce.Groups()
    plugin.attach(model, groups, folder / place, rates, 0.0, state=state, say=said.append, **more)
    return plugin, said


def trained(plugin, begin=0, end=STEPS):
    """Domains of the samples of these steps."""
    hook, seen = plugin.hook, []
    plugin.seen = getattr(plugin, "seen", [])
    for step in range(begin, end):
        hook.begin(step)
        place = hook.domains, hook.positions
        seen += hook.domains.tolist()
        plugin.seen += zip(hook.domains.tolist(), hook.positions.tolist(), strict=True)
        hook.end(np.zeros(BATCH), np.zeros((BATCH, LENGTH + 1), dtype=np.int64), place)
        hook.log_losses(step + 1)
    return seen


def weights_by_step(plugin, begin=0, end=STEPS):
    """f64[steps, K]: weights in force of every step."""
    hook, seen = plugin.hook, []
    for step in range(begin, end):
        trained(plugin, step, step + 1)
        seen.append(hook.weights)
    return np.array(seen)


def closed_form(
    owed, target, strength=1.0, begin=0, steps=STEPS, rates=cosine, low=0.0, high=1.0, scale=None, memory=2.5
):
    """Weights f64[steps - begin, K] of every step from `begin` on: those with the log-odds that the profile asks for, found
    by alternating scaling of rows and columns. The profile is that of the planned run, `scale`: its rates."""
    planned = np.array([rates(n) for n in range(steps)] if scale is None else scale)
    now = np.array([rates(n) for n in range(steps)])
    kept = min(len(planned) // 10, 100)

    def raw(rate):
        after = np.array([rate[n + 1 :].sum() for n in range(len(rate))])
        return rate / planned.max() * np.exp(-memory * after / planned.sum())

    p = raw(planned)[kept:]
    p = ((raw(now) - p.min()) / (p.max() - p.min())).clip(0, 1)
    shares = np.array(SHARES)
    reach = strength * 0.35 * (np.minimum(np.array(target) / shares, 10) - 1)
    wish = (shares * np.exp(np.outer(p, reach)))[begin:]
    w = wish / wish.sum(1, keepdims=True)
    for _ in range(20000):
        w = w * (np.array(owed) / BATCH / w.sum(0))
        w = w / w.sum(1, keepdims=True)
    return w


def decisions(place, everything=False):
    """Lines of a record in which the law decided; everything: also those in which weights stay."""
    lines = [line for line in record.read(place) if line["event"] in ("probe", "decision")]
    return [line for line in lines if everything or line["effective_sample"] is not None]


def pieces(line):
    """(sample, weights) of a decision."""
    told = line.get("flow", {}).get("pieces")
    if told is None:
        return [(line["effective_sample"], line["weights_next"])]
    return list(zip(told["sample"], told["weights"], strict=True))


def stream(place):
    """(domain, position) of every sample, from what a record says alone."""
    lines = record.read(place)
    start = lines[0]
    mixture = Mixture(start["weights"], start["budgets"], samples=start["samples"])
    seen, events = [], ("probe", "decision", "control")
    for line in [
        line for line in lines if line["event"] in events and line.get("effective_sample") is not None
    ]:
        domains, positions = mixture.take(max(line["sample"] - mixture.index, 0))
        seen += zip(domains.tolist(), positions.tolist(), strict=True)
        if line["event"] != "control":
            for sample, weights in pieces(line):
                mixture.schedule(weights, sample)
    domains, positions = mixture.take(start["samples"] - mixture.index)
    return seen + list(zip(domains.tolist(), positions.tolist(), strict=True))


def steering(shares, endless, minimum, maximum, steps, every, law="flow", rates=None, **controller):
    """A decide.steering.Steering in mode act for the last domain, without hook, model or data. shares, minimum, maximum
    f64[K]; endless bool[K]; rates: step -> learning rate."""
    K, samples = len(shares), steps * BATCH
    names = tuple(f"d{k}" for k in range(K))
    counts = np.floor(shares * samples).astype(int)
    counts[int(counts.argmax())] += samples - counts.sum()
    shares = counts / samples
    budgets = tuple(None if free else int(n) for free, n in zip(endless, counts, strict=True))
    low, high = np.minimum(minimum, shares), np.maximum(maximum, shares)
    target = np.eye(K)[[-1]]
    plan = Plan(names, shares, budgets, (9,) * K, (8,) * K, target, low, high, samples, 2 * BATCH, (), shares)
    law = Controller(law=law, floors=(0.0,) * K, caps=(1.0,) * K, **controller)
    domains = tuple(Domain(name=name, path=(name,)) for name in names)
    config, run = (
        Config(domains=domains, mode="act", every=every, controller=law),
        Run(LENGTH, BATCH, 5, 1, steps),
    )
    mixture = Mixture(shares, budgets, samples=samples, minimum=low, maximum=high)
    found = None
    if law.law == "flow":
        told = flow_run.rates_of(config, rates or (lambda step: cosine(step, steps=steps)), steps)
        found = flow_run.planned(config=config, plan=plan, run=run, rates=told, mixture=mixture)
    stream = Stream(consumed=mixture, sampler=None, groups=reduce.Groups(), batches=Batches(BATCH))
    watch = control_file.Watch("/nowhere/commute.control.yaml", control_file.limits(config, plan, run))
    return Steering(config=config, plan=plan, stream=stream, watch=watch, flow=found)
