"""Measured order effects on a live run: held-out losses, and paired trainings from one saved state.

A pair trains the same samples in two orders, w + v then w - v and w - v then w + v, follows both with a common tail
at w, and puts everything back. Its losses are read after the first half, at the switch to the tail and at its end.
Who trains is the host's affair (Host); what is trained and what is read is decided here.
"""

import dataclasses
from typing import Any, Protocol

import numpy as np
import torch

from megatron_commute import lockin, reduce
from megatron_commute.config import response_cost
from megatron_commute.mixture import Mixture
from megatron_commute.probe import ProbeFailed

MARKS = ("half", "switch", "tail")  # when a pair is read


class Host(Protocol):
    """A training loop that can be sent on an excursion. Collective calls, alike on all ranks.

    save: everything that a step changes, as copies: model, optimiser, schedulers, counters, random state. restore:
    puts it back bit for bit, as often as asked. train: one optimiser step on this rank's samples of domains and
    positions i64[n], with learning rate and random seed of step number `step`.
    """

    def save(self) -> Any: ...

    def restore(self, saved: Any) -> None: ...

    def train(self, step: int, domains: np.ndarray, positions: np.ndarray) -> None: ...


@dataclasses.dataclass(frozen=True)
class Pair:
    """Losses f64[3, 2, K] of every domain at MARKS, first order (w + v first) and second; wave f64[K]: v as it was
    served.
    """

    losses: np.ndarray
    wave: np.ndarray

    def difference(self, mark="tail"):
        """Half of first order minus second at a mark, f64[K] over domains: wave . effect, in nats."""
        first, second = self.losses[MARKS.index(mark)]
        return (first - second) / 2


def orders(weights, v, window, tail, batch, position):
    """The two orders as lists of global batches (domains i64[batch], positions i64[batch]), and the wave as served
    f64[K].

    weights, v f64[K]; window steps a half, tail steps; position i64[K]: where each domain's positions go on. Both orders
    use the same samples of every domain in the same succession, so after the second half nothing differs but the order.
    """
    n = window * batch
    up, down, rest = (
        Mixture(w).take(m)[0]
        for w, m in ((weights + v, n), (weights - v, n), (weights, max(tail, 1) * batch))
    )
    rest = rest[: tail * batch]
    found = []
    for halves in ((up, down), (down, up)):
        domains = np.concatenate([*halves, rest])
        positions = np.empty_like(domains)
        for k in range(len(weights)):
            mine = np.flatnonzero(domains == k)
            positions[mine] = position[k] + np.arange(len(mine))
        found.append(list(zip(domains.reshape(-1, batch), positions.reshape(-1, batch), strict=True)))
    counts = [np.bincount(half, minlength=len(weights)) for half in (up, down)]
    return found, (counts[0] - counts[1]) / (2 * n)


def paired(host, step, both, window, evaluate, mine=slice(None)):
    """Train the two orders `both` of `orders` from the present state, as steps `step`, `step` + 1, ..., and put it back.

    evaluate: () -> losses f64[K] of held-out data; mine: which samples of a global batch this rank trains. Returns
    losses f64[3, 2, K] at MARKS. However this ends, by an exception or an interrupt, the host's state is what it was
    before.
    """
    saved, losses = host.save(), []
    marks = (window, 2 * window, len(both[0]))
    try:
        for number, order in enumerate(both):
            if number:
                host.restore(saved)
            readings = {}
            for i, (domains, positions) in enumerate(order, 1):
                host.train(step + i - 1, domains[mine], positions[mine])
                if i in marks:
                    readings[i] = evaluate()
            losses.append([readings[mark] for mark in marks])
    finally:
        host.restore(saved)
    return np.array(losses).swapaxes(0, 1)


def measure(host, step, weights, v, settings, batch, position, evaluate, mine=slice(None)):
    """One Pair around `weights` f64[K]. settings: window and tail of the mixture file's `response`; the rest as above.

    Raises ProbeFailed where a loss is not finite.
    """
    both, served = orders(weights, v, settings.window, settings.tail, batch, position)
    if not served.any():
        raise ProbeFailed(
            "the two orders are one: bounds leave no room, or the window no sample; write a longer window"
        )
    losses = paired(host, step, both, settings.window, evaluate, mine)
    if not np.isfinite(losses).all():
        raise ProbeFailed("a held-out loss of a rollout is not finite; the run goes on from where it was")
    return Pair(losses, served)


def effect_of(pairs, weights, targets, mark="tail"):
    """The lockin.Effect on targets f64[T, K] of several Pairs; None where they do not determine it."""
    if not pairs:
        return None
    y = np.array([pair.difference(mark) for pair in pairs]) @ np.asarray(targets).T
    return lockin.regress(y, np.array([pair.wave for pair in pairs]), weights)


def evaluate(model, groups, draw, domains, sequences):
    """Mean held-out loss f64[K] of every domain, nats per token, over its first `sequences` response sequences.

    model: probe.Model; draw as in probe.measure with part "response". Dropout is off, random state and weights stay
    as they are; the data-parallel ranks share the sequences. Raises ProbeFailed on every rank when any met bad data,
    an exception outside the model's own collectives, or a loss that is not finite.
    """
    rank, size = reduce.rank_in(groups.data), reduce.size(groups.data)
    mine, totals, fault = np.arange(rank, sequences, size), np.zeros((domains, 2)), ""
    try:
        params = [p.detach() for p in model.parameters()]
        with torch.no_grad(), model.quiet("difference"):
            for k in range(domains):
                for first in range(0, len(mine), model.micro_batch):
                    numbers = mine[first : first + model.micro_batch]
                    tokens = draw("response", k, numbers)
                    totals[k] += float(model.loss(params, tokens)) * len(numbers), len(numbers)
    except Exception as raised:  # voted on below, so that no rank goes on alone
        fault = f"reading held-out losses: {type(raised).__name__}: {raised}"
    if reduce.any_rank(fault, groups.world):
        texts = reduce.gather_text(fault, groups)
        raise ProbeFailed("; ".join(f"rank {r}: {text}" for r, text in enumerate(texts) if text))
    total, count = reduce.sum_of_numbers(totals, groups.data).T
    if not np.isfinite(total).all():
        raise ProbeFailed("a held-out loss is not finite")
    return total / count


class Responses:
    """What one run measures of its own order effects.

    config, plan, run, model, groups, draw as in hook.Hook; host: a Host, needed for kind rollout only. Losses are of all
    domains, effects of the plan's targets. Kept: the wave under way, the last readings.
    """

    def __init__(self, config, plan, run, model, groups, draw, host=None):
        self.settings, self.plan, self.run, self.host = config.response, plan, run, host
        self.model, self.groups, self.draw = model, groups, draw
        self.cost = response_cost(config, run)
        self.kind = self.cost.kind
        # law finish measures one order, the one that it would use
        self.target = (
            plan.targets[0] if config.controller.law == "finish" and self.kind == "rollout" else None
        )
        self.waves, self.pairs = lockin.Waves(len(plan.names)), []
        self.next = -1

    def losses(self):
        """Held-out losses f64[K] on the fixed sequences; collective, ProbeFailed as in `evaluate`."""
        K = len(self.plan.names)
        return evaluate(self.model, self.groups, self.draw, K, self.settings.sequences)

    def modulate(self, mixture, sampler, first, last, low, high):
        """Plan and schedule the waves of the samples first..last around the weights that hold there."""
        ahead = mixture.copy()
        ahead.skip(first - ahead.index)
        batch, settings = self.run.global_batch, self.settings
        size = (self.cost.steps * batch, settings.window * batch, settings.delta)
        changes = self.waves.plan(first, last, ahead.weights, *size, low, high)
        for stream in (mixture, sampler):
            for at, weights in changes:
                stream.schedule(weights, at)
        ahead = mixture.copy()
        for cycle in self.waves.cycles:  # samples are whole: what is served is what the losses answer to
            if cycle.start >= max(first, ahead.index):
                counts = []
                for at in (cycle.start, cycle.start + cycle.half, cycle.start + 2 * cycle.half):
                    ahead.skip(at - ahead.index)
                    counts.append(ahead.served)
                up, down = counts[1] - counts[0], counts[2] - counts[1]
                cycle.wave = ((up - down) / (2 * cycle.half)).tolist()
        self.look_ahead(mixture.index - 1)

    def look_ahead(self, sample):
        """Set `next`, the first sample after `sample` at which something is to be read; -1 for none."""
        marks = [cycle.end for cycle in self.waves.cycles]
        if self.settings.tail:
            marks += [c.start + 2 * c.half for c in self.waves.cycles if c.switch is None]
        self.next = min((mark for mark in marks if mark > sample), default=-1)

    def give_up(self, sample):
        """Other weights hold from `sample` on: cycles beyond it are not read."""
        self.waves.drop(sample)
        self.look_ahead(sample - 1)

    def read(self, sample):
        """The reading that belongs to `sample`: the fields of a response line, None where the cycle goes on."""
        cycle, mark = self.waves.due(sample, self.settings.tail)
        try:
            losses = self.losses()
            if mark == "switch":
                cycle.switch = losses.tolist()
                return None
            reading = self.waves.take(cycle, losses)
        except ProbeFailed:
            self.waves.cycles = [other for other in self.waves.cycles if other is not cycle]
            raise
        finally:
            self.look_ahead(sample)
        return {"kind": "lock-in", "weights": self.waves.base, **reading}

    def excursion(self, step, mixture, low, high, mine):
        """One rollout from here, everything put back: the fields of a response line."""
        weights = np.asarray(mixture.weights, dtype=np.float64)
        if self.target is None:
            v = self.waves.draw(weights, self.settings.delta, low, high)
        else:  # a rehearsal of the end, at the end's learning rates
            v = lockin.towards(self.target, weights, self.settings.delta, low, high)
            step = max(step, self.run.train_iters - 2 * self.settings.window - self.settings.tail)
        place = (self.settings, self.run.global_batch, np.asarray(mixture.served))
        pair = measure(self.host, step, weights, v, *place, self.losses, mine)
        self.pairs = [*self.pairs, {"sample": mixture.index, "wave": pair.wave, "losses": pair.losses}][
            -lockin.KEPT :
        ]
        return {"kind": "rollout", "weights": weights, "wave": pair.wave, "losses": pair.losses}

    def effect(self, weights, mark="tail", since=-1):
        """The lockin.Effect on the plan's targets of what was read after sample `since`; None where it is not
        determined.
        """
        if self.kind == "rollout":
            chosen = [Pair(p["losses"], p["wave"]) for p in self.pairs if p["sample"] > since]
            return effect_of(chosen, weights, self.plan.targets, mark)
        return lockin.effect_of(self.waves.readings, weights, self.plan.targets, mark, since)

    def recency(self, weights):
        """order, recency, recency_se and recency_dof of a controller.Situation from the rollouts; {} below two."""
        pairs = [Pair(p["losses"], p["wave"]) for p in self.pairs]
        order = lockin.towards(self.target, weights, 1.0, np.zeros_like(weights), np.ones_like(weights))
        found = lockin.along(order, [p.wave for p in pairs], [p.difference("switch") for p in pairs])
        if found is None:
            return {}
        return {"order": order, **dict(zip(("recency", "recency_se", "recency_dof"), found, strict=True))}

    def known(self, weights):
        """effect, recency, domain_losses and loss of a controller.Situation, as far as they are measured."""
        measured = self.effect(weights) if len(self.plan.targets) == 1 else None
        found = {}
        if measured is not None:
            found = {"effect": measured.value[0], "effect_se": measured.se[0], "effect_dof": measured.dof}
        if self.target is not None:
            found |= self.recency(weights)
        last = np.array(self.waves.readings[-1]["tail"]) if self.waves.readings else None
        if self.pairs:
            last = np.mean(self.pairs[-1]["losses"][-1], axis=0)
        return found if last is None else found | {
            "domain_losses": last, "loss": float(self.plan.targets[0] @ last)}  # fmt: skip

    def state_dict(self):
        pairs = [{k: np.asarray(v).tolist() for k, v in pair.items()} for pair in self.pairs]
        return {"waves": self.waves.state_dict(), "pairs": pairs}

    def load_state_dict(self, state, sample):
        self.waves.load_state_dict(state["waves"])
        arrays = {"wave", "losses"}
        self.pairs = [
            {k: np.array(v) if k in arrays else v for k, v in pair.items()} for pair in state["pairs"]
        ]
        self.look_ahead(sample - 1)
