"""Schedules of the whole-run studies: known before a run, or decided while it trains, as laws of
controller.py do.

Every `size.every` steps a Decider schedules weights on the run's own Mixture, which keeps the
budgets. The low-resource domain is the one of the smallest share.
"""

from typing import NamedTuple

import numpy as np

from megatron_commute.adapters import torch_loop
from megatron_commute.decide import controller, flow
from megatron_commute.decide.situation import Situation
from megatron_commute.experiments.bilingual_trainer import mean_loss, team
from megatron_commute.measure import probe
from megatron_commute.settings.mixture_file import Probe
from megatron_commute.settings.rates import flow_times


class Pace(NamedTuple):
    """What a Decider asks of a run: its steps, steps between decisions, and those of the end."""

    steps: int
    every: int
    end: int


def changes(kind, options, planned, budgets, shares, batch):
    """[(sample, weights f64[K])] of a schedule that is known before a run of the learning rates
    f64[T] `planned`.
    """
    steps, K = len(planned), len(shares)
    if kind == "flow":
        about = {"rates": planned, "batches": np.full(steps, batch), "budgets": budgets, "weights": shares}
        about |= {"target": np.ones(K), "low": np.zeros(K), "high": np.ones(K)}
        own = {"memory": options["memory"], "kept": options["kept"], "reach": options["ranges"]}
        return flow.planned(**about, **own).changes
    if kind == "window":
        begin, end, times = options["window"]
        low, at = int(np.argmin(shares)), [round(part * steps) for part in (begin, end)]
        length = at[1] - at[0]
        outside = shares[low] * max(0.0, steps - times * length) / (steps - length)
        parts = [(0, outside), (at[0], times * shares[low]), (at[1], outside)]
        return [(step * batch, np.array(with_share(shares, low, share))) for step, share in parts]
    return []


class Decider:
    """The schedule of one run: called every `size.every` steps, it schedules weights on the
    mixture.
    """

    def __init__(self, *, size, schedule, trainer, mixture, shares):
        self.settings, self.size, self.schedule = trainer.settings, size, schedule
        self.trainer, self.mixture, self.memory = trainer, mixture, {}
        self.shares = np.asarray(shares, dtype=np.float64)
        self.low = int(np.argmin(self.shares))

    def __call__(self, step):
        weights = {
            "constant": lambda: None,
            "low-resource-last": lambda: self._last(step),
            "tau-tail": lambda: self._law("tau-tail", target=np.full(len(self.shares), 1 / len(self.shares))),
            "odm": lambda: self._law("odm", losses=self._losses()),
            "tilt": lambda: self._law("tilt", **self._scores()) if step else None,
        }[self.schedule]()
        if weights is not None:
            self.mixture.schedule(np.asarray(weights), self.mixture.index)

    def _losses(self):
        return np.array([self.trainer.losses()[name] for name in self.settings.domains])

    def _last(self, step):
        """Half the low-resource share until the end phase, the rest of its budget in it."""
        planned = self.shares[self.low]
        share = planned / 2 if step < self.size.steps - self.size.end else None
        if share is None:
            left = self.size.steps - step
            spent = planned / 2 * (self.size.steps - self.size.end)
            share = (planned * self.size.steps - spent) / self.size.end if left else 0.0
        return with_share(self.shares, self.low, share)

    def _law(self, law, **signals):
        """A law of controller.py with its guardrails, in the situation of this step."""
        budgets = np.array(self.mixture.budgets, dtype=np.float64)
        samples = self.size.steps * self.settings.batch
        K, left = len(self.shares), samples - self.mixture.index
        nothing = {"score": np.zeros(K), "score_se": np.full(K, np.inf), "dof": 3}
        situation = Situation(
            weights=np.asarray(self.mixture.weights, dtype=np.float64),
            remaining=budgets - self.mixture.served,
            initial=self.shares,
            samples_left=left,
            window=self.size.every * self.settings.batch,
            minimum=np.zeros(K),
            maximum=np.ones(K),
            floors=np.zeros(K),
            caps=np.ones(K),
            rate=1.0,
            confidence=0.8,
            strength=1.0,
            memory=self.memory,
            progress=self.mixture.index / samples,
            **{**nothing, **signals},
        )
        decision = controller.decide(law, situation)
        self.memory = decision.memory
        return decision.weights

    def _scores(self):
        """Scores of the paper's criterion under the Adam metric, with errors; the target is the
        low-resource domain.
        """
        model = torch_loop.probe_model(
            self.trainer.model,
            mean_loss,
            self.settings.micro,
            lambda: torch_loop.second_moments(self.trainer.optimizer, list(self.trainer.model.parameters())),
        )
        half, text = self.settings.probe // 2, self.trainer.text

        def draw(part, domain, numbers):
            first = half if part == "direction" else 0
            return text.probe(self.settings.domains[domain], first + np.asarray(numbers) % half)

        wish = Probe(samples=half, splits=4, method="difference", metric="adam")
        times = flow_times(self.trainer.rate, self.trainer.done, self.size.every, self.size.steps)
        weights = np.asarray(self.mixture.weights, dtype=np.float64)
        target = np.eye(len(self.shares))[self.low][None]
        found = probe.measure(
            model, *team(wish.splits), draw, wish, target, weights, (self.settings.weight_decay, times)
        )
        return {"score": found.score[0], "score_se": found.score_se[0], "dof": 3}


def with_share(shares, low, share):
    """Weights with `share` for domain `low` and the others in proportion to their shares."""
    rest = 1 - shares[low]
    return [share if k == low else (1 - share) * w / rest for k, w in enumerate(shares)]
