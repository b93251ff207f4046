#!/usr/bin/env python3
"""What a recorded run and its sweep cost, in plain runs of the same process: at most 1.05 (1 + 2 J)
for J losses where all states are kept, 1.05 (2 + 2 J) where they are recomputed.

    python tests/bench/design_cost.py [--repeats 5]

Own processor time, plain and recorded runs in turn; medians and quartiles. Writes
tests/bench/results/design_cost.csv.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from megatron_commute.design import adjoint
from megatron_commute.design.model import Shape
from megatron_commute.design.proxy import Proxy, Recipe, Run
from megatron_commute.experiments.bilingual_tables import write_csv

OUT = Path(__file__).parent / "results" / "design_cost.csv"
STEPS, LOSSES = 100, (1, 3, 5)


class Noise:
    """Sequences of any tokens, the same each time."""

    def __init__(self, shape):
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(0, shape.vocabulary, (64, shape.sequence + 1), generator=generator)

    def take(self, k, first, count):
        return self.tokens[(first + torch.arange(count)) % len(self.tokens)]


def run_of(shape):
    recipe = Recipe(rates=tuple(np.linspace(1e-3, 1e-4, STEPS)))
    shares = (0.6, 0.1, 0.3)
    proxy = Proxy(shape=shape, recipe=recipe, batch=30, shares=shares, epochs=(1.0,) * 3)
    return Run(proxy=proxy, seed=1, stream=Noise(shape))


def spent(work):
    begun = time.process_time()
    work()
    return time.process_time() - begun


def measured(shape, losses, recompute, repeats):
    """A row: the quotient of a recorded run with its sweep over a plain run, and its bound."""
    run = run_of(shape)
    weights = np.tile(run.proxy.shares, (STEPS, 1))
    held = {str(j): run.stream.tokens[:30] for j in range(losses)}
    plain = lambda: run.advance(run.start(), weights, 0, STEPS)  # noqa: E731
    both = lambda: adjoint.influences(  # noqa: E731
        run, weights, held, recompute=recompute, early=0.0, limit=float("inf")
    )
    plain()
    found = [spent(both) / (0.5 * (spent(plain) + spent(plain))) for _ in range(repeats)]
    low, middle, high = np.quantile(found, (0.25, 0.5, 0.75))
    about = {"flavour": shape.flavour, "losses": losses, "recomputed": recompute}
    return about | {
        "bound": 1.05 * (1 + recompute + 2 * losses),
        "plain runs": round(middle, 3),
        "quartiles": f"{low:.3f} {high:.3f}",
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    rows = []
    for flavour in ("gpt2", "llama"):
        for losses in LOSSES:
            for recompute in (False, True):
                rows.append(measured(Shape(flavour=flavour), losses, recompute, repeats))
                print(rows[-1])
    write_csv(OUT, rows)


if __name__ == "__main__":
    main()
