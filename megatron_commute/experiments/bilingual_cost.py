"""What a study costs, counted from its own jobs: steps, tokens, probe gradients, FLOPs, GPU hours,
disk. Nothing is run.

FLOPs of one token of a gradient: 6 N + 12 layers hidden sequence, N all parameters (the output
layer is the word embedding); the second term is attention, masked half included (Chowdhery et al.,
arXiv 2204.02311, appendix B). Reading a loss costs a third of a gradient. Hours follow from an
ASSUMED speed, they are no measurement; optimiser, network, data and start-up are left out.
"""

import dataclasses
import functools

import numpy as np
import torch

from megatron_commute.experiments import bilingual_cells as cells
from megatron_commute.experiments.bilingual_trainer import GPT
from megatron_commute.settings.probe_cost import CHECK_GRADIENTS, GRADIENTS_PER_SAMPLE, direction_samples

FLOAT32 = 0.1  # assumed speed of float32 as a part of that of bfloat16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What a part of a study does."""

    steps: int = 0
    # of training
    readings: int = 0
    # of the held-out losses of all domains
    gradients: int = 0
    # of one sequence, by probes
    states: int = 0
    # saved


def _base(settings, states, read_every, **_):
    last = max(states)
    read = {*range(0, last + 1, read_every), *states}
    return Work(steps=last, readings=len(read), states=len(set(states)))


def _pair(settings, window, tails, orders=("12", "21", "base"), **_):
    steps = len(orders) * (2 * window + max(tails, default=0))
    return Work(steps=steps, readings=len(orders) * (1 + len(tails)))


def _criterion(settings, weights, samples=None, **_):
    """Every domain is a target of its own, then the mixture is one; see settings.probe_cost."""
    splits, domains = cells.SPLITS, len(settings.domains) + len(settings.others)
    used = (samples or settings.probe // 2) // splits * splits
    products = GRADIENTS_PER_SAMPLE["difference"] * used + CHECK_GRADIENTS
    direction = splits * direction_samples(used, splits) * (domains + sum(w > 0 for w in weights))
    return Work(gradients=round(products * domains * (domains + 1)) + direction)


COUNTS = {
    cells.base: _base,
    cells.pair: _pair,
    cells.criterion: _criterion,
}


def work(settings, jobs):
    """Work of jobs [(key, function, arguments)], summed."""
    parts = [COUNTS[function](settings, **arguments) for _, function, arguments in jobs]
    names = [field.name for field in dataclasses.fields(Work)]
    return Work(**{name: sum(getattr(part, name) for part in parts) for name in names})


@functools.cache
def parameters(settings):
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(settings).parameters())


def _token(settings):
    """FLOPs of one token of a gradient."""
    return 6.0 * parameters(settings) + 12 * settings.layers * settings.hidden * settings.sequence


def _tokens(settings, found):
    """Trained tokens of some work."""
    return found.steps * (settings.batch // len(settings.domains)) * len(settings.domains) * settings.sequence


def _flops(settings, found):
    """Of training, of probes and of readings."""
    names = len(settings.domains) + len(settings.others)
    read = found.readings * settings.held * names * settings.sequence
    tokens = np.array([_tokens(settings, found), found.gradients * settings.sequence, read / 3])
    return tokens * _token(settings)


def _hours(settings, flops, tflops):
    speed = np.array([1.0 if settings.dtype == "bfloat16" else FLOAT32, FLOAT32, FLOAT32])
    return float((flops / speed).sum() / (tflops * 1e12 * 3600))


def row(settings, jobs, tflops):
    """Counts, FLOPs, GPU hours (of all, and of the longest job: what a kill may cost) and disk of
    some jobs as a dict.

    tflops: assumed sustained TFLOP/s of a GPU in bfloat16.
    """
    found = work(settings, jobs)
    flops = _flops(settings, found)
    longest = max(_hours(settings, _flops(settings, work(settings, [job])), tflops) for job in jobs)
    return {
        "cells": len(jobs),
        "steps": found.steps,
        "tokens": _tokens(settings, found),
        "probe_gradients": found.gradients,
        "training_flops": float(flops[0]),
        "probe_flops": float(flops[1]),
        "reading_flops": float(flops[2]),
        "gpu_hours": _hours(settings, flops, tflops),
        "longest_cell": longest,
        # weights and two moments of Adam, float32
        "state_gigabytes": 12 * parameters(settings) * found.states / 1e9,
    }


def rows(parts, tflops):
    """One row for each run of a study, the first part of its keys, and one for all; parts:
    [(settings, base job, jobs)].
    """
    found = []
    for settings, base, jobs in parts:
        run = base[0].partition("/")[0]
        found.append({"run": run, **row(settings, [base, *jobs], tflops)})
    total = {key: sum(r[key] for r in found) for key in found[0] if key != "run"}
    return [*found, {"run": "all", **total, "longest_cell": max(r["longest_cell"] for r in found)}]


def sentences(settings, tflops):
    """The formula with its numbers, and what is assumed."""
    return (
        f"N = {parameters(settings)} parameters; a token of a gradient costs 6 N + 12 layers hidden "
        f"sequence = {_token(settings):.4g} FLOPs, one of a reading a third of it\ngpu_hours and "
        f"longest_cell ASSUME {tflops:g} TFLOP/s a GPU, sustained, in bfloat16 and {FLOAT32 * tflops:g} in "
        "float32 (probes, readings, training with dtype=float32): an assumption (--tflops), not a "
        "measurement"
    )
