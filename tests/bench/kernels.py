"""CPU time of the compiled kernels against plain PyTorch, one thread: `python tests/bench/kernels.py [--elements N]`.

Prints a table and writes kernels.csv beside itself. speedup: time of the reference in kernels/reference.py over
that of the kernel, the two alternating in one process, median with least and largest of the rounds. megabytes: what the
count on paper moves, every operand read once, every result written once. reading: time over that of torch.sum over as
many bytes. gram: the same against torch.sum over the vectors themselves, and against K M calls of torch.dot.

Gram of 8 x 8 on one core of type Zen 4, 2026-11-22: 1.03 at 2e6 elements, 1.20 at 2e7, and 5.5 times as fast as 64 dots
(before: 1.65 and 3.7). The same at 2e6 in 16 tensors of their own, which begin at one place of their pages and compete for
one set of cache lines: 1.41. Products alone, from the first cache, take 0.43 of a read at 16 GB/s; the ratio grows to 1.3
when neighbours leave the core 21 GB/s. With AVX2 alone 1.12 to 1.4 (2.6 before GCC was told to unroll the rows).
Tried in vain: fetching into the first cache (1.2 to 2.0), four lines of one row at a time instead of one line of four (up
to 1.6), fetches that begin at 4 KiB with blocks of 2 KiB (1.7), tiles of 4 x 2, registers of 512 bits, chains of floats
up to the end of a block, and tiles in to-and-fro order (each within the noise, or slower).

What nvcc makes of the CUDA kernels, and a time predicted from it for a GPU they never ran on, is in ptx_gate.py.
"""

import argparse
import csv
import statistics
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1])]

from megatron_commute import ops
from megatron_commute.kernels import reference

ROUNDS, VECTORS = 7, 8
TOKENS, HIDDEN, INNER, WORDS = 512, 1024, 4096, 16384
COLUMNS = ["kernel", "dtype", "megabytes", "speedup", "least", "largest", "reading"]
COLUMNS += ["reading_least", "reading_largest", "over_dots"]


def draw(*shape, dtype):
    return torch.randn(*shape).to(dtype)


def norm_cases(kind, dtype):
    x, dx, gy, dgy = (draw(TOKENS, HIDDEN, dtype=dtype) for _ in range(4))
    w, dw, b, db = (draw(HIDDEN, dtype=dtype) for _ in range(4))
    forward = (x, dx, w, dw, *((b, db) if kind == "layer" else (None, None)), 1e-5, kind)
    yield "norm_forward", forward
    yield "norm_backward", (gy, dgy, x, dx, ops.norm_forward(*forward)[2], w, dw, kind)


def activation_cases(kind, dtype):
    width = 2 * INNER if kind == "swiglu" else INNER
    x, dx = (draw(TOKENS, width, dtype=dtype) for _ in range(2))
    b, db = (draw(width, dtype=dtype) for _ in range(2))
    gy, dgy = (draw(TOKENS, INNER, dtype=dtype) for _ in range(2))
    yield "activation_forward", (x, dx, b, db, kind)
    yield "activation_backward", (gy, dgy, x, dx, b, db, kind)


def cross_entropy_cases(dtype):
    logits, dlogits = (draw(TOKENS // 4, WORDS, dtype=dtype) for _ in range(2))
    labels = torch.randint(WORDS, (TOKENS // 4,))
    yield "cross_entropy_statistics", (logits, dlogits, labels, 0)
    statistics = ops.cross_entropy_statistics(logits, dlogits, labels, 0)
    yield "cross_entropy_backward", (logits, dlogits, labels, 0, statistics, 1e-3)


def cases(dtype):
    """(name in the table, function, arguments) of every elementwise kernel."""
    for kind in ("layer", "rms"):
        yield from ((f"{name} {kind}", name, arguments) for name, arguments in norm_cases(kind, dtype))
    for kind in ("gelu_tanh", "gelu_erf", "swiglu"):
        yield from ((f"{name} {kind}", name, arguments) for name, arguments in activation_cases(kind, dtype))
    yield from ((name, name, arguments) for name, arguments in cross_entropy_cases(dtype))


def seconds(function, *arguments):
    start = time.process_time()
    function(*arguments)
    return time.process_time() - start


def size_in_bytes(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


def spread(values):
    return [f"{f(values):.2f}" for f in (statistics.median, min, max)]


def measure(name, function, arguments, dtype, rounds=ROUNDS):
    """A row of the table for one kernel."""
    kernel, plain = getattr(ops, function), getattr(reference, function)
    found = kernel(*arguments)
    moved = size_in_bytes(*arguments, *(found if isinstance(found, tuple) else (found,)))
    same = torch.ones(moved // 4)
    speedups, readings = [], []
    for _ in range(rounds):
        before, own, read = seconds(plain, *arguments), seconds(kernel, *arguments), seconds(same.sum)
        speedups.append(before / own)
        readings.append(own / read)
    values = [
        name,
        str(dtype).removeprefix("torch."),
        f"{moved / 1e6:.1f}",
        *spread(speedups),
        *spread(readings),
        "",
    ]
    return dict(zip(COLUMNS, values, strict=True))


def gram_ratios(elements, rounds=ROUNDS):
    """Time of gram of 8 x 8 vectors over that of reading them, a list; and of 64 dots over gram, one number."""
    table = torch.randn(2 * VECTORS, elements)
    X, Y = [[row] for row in table[:VECTORS]], [[row] for row in table[VECTORS:]]
    ratios = []
    for _ in range(rounds):
        read = seconds(lambda: [row.sum() for row in table])
        ratios.append(seconds(ops.gram, X, Y) / read)
    dots = seconds(lambda: [torch.dot(x, y) for (x,) in X for (y,) in Y])
    return ratios, dots / min(seconds(ops.gram, X, Y) for _ in range(3)), size_in_bytes(table)


def gram_row(elements):
    ratios, dots, moved = gram_ratios(elements)
    values = [
        f"gram 8 x 8 x {elements}",
        "float32",
        f"{moved / 1e6:.1f}",
        "",
        "",
        "",
        *spread(ratios),
        f"{dots:.2f}",
    ]
    return dict(zip(COLUMNS, values, strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--elements", type=int, default=50_000_000, help="of a vector of gram")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if not ops.compiled("cpu", torch.float32):
        sys.exit("the CPU kernels were not built: pip install -e . with a C++17 compiler on PATH")
    rows = [measure(*case, dtype) for dtype in (torch.float32, torch.bfloat16) for case in cases(dtype)]
    rows += [gram_row(n) for n in sorted({2_000_000, options.elements})]
    with (HERE / "kernels.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    for row in [dict(zip(COLUMNS, COLUMNS, strict=True)), *rows]:
        print(f"{row['kernel']:34}" + "".join(f"{row[c]:>16}" for c in COLUMNS[1:]))


if __name__ == "__main__":
    main()
