"""What a study costs, counted from its own jobs: steps, tokens, probe gradients, FLOPs, GPU hours, disk. Nothing is run.

FLOPs of one token of a gradient: 6 N + 12 layers hidden sequence, N all parameters (the output layer is the word embedding);
the second term is attention, masked half included (Chowdhery et al., arXiv 2204.02311, appendix B). Reading a loss costs a
third of a gradient. Hours follow from an ASSUMED speed, they are no measurement; optimiser, network, data and start-up are
left out.
"""

import dataclasses

import torch

from megatron_commute.config import CHECK_GRADIENTS, GRADIENTS_PER_SAMPLE, direction_samples
from megatron_commute.experiments import bilingual_cells as cells
from megatron_commute.experiments.bilingual_trainer import GPT

FLOAT32 = 0.1  # assumed speed of float32 as a part of that of bfloat16


@dataclasses.dataclass(frozen=True)
class Work:
    """steps: of training; readings: of the held-out losses of all domains; gradients: of one sequence, by probes; states:
    saved."""

    steps: int = 0
    readings: int = 0
    gradients: int = 0
    states: int = 0


def _base(settings, states, read_every, **_):
    last = max(states)
    read = {*range(0, last + 1, read_every), *states}
    return Work(last, len(read), 0, len(set(states)))


def _pair(settings, window, tails, orders=("12", "21", "base"), **_):
    return Work(len(orders) * (2 * window + max(tails, default=0)), len(orders) * (1 + len(tails)))


def _tilt(settings, steps, **_):
    return Work(2 * steps, 2)


def _wave(settings, window, tail, blocks, **_):
    return Work(blocks * (2 * window + tail), 1 + blocks)


def _criterion(settings, weights, samples=None, **_):
    """Every domain is a target of its own, then the mixture is one; see config.probe_cost."""
    splits, domains = cells.SPLITS, len(settings.domains) + len(settings.others)
    used = (samples or settings.probe // 2) // splits * splits
    products = GRADIENTS_PER_SAMPLE["difference"] * used + CHECK_GRADIENTS
    direction = splits * direction_samples(used, splits) * (domains + sum(w > 0 for w in weights))
    return Work(gradients=round(products * domains * (domains + 1)) + direction)


COUNTS = {
    cells.base: _base,
    cells.pair: _pair,
    cells.tilt: _tilt,
    cells.wave: _wave,
    cells.criterion: _criterion,
}


def work(settings, jobs):
    """Work of jobs [(key, function, arguments)], summed."""
    found = [dataclasses.astuple(COUNTS[function](settings, **arguments)) for _, function, arguments in jobs]
    return Work(*(sum(column) for column in zip(*found, strict=True)))


def parameters(settings):
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(settings).parameters())


def row(settings, jobs, tflops):
    """Counts, FLOPs, GPU hours and disk of some jobs as a dict; tflops: assumed sustained TFLOP/s of a GPU in bfloat16."""
    s, found, N = settings, work(settings, jobs), parameters(settings)
    token = 6.0 * N + 12 * s.layers * s.hidden * s.sequence
    tokens = found.steps * (s.batch // len(s.domains)) * len(s.domains) * s.sequence
    read = found.readings * s.held * (len(s.domains) + len(s.others)) * s.sequence
    training, reading, probing = tokens * token, read * token / 3, found.gradients * s.sequence * token
    slow = reading + probing + (training if s.dtype == "float32" else 0)
    total = training + reading + probing
    return {
        "cells": len(jobs),
        "steps": found.steps,
        "tokens": tokens,
        "probe_gradients": found.gradients,
        "training_flops": training,
        "probe_flops": probing,
        "reading_flops": reading,
        "gpu_hours": (total - slow + slow / FLOAT32) / (tflops * 1e12 * 3600),
        # weights and two moments of Adam, float32
        "state_gigabytes": 12 * N * found.states / 1e9,
    }


def rows(parts, tflops):
    """One row for each run of a study, the first part of its keys, and one for all; parts: [(settings, base job, jobs)]."""
    found = []
    for settings, base, jobs in parts:
        run = base[0].partition("/")[0]
        found.append({"run": run, **row(settings, [base, *jobs], tflops)})
    total = {key: sum(r[key] for r in found) for key in found[0] if key != "run"}
    return [*found, {"run": "all", **total}]


def sentences(settings, tflops):
    """The formula with its numbers, and what is assumed."""
    s, N = settings, parameters(settings)
    return (
        f"N = {N} parameters; a token of a gradient costs 6 N + 12 layers hidden sequence = "
        f"{6 * N + 12 * s.layers * s.hidden * s.sequence:.4g} FLOPs, one of a reading a third of it\n"
        f"gpu_hours ASSUMES {tflops:g} TFLOP/s a GPU, sustained, in bfloat16 and {FLOAT32 * tflops:g} in float32 (probes, "
        f"readings, training with dtype=float32): an assumption (--tflops), not a measurement"
    )
