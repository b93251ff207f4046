"""Cost and accuracy of the Hessian-vector products on a small GPT and a small Llama: `python
tests/bench/hvp.py`.

Writes hvp.csv beside itself. cost: CPU time of one thread over that of a gradient, median of interleaved
rounds. error: |error| / |H v| in float32 against double backward in float64, v the gradient of another
batch, median and largest over the draws. estimate: estimated over true error, least and largest.
"""

import csv
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 2)]

import oracles  # noqa: E402

from megatron_commute import hvp  # noqa: E402

HERE = Path(__file__).resolve().parent
VOCABULARY, LENGTH, DRAWS, ROUNDS = 256, 64, 12, 7
CASES = {
    "gpt": lambda: oracles.GPT(VOCABULARY, 96, 4, 4, LENGTH),
    "llama": lambda: oracles.Llama(VOCABULARY, 96, 4, 2, 4, 256),
}
METHODS = {
    "difference": lambda *case: hvp.gradient_and_product(*case),
    "difference, step tuned on the batch": lambda *case: hvp.gradient_and_product(*case, check=True),
    "exact": lambda *case: hvp.gradient_and_product(*case, "exact"),
}


def cpu_seconds(function, *args):
    start = time.process_time()
    function(*args)
    return time.process_time() - start


def length(vector):
    return sum(float(t.double().square().sum()) for t in vector) ** 0.5


def costs(case):
    """Median CPU time of every method over that of a gradient in the same round."""
    ratios = {name: [] for name in METHODS}
    for _ in range(ROUNDS):
        gradient = cpu_seconds(hvp.gradient, *case[:2])
        for name, method in METHODS.items():
            ratios[name].append(cpu_seconds(method, *case) / gradient)
    return {name: statistics.median(values) for name, values in ratios.items()}


def case_of(model, draw):
    """(loss, params, v) on batches of this draw alone."""
    params = oracles.parameters(model)[1]
    losses = [
        oracles.language_loss(model, *oracles.batch(VOCABULARY, 4, LENGTH, 2 * draw + i)) for i in (0, 1)
    ]
    return losses[0], params, hvp.gradient(losses[1], params)


def main():
    torch.set_num_threads(1)
    rows = []
    for kind, build in CASES.items():
        for state in ("initial", "trained"):
            torch.manual_seed(0)
            model = (
                build() if state == "initial" else oracles.train(build(), VOCABULARY, 8, LENGTH, steps=150)
            )
            found = {name: [] for name in METHODS}
            for draw in range(DRAWS):
                case = case_of(model, draw)
                truth = oracles.product(*case)
                for name, method in METHODS.items():
                    result = method(*case)
                    error = length([a.double() - b for a, b in zip(result.product, truth, strict=True)])
                    found[name].append((error / length(truth), result.error and result.error / error))
            for name, cost in costs(case_of(model, 0)).items():
                errors, estimates = zip(*found[name], strict=True)
                row = {"model": kind, "weights": state, "method": name, "cost": f"{cost:.2f}"}
                row |= {"error": f"{statistics.median(errors):.1e}", "largest_error": f"{max(errors):.1e}"}
                known = [e for e in estimates if e is not None]
                row["estimate"] = f"{min(known):.2f}..{max(known):.2f}" if known else ""
                rows.append(row)
                print(*row.values(), sep="\t")
    with open(HERE / "hvp.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
