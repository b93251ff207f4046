"""Runs under law flow in mode act that are killed at random moments and go on with other numbers of ranks.

Nothing is trained: the loaders deliver, the hook probes a table and decides, and every third step a checkpoint is written.
"""

import json
import os
import random
import signal
import threading
from pathlib import Path

import flow_jobs
import numpy as np
import ranks

from megatron_commute import reduce
from megatron_commute.config import Run
from megatron_commute.decide import control_file
from megatron_commute.settings import text_files

STEPS, BATCH, MICRO, SAVED = 48, 8, 2, 3
BUDGETS = [230, 39, 115]
TEXT = f"""domains:
  en: {{path: en, budget: {BUDGETS[0]}, holdout: 64}}
  ru: {{path: ru, budget: {BUDGETS[1]}, holdout: 64}}
  code: {{path: code, budget: {BUDGETS[2]}, holdout: 64}}
target: {{ru: 1}}
mode: act
every: 5
probe: {{samples: 8, splits: 4, metric: identity}}
measure_budget: 1
controller: {{law: flow, rate: 0.2}}
"""
CHANGE = "target: {code: 1}\nfrom: 190\n"
SIZES = (1, 2, 4)


def life(rank, folder, place, number, doom):
    """One start of the run on this rank. doom: (rank, step, seconds into it) of a SIGKILL, or None."""
    world, kept = reduce.everyone(), folder / place / "checkpoint.json"
    size = reduce.size(world)
    state = json.loads(kept.read_text()) if kept.exists() else None
    run = Run(flow_jobs.LENGTH, BATCH, MICRO, size, STEPS)
    groups = reduce.Groups(world, None, world)
    plugin, said = flow_jobs.attached(
        folder, rates=_rates, place=place, run=run, groups=groups, state=state and json.dumps(state["hook"])
    )
    loader, hook = iter(plugin.sampler), plugin.hook
    with open(folder / place / f"delivered-{number}-{rank}", "a") as told:
        for step in range(state["step"] if state else 0, STEPS):
            if doom and doom[:2] == (rank, step):
                threading.Timer(doom[2], os.kill, (os.getpid(), signal.SIGKILL)).start()
            hook.begin(step)
            keys = np.array([key for _ in range(BATCH // (MICRO * size)) for key in next(loader)]).reshape(
                -1, 2
            )
            told.write(json.dumps([step, keys.tolist()]) + "\n")
            told.flush()
            n = len(keys)
            hook.end(
                np.zeros(n), np.zeros((n, flow_jobs.LENGTH + 1), dtype=np.int64), (keys[:, 0], keys[:, 1])
            )
            if (step + 1) % SAVED == 0:
                hook.log_losses(step + 1)
                text = json.dumps({"step": step + 1, "hook": hook.state_dict()}).encode()
                if rank == 0:
                    text_files.replace(kept, text)
        hook.finish(STEPS)
    return [line for line in said if "OTHER SAMPLES" in line], hook.stream.served.tolist()


def _rates(step):
    return flow_jobs.cosine(step, steps=STEPS)


def prepare(folder):
    """Data and mixture file."""
    flow_jobs.write_data(folder)
    (folder / "mixture.yaml").write_text(TEXT)


def whole(folder, place, kills, seed):
    """Start a run until it ends, killed `kills` times; (row for a table, its (domain, position) as the loaders brought
    them)."""
    rng, sizes, lost = random.Random(seed), [], 0
    (folder / place).mkdir()
    (folder / place / control_file.NAME).write_text(CHANGE)
    for number in range(kills + 1):
        size, begun = rng.choice(SIZES), _step(folder / place)
        doom = None
        if number < kills:
            # the last kills leave steps for those to come
            step = min(begun + rng.randint(0, 2 * SAVED), STEPS - 1)
            doom = (rng.randrange(size), step, rng.choice((0.0, rng.random() * 0.05)))
        sizes.append(size)
        try:
            told = ranks.run(life, size, folder, place, number, doom, timeout=200.0)
            break
        except RuntimeError as fault:
            if "killed" not in str(fault) and "Connection" not in str(fault) and "closed" not in str(fault):
                raise
            lost += 1
    complaints, served = told[0]
    brought = _brought(folder / place)
    return {
        "seed": seed,
        "kills": lost,
        "ranks": " ".join(map(str, sizes)),
        "budgets_exact": served == BUDGETS,
        "loader_as_drawn": not any(words for words, _ in told) and not complaints,
        "stream_as_recorded": brought == flow_jobs.stream(folder / place),
    }, brought


def _step(place):
    kept = place / "checkpoint.json"
    return json.loads(kept.read_text())["step"] if kept.exists() else 0


def _brought(place):
    """(domain, position) of every sample in the global order: what the last life that took a step brought."""
    steps = {}
    files = [(*map(int, path.name.split("-")[1:]), path) for path in Path(place).glob("delivered-*")]
    for number, rank, path in sorted(files):
        for line in path.read_text().splitlines():
            if line.endswith("]]]") or line.endswith("[]]"):  # whole, not torn by the kill
                step, keys = json.loads(line)
                life_, parts = steps.get(step, (number, {}))
                parts = parts if life_ == number else {}
                steps[step] = (number, {**parts, rank: keys})
    found = []
    for step in sorted(steps):
        parts = np.stack(
            [np.array(keys).reshape(-1, MICRO, 2) for _, keys in sorted(steps[step][1].items())], axis=1
        )
        found += [tuple(key) for key in parts.reshape(-1, 2).tolist()]
    return found
