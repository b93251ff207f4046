"""What the sampler costs, beside the tables it replaces: python tests/bench/mixture.py [FOLDER]

Writes mixture.csv into FOLDER (default: here). Every start-up runs in a process of its own, so that its
peak memory is its own; throughputs are the best of five. One core is enough.
"""

import argparse
import csv
import json
import resource
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np

from megatron_commute import mixture
from megatron_commute.data.sampler import MixtureSampler, item
from megatron_commute.mixture import Mixture

HERE = Path(__file__).resolve().parent
DOMAINS = 100
QUICKSTART_STEP = 0.55  # seconds; 4 layers, global batch 16, two CPU ranks (adapters of megatron-core)
COUNTS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)
COLUMNS = ("what", "domains", "samples", "seconds", "samples_per_second", "extra_MB", "note")


def shares(K):
    return np.random.default_rng(K).dirichlet(np.ones(K))


def ours(samples):
    """Everything before the first batch of a run with exact budgets: counters only."""
    budgets = np.floor(shares(DOMAINS) * samples).astype(int).tolist()
    budgets[0] += samples - sum(budgets)
    return Mixture(shares(DOMAINS), budgets).take(1024)


def resumed(samples):
    """From the JSON of a checkpoint to the next batch."""
    return Mixture.from_state(json.loads(json.dumps(Mixture(shares(DOMAINS)).state_dict()))).take(1024)


def blending_table(weights, samples):
    from megatron.core.datasets import helpers

    domain, position = np.zeros(samples, dtype=np.int16), np.zeros(samples, dtype=np.int64)
    helpers.build_blending_indices(domain, position, weights, len(weights), samples, False)
    return domain, position


def megatron_table(samples):
    return blending_table(shares(DOMAINS), samples)


STARTS = {
    "ours": ours,
    "ours, resumed": resumed,
    "Megatron helper": megatron_table,
}


def measured_start(name, samples):
    """Run in a child: seconds and extra peak MB of one start-up, imports and library start paid before."""
    start = STARTS[name]
    start(1024 * DOMAINS)
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    start(samples)
    seconds = time.perf_counter() - begun
    return seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def start_rows(long, short):
    for name, samples in zip(STARTS, (long, long, short), strict=True):
        command = [sys.executable, "-W", "ignore", __file__, "--start", name, str(samples)]
        answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        seconds, extra = json.loads(answer.splitlines()[-1])
        yield row("start-up: " + name, DOMAINS, samples, seconds, extra)


def row(what, K, samples, seconds, extra="", note=""):
    rate = samples / seconds if "start" not in what else ""
    numbers = {"seconds": f"{seconds:.6g}", "samples_per_second": f"{rate:.4g}" if rate else ""}
    shown = f"{extra:.3g}" if extra != "" else ""
    return {"what": what, "domains": K, "samples": samples, **numbers, "extra_MB": shown, "note": note}


def best(call, times=5):
    found = []
    for _ in range(times):
        begun = time.perf_counter()
        call()
        found.append(time.perf_counter() - begun)
    return min(found)


def streamed(K, n, stretch):
    """n samples of a fresh mixture on one of the two paths."""
    kept, mixture.stretch = mixture.stretch, stretch
    Mixture(shares(K)).take(n)
    mixture.stretch = kept


def throughput_rows():
    for K in COUNTS:
        n, few = int(min(2_000_000, 40_000_000 / K)), int(min(10_000, 200_000 / K))
        if mixture.stretch is not None:
            yield row("stream: ours, compiled", K, n, best(partial(streamed, K, n, mixture.stretch)))
        yield row("stream: Megatron helper", K, n, best(partial(blending_table, shares(K), n)))
        yield row("stream: ours, numpy", K, few, best(partial(streamed, K, few, None)))


def step_rows(steps=200):
    """One training step of the quickstart: 16 samples in 4 micro-batches, and the hook's own count of them."""
    stream = Mixture(shares(8), samples=None)
    sampler = MixtureSampler(
        mixture=stream,
        micro_batch=4,
        data_parallel_rank=0,
        data_parallel_size=1,
        global_batch=16,
        stop_sample=16 * 10**6,
    )
    batches = iter(sampler)

    def run():
        for _ in range(steps):
            keys = [key for _ in range(4) for key in next(batches)]
            stream.take(16)
            for domain, position in keys:
                item(position, 10_007, 1, domain)

    seconds = best(run) / steps
    yield row(
        "step: sampler, counters, permutation",
        8,
        16,
        seconds,
        note=f"{seconds / QUICKSTART_STEP:.4%} of a step",
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=HERE)
    parser.add_argument("--long", type=int, default=10**10, help="samples of our run")
    parser.add_argument("--short", type=int, default=10**8, help="samples of Megatron's table")
    parser.add_argument("--start", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        print(json.dumps(measured_start(options.start[0], int(options.start[1]))))
        return
    warnings.simplefilter("ignore")
    rows = [*start_rows(options.long, options.short), *throughput_rows(), *step_rows()]
    with (options.folder / "mixture.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for line in rows:
        print("  ".join(str(value) for value in line.values()))


if __name__ == "__main__":
    main()
