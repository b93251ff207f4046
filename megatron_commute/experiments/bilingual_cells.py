"""Cells of the language-model studies: each trains or measures something from a saved state and
returns numbers.

In a job of several ranks all of them work on every cell together, and the first rank alone writes.
"""

import os
from pathlib import Path

import numpy as np
import torch

from megatron_commute import reduce
from megatron_commute.adapters import torch_loop
from megatron_commute.design.cells import CELLS
from megatron_commute.experiments.bilingual_trainer import Text, Trainer, mean_loss, team
from megatron_commute.measure import probe
from megatron_commute.settings.values import Probe

SPLITS = 4  # replicates of a measurement of P


def state_path(folder, name, step):
    return Path(folder) / "states" / f"{name}-{step}.pt"


def _trainer(settings, folder, name, step, seed=None):
    path = state_path(folder, name, step)
    with reduce.agreed(reduce.everyone()):
        if not path.exists():
            raise FileNotFoundError(
                f"{path}: no such state on rank {reduce.rank()}: give an OUT_DIR that all ranks share; "
                f"where states were deleted, remove {CELLS} as well"
            )
        # a state that a GPU wrote names that GPU
        state = torch.load(path, weights_only=True, map_location="cpu")
    return Trainer(settings, Text(settings)).load(state, seed)


def base(settings, folder, name, weights, states, read_every):
    """The run under constant weights: a state saved at every step of `states`, losses read every
    `read_every` steps.
    """
    trainer = Trainer(settings, Text(settings))
    readings = []
    for step in range(max(states) + 1):
        if step in states and reduce.rank() == 0:
            path = state_path(folder, name, step)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(trainer.state(), f"{path}.{os.getpid()}")
            os.replace(f"{path}.{os.getpid()}", path)
        if step % read_every == 0 or step in states:
            readings.append([step, trainer.losses()])
        if step < max(states):
            trainer.step(weights)
    return {"readings": readings}


def pair(settings, folder, name, step, weights, delta, window, tails, seed, orders=("12", "21", "base")):
    """Both orders of eq. 9 from one state: a window at w + delta and one at w - delta of the first
    domain, then w.

    Held-out losses of "12" (more of the first domain first), "21" and "base", read at the end of
    the two windows and after each number of common steps in `tails`; all three see the same
    sequences at the same steps.
    """
    found = {}
    for order, sign in ((order, {"12": 1, "21": -1, "base": 0}[order]) for order in orders):
        trainer = _trainer(settings, folder, name, step, seed)
        for half in (1, -1):
            trainer.run(moved(weights, half * sign * delta), window)
        found[order] = _with_tail(trainer, weights, tails)
    return found


def _with_tail(trainer, weights, tails):
    """Losses now and after each number of steps at the base weights: [[steps, {name: loss}]]."""
    readings = [[0, trainer.losses()]]
    for before, after in zip([0, *tails], tails, strict=False):
        trainer.run(weights, after - before)
        readings.append([after, trainer.losses()])
    return readings


def moved(weights, delta):
    """Weights with `delta` moved from the second domain to the first."""
    return [weights[0] + delta, weights[1] - delta, *weights[2:]]


def criterion(settings, folder, name, step, weights, metric, samples=None):
    """P, scores and first-order terms at a state, for every single domain as the target and for the
    mixture.

    Brackets are between the trained domains; the other domains are targets only, so they have
    weight 0.
    """
    trainer = _trainer(settings, folder, name, step)
    names = (*settings.domains, *settings.others)
    params = list(trainer.model.parameters())
    model = torch_loop.probe_model(
        trainer.model,
        mean_loss,
        settings.micro,
        lambda: torch_loop.second_moments(trainer.optimizer, params),
    )
    samples = samples or settings.probe // 2
    wish = Probe(samples=samples, splits=SPLITS, method="difference", metric=metric)
    half = settings.probe // 2

    def draw(part, domain, numbers):
        first = half if part == "direction" else 0
        return trainer.text.probe(names[domain], first + np.asarray(numbers) % half)

    K = len(names)
    shares = np.array([*weights, *[0.0] * (K - len(weights))])
    targets = np.concatenate([np.eye(K), shares[None]])
    rate = trainer.rate(trainer.done)
    found = probe.measure(model, *team(wish.splits), draw, wish, targets, shares, (0.0, (rate, rate)))
    return {
        "targets": [*names, "mixture"],
        "P": found.P[:, 0, 1].tolist(),
        "P_se": found.P_se[:, 0, 1].tolist(),
        "u_g": found.u_g[:, : len(weights)].tolist(),
        "largest_M": float(np.abs(found.M).max()),
        "rate": rate,
    }
