"""What a design will run, for how long and with how much memory; before it starts."""

import dataclasses
import os
import time

import numpy as np
import torch

from megatron_commute import reduce
from megatron_commute.design import adjoint
from megatron_commute.design import run as work
from megatron_commute.design.model import parameters
from megatron_commute.design.proxy import Run

MOST_MEMORY = 0.6  # part of the free memory that recorded states may take


def measured_step(design):
    """Seconds of one training step of the proxy, the median of a few, those of the first rank on
    all; collective.
    """
    run = Run(proxy=design.proxy, seed=0, stream=_Random(design.proxy.shape))
    state, weights, spent = run.start(), np.tile(design.proxy.shares, (6, 1)), []
    for step in range(6):
        begun = time.perf_counter()
        run.advance(state, weights, step % design.proxy.steps, step % design.proxy.steps + 1)
        spent.append(time.perf_counter() - begun)
    median = np.array([np.median(spent[1:])])
    return float(reduce.broadcast_numbers(median, reduce.Groups(world=reduce.everyone()))[0])


class _Random:
    """Sequences of any tokens."""

    def __init__(self, shape):
        self.shape = shape

    def take(self, k, first, count):
        return torch.randint(0, self.shape.vocabulary, (count, self.shape.sequence + 1))


def needed(design, step_seconds, processes=1):
    """What a design will run: {"parts": [{"part", "runs", "seconds"}], "bytes", "seconds",
    "least_seconds"}. runs: in plain runs of the proxy.
    """
    J, a_run = len(design.source.names), design.proxy.steps * step_seconds
    first, last = design.looks[0], design.looks[-1]
    parts = [
        ("recorded run and sweep", (2 if design.recompute else 1) + 2 * J, 1),
        ("line search", work.LINE_SEARCH, min(processes, 2)),
        (f"proof, first look ({first} seeds)", 2 * first, processes),
        ("equal gains by data and length", work.COMPARED * (len(work.MORE_DATA) + work.LONGER), processes),
        (f"proof, to the last look ({last} seeds), where needed", 2 * (last - first), processes),
    ]
    rows = [{"part": name, "runs": runs, "seconds": runs * a_run / at_once} for name, runs, at_once in parts]
    seconds, size = [row["seconds"] for row in rows], parameters(design.proxy.shape)
    vectors = adjoint.vectors_held(design.proxy.steps, J, design.recompute)
    about = {"bytes": 4 * vectors * size, "parameters": size}
    return {"parts": rows, **about, "seconds": sum(seconds), "least_seconds": sum(seconds[:-1])}


def within_memory(design, step_seconds, processes):
    """(design, its cost), with states recomputed where all of them do not fit. ValueError where
    neither does. Collective.
    """
    world = reduce.everyone()
    free = -float(
        reduce.max_of_numbers(np.array([-float(_free_bytes())]), world)[0]
    )  # the least of all ranks
    for recompute in (False, True):
        found = dataclasses.replace(design, recompute=recompute)
        told = needed(found, step_seconds, processes)
        if told["bytes"] <= MOST_MEMORY * free:
            return found, told
    raise ValueError(
        f"the proxy's states need {told['bytes'] / 2**30:.1f} GiB, {free / 2**30:.1f} are free: write a "
        "smaller --proxy, such as steps=250 or hidden=32"
    )


def _free_bytes():
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
