"""Schedules that decide while a run trains: a wish for a later phase, and laws of controller.py on what they measure.

Every `size.every` steps a Decider schedules weights on the run's own Mixture, which keeps the budgets. The low-resource
domain is the one of the smallest share.
"""

import numpy as np

from megatron_commute import controller, lockin, probe, response
from megatron_commute.adapters import torch_loop
from megatron_commute.experiments.bilingual_trainer import mean_loss, team
from megatron_commute.mixture_file import Probe, Response

AMPLITUDE = 0.9  # of the rollouts, as a part of the weights


class Decider:
    """The schedule of one run: called every `size.every` steps, it schedules weights on the mixture."""

    def __init__(self, *, size, schedule, trainer, mixture, shares):
        self.settings, self.size, self.schedule = trainer.settings, size, schedule
        self.trainer, self.mixture, self.memory, self.notes = trainer, mixture, {}, []
        self.shares, self.pairs = np.asarray(shares, dtype=np.float64), []
        self.low = int(np.argmin(self.shares))
        self.target = np.eye(len(self.shares))[self.low]

    def __call__(self, step):
        weights = {
            "constant": lambda: None,
            "low-resource-last": lambda: self._last(step),
            "tau-tail": lambda: self._law(
                "tau-tail", step, target=np.full(len(self.shares), 1 / len(self.shares))
            ),
            "odm": lambda: self._law("odm", step, losses=self._losses()),
            "tilt": lambda: self._law("tilt", step, **self._scores()) if step else None,
            "finish": lambda: self._finish(step),
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

    def _law(self, law, step, **signals):
        """A law of controller.py with its guardrails, in the situation of this step."""
        budgets = np.array(self.mixture.budgets, dtype=np.float64)
        samples = self.size.steps * self.settings.batch
        K, left = len(self.shares), samples - self.mixture.index
        nothing = {"score": np.zeros(K), "score_se": np.full(K, np.inf), "dof": 3}
        nothing |= {"window": self.size.every * self.settings.batch}
        situation = controller.Situation(
            weights=np.asarray(self.mixture.weights, dtype=np.float64),
            remaining=budgets - self.mixture.served,
            initial=self.shares,
            samples_left=left,
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
        if law == "finish":
            told = {"expected": decision.expected, "expected_se": decision.expected_se}
            self.notes.append({"step": step, "reason": decision.reason, **told})
        return decision.weights

    def _scores(self):
        """Scores of the paper's criterion under the Adam metric, with errors; the target is the low-resource domain."""
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
        at, every = self.trainer.done, self.size.every
        coming = [self.trainer.rate(at + i) for i in range(2 * every)]
        flow = (self.settings.weight_decay, (sum(coming[:every]), sum(coming[every:])))
        weights = np.asarray(self.mixture.weights, dtype=np.float64)
        target = self.target[None]
        found = probe.measure(model, *team(wish.splits), draw, wish, target, weights, flow)
        return {"score": found.score[0], "score_se": found.score_se[0], "dof": 3}

    def _finish(self, step):
        """Law `finish` on rollouts before the end, everything put back after each."""
        size, target = self.size, self.target
        half, none, all_ = size.end // 2, np.zeros(len(self.shares)), np.ones(len(self.shares))
        if step and step % ((size.steps - size.end) // size.pairs) == 0 and step < size.steps - size.end:
            v = lockin.towards(target, self.shares, AMPLITUDE, none, all_)
            asked = Response(kind="rollout", window=size.window, tail=0)
            place = (asked, self.settings.batch, np.asarray(self.mixture.served), self._losses)
            last = size.steps - 2 * size.window  # a rehearsal of the end, at its learning rates
            self.pairs.append(response.measure(_Excursion(self.trainer), last, self.shares, v, *place))
        if step < size.steps - size.end or (size.steps - step) % half:
            return None
        order = lockin.towards(target, self.shares, 1.0, none, all_)
        found = lockin.along(
            order, [p.wave for p in self.pairs], [p.difference("switch") for p in self.pairs]
        )
        known = dict(zip(("recency", "recency_se", "recency_dof"), found, strict=True)) if found else {}
        losses = self._losses()
        known |= {"order": order, "domain_losses": losses, "loss": float(losses[self.low]), "target": target}
        self.notes.append({key: np.asarray(value).tolist() for key, value in known.items()})
        return self._law("finish", step, window=half * self.settings.batch, **known)


class _Excursion:
    """The Host of response.py that a Trainer is."""

    def __init__(self, trainer):
        self.trainer, self.save, self.restore = trainer, trainer.state, trainer.load

    def train(self, step, domains, positions):
        self.trainer.done = step  # which sets the learning rate
        self.trainer.step(None, np.bincount(domains, minlength=len(self.trainer.taken)))


def with_share(shares, low, share):
    """Weights with `share` for domain `low` and the others in proportion to their shares."""
    rest = 1 - shares[low]
    return [share if k == low else (1 - share) * w / rest for k, w in enumerate(shares)]
