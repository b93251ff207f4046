"""A plain torch training loop for tests of the hook: a small GPT with dropout on made-up text, one rank or several."""

import copy
import json
import types

import numpy as np
import oracles
import torch

from megatron_commute import reduce
from megatron_commute.adapters import torch_loop
from megatron_commute.config import Config, Controller, Domain, Plan, Probe, Run
from megatron_commute.data import takeover
from megatron_commute.data.stream import Stream
from megatron_commute.hook import Hook
from megatron_commute.mixture import Mixture
from megatron_commute.record import log as record

NAMES, WEIGHTS, BATCH, EVERY = ("en", "ru", "code"), (0.6, 0.1, 0.3), 4, 4
VOCABULARY, LENGTH = 16, 6


def text(domain, numbers, salt):
    return oracles.text(domain, numbers, salt, VOCABULARY, LENGTH, 0.8)


def held_out(part, domain, numbers):
    return text(domain, numbers, 1 if part == "direction" else 2)


def mean_loss(module, tokens):
    return oracles.cross_entropy(module(tokens[:, :-1]), tokens[:, 1:])


class Loop:
    """A training loop of `steps` steps as a user would write one, with dropout 0.1, and a hook or none."""

    def __init__(
        self, folder, steps=24, mode="act", draw=held_out, state=None, groups=None, watched=True, confidence=0.5,
        names=NAMES, weights=WEIGHTS, targets=None, every=EVERY, budgets="shares", law="tilt", compare=(),
        batch=BATCH, cooldown=1, listeners=(), rampup=None,
    ):  # fmt: skip
        torch.manual_seed(0)
        gpt = oracles.GPT(VOCABULARY, 8, 2, 1, LENGTH, spread=0.2)
        self.module = torch.nn.Sequential(gpt, torch.nn.Dropout(0.1))
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-2, weight_decay=0.01)
        self.groups, self.steps, self.said, self.losses, self.drawn = (
            groups or reduce.Groups(),
            steps,
            [],
            [],
            [],
        )
        self.step, self.hook, self.batch = 0, None, batch
        ranks_ = reduce.size(self.groups.data)
        self.run = Run(LENGTH, batch, 1, ranks_, steps, rampup=rampup)
        K, samples = len(names), self.run.samples
        shares = np.array(weights)
        budget = [round(samples * w) for w in weights[1:]]
        budget = [samples - sum(budget), *budget] if budgets == "shares" else list(budgets)
        self.plan = Plan(
            names, shares, tuple(budget), (100,) * K, (64,) * K, np.array([weights] if targets is None else targets),
            np.zeros(K), np.ones(K), samples, 2 * batch, ("a note",), shares,
        )  # fmt: skip
        config = Config(
            domains=tuple(Domain(name=n, path=(n,)) for n in names),
            mode=mode, every=every, probe=Probe(samples=16, splits=4),
            controller=Controller(
                confidence=confidence, floors=(0.0,) * K, caps=(1.0,) * K, rate=0.2, law=law, compare=tuple(compare),
                cooldown=cooldown,
            ), digest="d", measure_budget=100.0,
        )  # fmt: skip
        self.mixture = Mixture(shares, budget, samples=samples)
        if state is not None:
            self.step = state["step"]
            self.module.load_state_dict(state["module"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.mixture = Mixture.from_state(json.loads(state["hook"])["mixture"])
        # what feeds training, at its own copy of the mixture, which nothing reads ahead of
        feed = self.mixture.copy()
        self.sampler = types.SimpleNamespace(frontier=feed, schedule=feed.schedule, take=feed.take)
        if watched:
            self._attach(folder, config, draw, state, listeners)

    def _attach(self, folder, config, draw, state, listeners):
        params = list(self.module.parameters())
        model = torch_loop.probe_model(
            self.module, mean_loss, 3, lambda: torch_loop.second_moments(self.optimizer, params), groups=self.groups
        )  # fmt: skip
        log = record.Record(folder / record.NAME)
        ledger = takeover.ledger(self.plan.names, ["x"] * len(self.plan.names))
        stream = Stream(
            consumed=self.mixture.copy(), sampler=self.sampler, groups=self.groups, batches=self.run.batches
        )
        self.hook = Hook(
            config=config,
            plan=self.plan,
            run=self.run,
            stream=stream,
            ledger=ledger,
            model=model,
            groups=self.groups,
            draw=draw,
            record=log,
            learning_rate=lambda step: 1e-2 * (1 - step / self.steps),
            decay=0.01,
            say=self.said.append,
            listeners=listeners,
        )
        self.hook.start() if state is None else self.hook.load_state_dict(json.loads(state["hook"]))

    def _train(self, step, domains, positions):
        """One step on this rank's samples, dropout seeded by the step: its tokens and its loss."""
        tokens = torch.cat([text(d, [p], 3) for d, p in zip(domains, positions, strict=True)])
        torch.manual_seed(step)
        self.optimizer.zero_grad()
        loss = mean_loss(self.module, tokens)
        loss.backward()
        for p in self.module.parameters():
            p.grad.copy_(reduce.all_reduce_sum(p.grad, self.groups.data))
        self.optimizer.step()
        return tokens, loss

    def until(self, stop=None):
        while self.step < (stop or self.steps):
            if self.hook is not None:
                self.hook.begin(self.step)
            domains, positions = self.sampler.take(self.run.batches.size(self.sampler.frontier.index))
            mine = slice(None) if self.hook is None else self.hook.tally.mine
            tokens, loss = self._train(self.step, domains[mine], positions[mine])
            self.losses.append(loss.item())
            self.drawn += list(zip(domains.tolist(), positions.tolist(), strict=True))
            self.step += 1
            if self.hook is not None:
                losses = np.full(len(tokens), loss.item())
                self.hook.end(losses, tokens.numpy(), (domains[mine], positions[mine]))
                if self.step % 3 == 0:
                    self.hook.log_losses(self.step)
        if self.step == self.steps and self.hook is not None:
            self.hook.finish(self.step)
        return self

    def checkpoint(self):
        return copy.deepcopy(
            {
                "step": self.step, "module": self.module.state_dict(), "optimizer": self.optimizer.state_dict(),
                "hook": json.dumps(self.hook.state_dict()),
            }
        )  # fmt: skip


def lines(folder, *events):
    found = [{k: v for k, v in line.items() if k != "timing"} for line in record.read(folder)]
    return [line for line in found if not events or line["event"] in events]


def fails_at(*steps_of_probe):
    """A draw whose data are bad in the given probes, counted from 0."""

    def draw(part, domain, numbers):
        number = int(numbers[0]) // (16 if part == "gradient" else 8)
        if part == "gradient" and number in steps_of_probe:
            raise ValueError("token 99 is outside the vocabulary")
        return held_out(part, domain, numbers)

    return draw
