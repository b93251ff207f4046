"""Dual causal attention on the CPU, tiled against materialised: `python tests/bench/attention.py`.

Writes attention.csv beside itself. Ratios of CPU time of one thread, median of interleaved rounds: forward, backward and
both passes of the materialised reference over the tiled kernel's; tiled and materialised over a gradient of torch's
own tiled scaled_dot_product_attention (counted in multiplications: 3.0, scores recomputed in both). MB: memory that
forward and backward took at most beyond their inputs, in a process of their own.
"""

import contextlib
import csv
import os
import resource
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_commute import ops

HERE = Path(__file__).resolve().parent
HEADS, ROUNDS = 4, 7
CASES = [
    (128, 64),
    (256, 64),
    (512, 16),
    (512, 32),
    (512, 64),
    (512, 128),
    (1024, 64),
    (1024, 128),
    (2048, 64),
]


def draw(s, c, dtype):
    torch.manual_seed(0)
    return [torch.randn(1, HEADS, s, c).to(dtype) for _ in range(8)]  # q, dq, k, dk, v, dv, go, dgo


def forward(x):
    return ops.attention_forward(*x[:6], x[0].shape[-1] ** -0.5)


def backward(x, kept):
    return ops.attention_backward(*x[6:], *x[:6], *kept, x[0].shape[-1] ** -0.5)


def gradient(x):
    q, k, v = (t.requires_grad_() for t in (x[0], x[2], x[4]))
    o = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return torch.autograd.grad(o, (q, k, v), x[6])


def seconds(function, *args):
    start = time.process_time()
    function(*args)
    return time.process_time() - start


def costs(s, c, dtype):
    """Seconds of tiled forward and backward, materialised forward and backward, gradient: medians."""
    x = draw(s, c, dtype)
    kept = forward(x)
    samples = []
    for _ in range(ROUNDS + 1):
        tiled = seconds(forward, x), seconds(backward, x, kept)
        with ops.references():
            whole = seconds(forward, x), seconds(backward, x, kept)
        samples.append((*tiled, *whole, seconds(gradient, [t.clone() for t in x])))
    return [statistics.median(column) for column in zip(*samples[1:], strict=True)]


def peak(s, c, dtype, tiled):
    """Megabytes that both passes add to the largest resident size of a forked process."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        x = draw(s, c, dtype)
        small = draw(32, c, dtype)
        with contextlib.nullcontext() if tiled else ops.references():
            backward(small, forward(small))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with contextlib.nullcontext() if tiled else ops.references():
            backward(x, forward(x))
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        os.write(writer, str(grown / 1024).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        return float(pipe.read())


def main():
    torch.set_num_threads(1)
    if not ops.compiled("cpu", torch.float32):
        sys.exit("the kernels are not built: python setup.py build_ext --inplace")
    cases = [(torch.float32, *case) for case in CASES] + [(torch.bfloat16, 512, 64)]
    memory = {(case, tiled): peak(*case[1:], case[0], tiled) for case in cases for tiled in (True, False)}
    rows = []
    for dtype, s, c in cases:
        forward_, backward_, whole_forward, whole_backward, plain = costs(s, c, dtype)
        row = {"dtype": str(dtype).removeprefix("torch."), "sequence": s, "columns": c}
        row |= {"forward": whole_forward / forward_, "backward": whole_backward / backward_}
        row["both"] = (whole_forward + whole_backward) / (forward_ + backward_)
        row["tiled_over_gradient"] = (forward_ + backward_) / plain
        row["materialised_over_gradient"] = (whole_forward + whole_backward) / plain
        row |= {"tiled_MB": memory[(dtype, s, c), True], "materialised_MB": memory[(dtype, s, c), False]}
        rows.append({key: f"{x:.2f}" if isinstance(x, float) else x for key, x in row.items()})
        print(*rows[-1].values(), sep="\t")
    with open(HERE / "attention.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
