"""Cost, memory and accuracy of Hessian-vector products: `python tests/bench/hvp.py`.

Two tables, one CPU thread, float32, written to hvp.csv beside this file. cost: CPU time over that of a plain gradient in
the same process, median of interleaved rounds, each between two gradients. memory: bytes of tensors alive at the worst
moment, over a gradient's.

cost      a GPT-2 of 1, 2 and 10 million parameters; ours and curvlinops where it is installed. floor: matrix
          products alone, of H u or of g and H u, over those of a gradient; matmul: their share of the gradient's time; error
          against double backward.
accuracy  ways of `difference` and `exact` on a small GPT and a small Llama: |error| / |H v| against double backward in
          float64, v the gradient of another batch, median and largest over the draws; estimate: estimated over true error.
"""

import csv
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / part) for part in ("tests/support", "")]

import hvp_methods
import oracles
from oracles import length

from megatron_commute import hvp

HERE = Path(__file__).resolve().parent
# vocabulary, width, heads, blocks, length, samples; rounds
SIZES = {
    "1M": ((1024, 128, 4, 4, 128, 8), 9),
    "2M": ((2048, 192, 6, 3, 128, 8), 9),
    "10M": ((8192, 384, 6, 4, 128, 8), 5),
}
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
COLUMNS = ["table", "model", "parameters", "length", "weights", "method", "cost", "floor", "matmul", "memory",
           "error", "largest_error", "estimate"]  # fmt: skip


def cpu_seconds(function, *args):
    start = time.process_time()
    function(*args)
    return time.process_time() - start


def ratios(functions, base, rounds):
    """{name: median CPU time over that of `base`, run before and after each}."""
    found = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            before = cpu_seconds(base)
            took = cpu_seconds(function)
            after = cpu_seconds(base)
            found[name].append(2 * took / (before + after))
    return {name: statistics.median(values) for name, values in found.items()}


def matmul_share(function):
    """Share of matrix products in the CPU time of a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        function()
    times = {event.key: event.self_cpu_time_total for event in seen.key_averages()}
    products = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm")
    return sum(times.get(name, 0) for name in products) / sum(times.values())


def costs():
    """Rows of table cost."""
    for name, (size, rounds) in SIZES.items():
        case = hvp_methods.Case(*size)
        functions = hvp_methods.methods(case)

        def gradient(case=case):
            return hvp.gradient(case.loss, case.params)

        truth = functions["double backward"]()
        memory = hvp_methods.peak(gradient)
        share = matmul_share(gradient)
        for method, cost in ratios(functions, gradient, rounds).items():
            row = {"table": "cost", "model": name, "parameters": case.parameters, "length": case.length}
            row |= {"method": method, "cost": f"{cost:.2f}", "matmul": f"{share:.2f}"}
            if method.startswith("R operator"):
                row["floor"] = f"{case.floors()[0 if 'alone' in method else 1]:.2f}"
            row["memory"] = f"{hvp_methods.peak(functions[method]) / memory:.2f}"
            away = [a.detach() - b for a, b in zip(functions[method](), truth, strict=True)]
            row["error"] = f"{length(away) / length(truth):.1e}"
            yield row


def case_of(model, draw):
    """(loss, params, v) on batches of this draw alone."""
    params = oracles.parameters(model)[1]
    losses = [
        oracles.language_loss(model, *oracles.batch(VOCABULARY, 4, LENGTH, 2 * draw + i)) for i in (0, 1)
    ]
    return losses[0], params, hvp.gradient(losses[1], params)


def accuracy():
    """Rows of table accuracy."""
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
            case = case_of(model, 0)
            timed = {name: lambda method=method: method(*case) for name, method in METHODS.items()}  # noqa: B023
            for name, cost in ratios(timed, lambda: hvp.gradient(*case[:2]), ROUNDS).items():  # noqa: B023
                errors, estimates = zip(*found[name], strict=True)
                known = [e for e in estimates if e is not None]
                row = {
                    "table": "accuracy",
                    "model": kind,
                    "weights": state,
                    "method": name,
                    "cost": f"{cost:.2f}",
                }
                row |= {"error": f"{statistics.median(errors):.1e}", "largest_error": f"{max(errors):.1e}"}
                yield row | ({"estimate": f"{min(known):.2f}..{max(known):.2f}"} if known else {})


def main():
    torch.set_num_threads(1)
    rows = []
    for table in (costs(), accuracy()):
        for row in table:
            if not rows or rows[-1]["table"] != row["table"]:
                print("\n" + row["table"])
            rows.append(row)
            print("\t".join(f"{row[c]} {c}" if c not in ("model", "method") else row[c]
                            for c in COLUMNS[1:] if c in row), flush=True)  # fmt: skip
    with open(HERE / "hvp.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
