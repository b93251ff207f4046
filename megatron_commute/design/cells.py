"""Units of work that survive a kill: each is a function of JSON values that returns numbers.

A cell is a dict of JSON values whose "key" names it; `fill` computes the missing ones, several
processes at a time or one for each rank, and appends them to a file, so that work killed at any
moment goes on where it stopped.
"""

import concurrent.futures
import contextlib
import json
import multiprocessing
import time
from pathlib import Path

import numpy as np
import torch

from megatron_commute import reduce

CELLS = "cells.jsonl"


def read(folder):
    """Cells of a folder by key; a torn last line, of a run that was killed while it wrote, is left
    out.
    """
    found = {}
    for path in sorted(Path(folder).glob(f"{CELLS}*")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                cell = json.loads(line)
            except json.JSONDecodeError:
                continue
            found[cell["key"]] = cell
    return found


def dealt(folder, settings, jobs, processes, say):
    """`fill` with the jobs dealt to all ranks, each of which works alone and writes a file of its
    own; every rank returns all cells. Collective.
    """
    world = reduce.everyone()
    if reduce.size(world) == 1:
        return fill(folder, settings, jobs, processes, say)
    rank, done = reduce.rank(), read(folder)
    missing = [job for job in jobs if job[0] not in done][rank :: reduce.size(world)]
    path = Path(folder) / f"{CELLS}.{rank}"
    with reduce.agreed(world):  # all have read before one writes
        path.parent.mkdir(parents=True, exist_ok=True)
        _end_torn_line(path)
    with reduce.agreed(world), path.open("a", encoding="utf-8") as file:
        for job in missing:
            _keep(file, _one(settings, folder, job), done, say)
    return read(folder)


def fill(folder, settings, jobs, processes, say):
    """Compute the cells of `jobs` [(key, function, arguments)] that `folder` lacks and append each
    as it is ready: function(settings, folder, **arguments) -> dict.

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
