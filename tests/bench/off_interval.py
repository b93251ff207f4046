"""What the plug-in costs in a step without probe, log line or checkpoint: `python tests/bench/off_interval.py`.

CPU time of the training process (time.thread_time) in everything that the Megatron-DeepSpeed adapter does around one
step of the host: following loader and losses, the stream of the coming step, the account after it. One process stands
for a rank of `ranks`. Losses have eight tokens a sequence, so that the dispatch of their operations counts, not the
arithmetic, which is a GPU's; sequences have all. The median of ROUNDS steps. Rewrites results/off_interval.csv.
"""

import csv
import functools
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / part) for part in ("tests/support", "")]

import plain_loop

from megatron_commute.adapters.megatron_deepspeed.sight import Sight
from megatron_commute.record.tally import Tally

ROUNDS, WARM = 300, 20
ROWS = (  # domains, global batch, data-parallel ranks, micro-batch, tokens of a sequence
    (3, 8, 2, 2, 128),
    (3, 64, 8, 4, 2048),
    (3, 512, 64, 4, 2048),
    (8, 512, 64, 4, 4096),
    (22, 512, 64, 4, 2048),
    (8, 1024, 64, 4, 2048),
)
OUT = Path(__file__).resolve().parent / "results" / "off_interval.csv"


def cost(domains, batch, ranks, micro_batch, length):
    """Seconds of one step [ROUNDS]."""
    names = tuple(f"d{k}" for k in range(domains))
    with tempfile.TemporaryDirectory() as folder:
        steps = ROUNDS + WARM + 2
        loop = plain_loop.Loop(
            Path(folder), steps=steps, names=names, weights=(1 / domains,) * domains, batch=batch, every=steps,
            budgets=[None] * domains,
        )  # fmt: skip
        hook, sight, found = loop.hook, Sight(True, True), []
        hook.tally = Tally(
            domains=domains,
            global_batch=batch,
            micro_batch=micro_batch,
            data_rank=0,
            data_size=ranks,
            group=None,
        )
        count = len(hook.tally.mine)
        text = torch.randint(50000, (count, length + 1))
        losses, mask = torch.rand(micro_batch, 8), torch.ones(micro_batch, 8)
        outcome = losses, functools.partial(lambda mask, output: None, mask)
        followed = sight.forward_step(lambda batches, model: (next(batches), outcome)[1])
        for number in range(ROUNDS + WARM):
            begun = time.thread_time()
            hook.begin(number)
            sight.begin()
            spent = time.thread_time() - begun
            places = [torch.from_numpy(x[hook.tally.mine]) for x in (hook.domains, hook.positions)]
            parts = zip(*(x.split(micro_batch) for x in (text, *places)), strict=True)
            batches = sight.over(
                iter([dict(zip(("text", "domain", "position"), p, strict=True)) for p in parts])
            )
            begun = time.thread_time()
            for _ in range(count // micro_batch):
                followed(batches, None)
            hook.end(sight.sequence_losses(count), sight.tokens(count), sight.delivered())
            found.append(spent + time.thread_time() - begun)
    return np.array(found[WARM:])


def main():
    torch.set_num_threads(1)
    columns = (
        "domains",
        "global_batch",
        "ranks",
        "micro_batch",
        "tokens",
        "sequences_of_rank",
        "microseconds",
    )
    with OUT.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for row in ROWS:
            row = (*row, row[1] // row[2], round(float(np.median(cost(*row))) * 1e6))
            writer.writerow(row)
            print("  ".join(f"{name}={value}" for name, value in zip(columns, row, strict=True)), flush=True)


if __name__ == "__main__":
    main()
