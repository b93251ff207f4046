"""Units of work of the language-model studies: each trains or measures something from a saved state
and returns numbers.

A cell is a dict of JSON values whose "key" names it; `fill` computes the missing ones of a study,
several processes at a time, and appends them to a file, so that a study killed at any moment goes
on where it stopped. In a job of several ranks all of them work on every cell together, and the
first rank alone writes.
"""

import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import torch

from megatron_commute import reduce
from megatron_commute.adapters import torch_loop
from megatron_commute.experiments.bilingual_trainer import Text, Trainer, mean_loss, team
from megatron_commute.measure import probe
from megatron_commute.settings.values import Probe

CELLS = "cells.jsonl"
SPLITS = 4  # replicates of a measurement of P


def read(folder):
    """Cells of a study by key; a torn last line, of a run that was killed while it wrote, is left
    out.
    """
    path, found = Path(folder) / CELLS, {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                cell = json.loads(line)
            except json.JSONDecodeError:
                continue
            found[cell["key"]] = cell
    return found


def fill(folder, settings, jobs, processes, say):
    """Compute the cells of `jobs` [(key, function, arguments)] that `folder` lacks and append each
    as it is ready.

    Jobs run in the order given; with several processes a job must not need one that is still
    running. Returns all cells. Collective over all ranks, which work on one job at a time:
    processes is 1 there. Only the first rank has read the cells that `folder` held before.
    """
    path, first = Path(folder) / CELLS, reduce.rank() == 0
    if first:
        path.parent.mkdir(parents=True, exist_ok=True)
        _end_torn_line(path)
    done = read(folder) if first else {}
    missing = _missing(jobs, done)
    context = multiprocessing.get_context("spawn")
    with path.open("a", encoding="utf-8") if first else contextlib.nullcontext() as file:
        if processes == 1 or len(missing) < 2:
            for job in missing:
                _keep(file, _one(settings, folder, job), done, say)
            return done
        with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
            waiting = [pool.submit(_one, settings, folder, job) for job in missing]
            for ready in concurrent.futures.as_completed(waiting):
                _keep(file, ready.result(), done, say)
    return done


def _missing(jobs, done):
    """Jobs without a cell as the first rank sees it, so that all ranks take up the same ones."""
    world = reduce.everyone()
    flags = reduce.broadcast_numbers(
        np.array([float(key not in done) for key, _, _ in jobs]), reduce.Groups(world=world)
    )
    return [job for job, flag in zip(jobs, flags, strict=True) if flag]


def _one(settings, folder, job):
    key, function, arguments = job
    torch.set_num_threads(1)
    started = time.monotonic()
    found = function(settings, folder, **arguments)
    return {"key": key, **arguments, **found, "timing": {"seconds": time.monotonic() - started}}


def _end_torn_line(path):
    """A line that was cut off gets its end, so that the next cell begins a line of its own."""
    if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        with path.open("a", encoding="utf-8") as file:
            file.write("\n")


def _keep(file, cell, done, say):
    """file: None on all ranks but the first."""
    if file is not None:
        file.write(json.dumps(cell, allow_nan=False) + "\n")
        file.flush()
    done[cell["key"]] = cell
    say(cell)


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
