"""What a probe costs, timed against counted: `python tests/bench/overhead.py`; writes overhead.csv beside itself.

One process, a small GPT. A step trains one batch; a probe is measured in the same process, in turn with steps, and the
median of its time over that of a step is set against the count: sequences whose gradient is taken, over the batch.

    share of training = c (2 K n T + S d K_t + 4 K T) / (every x batch)

K domains, n samples each, T targets, S splits, d direction samples a domain and split, K_t domains in the targets, c =
timed / counted. The check of differences takes four gradients of one sequence a domain. The other rows: the share in a
setting like the paper's, for 2 and for 22 domains at equal total samples.
"""

import csv
import functools
import itertools
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / part) for part in ("tests/support", "")]

import oracles

from megatron_commute import reduce
from megatron_commute.adapters import torch_loop
from megatron_commute.measure import probe, replicate
from megatron_commute.settings.values import Probe

VOCABULARY, LENGTH, MICRO, BATCH, ROUNDS = 128, 64, 8, 32, 5
EVERY, PAPER_BATCH, PAPER_SAMPLES = 1000, 512, 600
SPLITS = 4


@functools.cache
def sequence(part, domain, number):
    """i64[LENGTH + 1] of a domain: what follows a token is a fixed permutation of its own, most of the time."""
    follows = np.random.default_rng(domain).permutation(VOCABULARY)
    rng = np.random.default_rng([domain, number, part == "direction"])
    row = rng.integers(VOCABULARY, size=LENGTH + 1)
    kept = rng.random(LENGTH) < 0.7
    for i in range(LENGTH):
        row[i + 1] = follows[row[i]] if kept[i] else row[i + 1]
    return row


def text(part, domain, numbers):
    return torch.from_numpy(np.array([sequence(part, domain, int(number)) for number in numbers]))


def loss(module, tokens):
    tokens = tokens.to(next(module.parameters()).device)
    return oracles.cross_entropy(module(tokens[:, :-1]), tokens[:, 1:])


def trained(steps=60):
    torch.manual_seed(0)
    module = oracles.GPT(VOCABULARY, 64, 4, 2, LENGTH)
    optimizer = torch.optim.AdamW(module.parameters(), lr=2e-3)
    for number in range(steps):
        step(module, optimizer, number)
    return module, optimizer


def step(module, optimizer, number):
    """One step of BATCH sequences in micro-batches of the probe's size."""
    for i in range(BATCH // MICRO):
        first = 100_000 + number * BATCH + i * MICRO
        (loss(module, text("train", i % 4, range(first, first + MICRO))) * MICRO / BATCH).backward()
    optimizer.step()
    optimizer.zero_grad()


def measure(module, K, samples):
    """A probe of K domains of even weight."""
    how = Probe(samples=samples, splits=SPLITS, method="difference", metric="identity", memory="full")
    model, even, groups = torch_loop.probe_model(module, loss, MICRO), np.full(K, 1 / K), reduce.Groups()
    return probe.measure(
        model, groups, reduce.team(groups, SPLITS), text, how, even[None], even, (0.0, (1.0, 1.0))
    )


def counted(K, samples, direction=None):
    """Gradients of sequences that a probe takes for one target over all domains."""
    if direction is None:
        direction = replicate.direction_samples(samples, SPLITS)
    return 2 * K * samples + SPLITS * direction * K + 4 * K


def share(K, samples, direction, c=1.0):
    """Of training, in the paper's setting: a probe every 1000 steps of 512 sequences."""
    return c * counted(K, samples, direction) / (EVERY * PAPER_BATCH)


def timed(module, optimizer):
    """Rows and c: probe over step, timed and counted."""
    rows, ratios = [], []
    for K in (2, 4, 8):
        seconds = {"step": [], "probe": []}
        measure(module, K, 64)  # sequences are made once
        for number in range(ROUNDS):
            for name, work in (
                ("step", lambda number=number: step(module, optimizer, number)),
                ("probe", lambda K=K: measure(module, K, 64)),
            ):
                begun = time.process_time()
                work()
                seconds[name].append(time.process_time() - begun)
        ratio = statistics.median(seconds["probe"]) / statistics.median(seconds["step"])
        steps = counted(K, 64) / BATCH
        ratios.append(ratio / steps)
        rows.append(["timed", K, 64, 8, f"{ratio:.2f}", f"{steps:.2f}", f"{ratio / steps:.2f}", ""])
        print(f"K = {K}: a probe takes {ratio:.2f} steps, counted {steps:.2f}, c = {ratio / steps:.2f}")
    return rows, statistics.median(ratios)


def paper(c):
    """Rows: share of training in the paper's setting, counted and with the timed c: as many gradient samples as the paper,
    or as many samples in all, those of the direction included."""
    rows = []
    for K, part, inside in itertools.product((2, 22), (2, 4, 8), (False, True)):
        samples = 2 * PAPER_SAMPLES / K * (part / (part + 1) if inside else 1)
        samples = int(samples) // SPLITS * SPLITS
        direction = max(1, samples // SPLITS // part)
        plain, real = share(K, samples, direction), share(K, samples, direction, c)
        kind = "share, 1200 samples in all" if inside else "share, 1200 gradient samples"
        rows.append([kind, K, samples, direction, f"{real:.4%}", f"{plain:.4%}", f"{c:.2f}", part])
        print(
            f"{kind}: K = {K}, {samples} and 1/{part} for the direction: counted {plain:.3%}, with c {real:.3%}"
        )
    return rows


def main():
    torch.set_num_threads(1)
    module, optimizer = trained()
    rows, c = timed(module, optimizer)
    rows += paper(c)
    head = ["kind", "K", "samples", "direction_a_split", "timed", "counted", "c", "direction_part"]
    with Path(__file__).with_suffix(".csv").open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])


if __name__ == "__main__":
    main()
