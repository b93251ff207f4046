"""P of one model on the same samples, measured by Megatron-DeepSpeed in every layout and compared with a single process.

    MEGATRON_DEEPSPEED=PATH python tests/megatron_deepspeed/agreement.py

Prints one row for each layout and method and rewrites agreement.csv; five minutes on two cores. Method fused is compared
with exact in a single process. Every parameter has values that depend on its name and place in the whole model alone; the
learning rate is zero.
"""

import os
import shutil
import tempfile
from pathlib import Path

import layouts
import matrix
import numpy as np

ROWS = (  # layout, method, compared with: the single process in the same precision
    ("zero1", "difference", "single"),
    ("zero2", "difference", "single"),
    ("zero3", "difference", "single"),
    ("tp2", "difference", "single"),
    ("pipe1", "difference", "single"),
    ("pp2", "difference", "single"),
    ("pp2-tp2", "difference", "single"),
    ("pp2-dp2", "difference", "single"),
    ("checkpointing", "difference", "single"),
    ("bf16-zero1", "difference", "bf16-single"),
    ("bf16-pp2", "difference", "bf16-single"),
    ("zero1", "exact", "single"),
    ("zero2", "exact", "single"),
    ("tp2", "exact", "single"),
    ("checkpointing", "exact", "single"),
    ("single", "fused", "single"),
    ("zero1", "fused", "single"),
    ("zero2", "fused", "single"),
    ("tp2", "fused", "single"),
    ("checkpointing", "fused", "single"),
    ("bf16-zero1", "fused", "bf16-single"),
    ("fp16", "difference", "fp16-single"),
    ("fp16-pp2", "difference", "fp16-single"),
    ("fp16", "exact", "fp16-single"),
    ("fp16", "fused", "fp16-single"),
    ("flash", "difference", "bf16-single"),
    ("flash-pp2", "difference", "bf16-single"),
    ("flash", "exact", "bf16-single"),
    ("flash", "fused", "bf16-single"),
    # what rounding the weights does: probes read those that the forward pass of training reads
    ("bf16-single", "exact", "single"),
    ("fp16-single", "exact", "single"),
)
LIMITS = {"difference": 1e-4, "exact": 1e-5, "fused": 1e-5}  # float32 on any processor
ROUNDED = 1e-2  # of max|M|; the eight sequences of a probe leave P some tenths of it uncertain
ORACLE = {"difference": "difference", "exact": "exact", "fused": "exact"}  # the method of the single process
STILL = ["--lr", "0", "--lr-warmup-iters", "0", "--min-lr", "0"]
STILL += ["--hidden-dropout", "0", "--attention-dropout", "0"]


def job(folder, data, tree, name, method):
    """One run of two steps with a probe between them."""
    out = Path(folder, "probes", f"{name}-{method}")
    shutil.rmtree(out, ignore_errors=True)
    extra = f"probe: {{samples: 8, splits: 2, metric: identity, method: {method}}}"
    file = matrix.jobs.write_mixture(
        str(data), f"{method}.yaml", mode="shadow", iters=2, batch=layouts.BATCH, extra=extra
    )
    Path(file).write_text(Path(file).read_text().replace("every: 8", "every: 1"))
    argv = layouts.flags(name, data, out / "save", *STILL, "--commute", file, iters=2)
    ranks = layouts.LAYOUTS[name].ranks
    return {
        "script": f"{tree}/pretrain_gpt.py",
        "argv": argv,
        "ranks": ranks,
        "out": str(out),
        "seeded": True,
    }


def measured(planned):
    """(P, largest |M|) of the one probe of a job, None where it was not measured."""
    probes = [line for line in matrix.record(planned) if line["event"] == "probe"]
    if len(probes) != 1:
        return None
    return np.array(probes[0]["P"]), np.abs(np.array(probes[0]["M"])).max()


def rows(folder, wanted=ROWS):
    """Run the layouts of `wanted` and those they are compared with; one dict for each."""
    _, tree = matrix.trees(folder)
    data = matrix.prepare(folder)
    names = {(name, method) for name, method, _ in wanted}
    names |= {(other, ORACLE[method]) for _, method, other in wanted}
    planned = {f"{name}-{method}": job(folder, data, tree, name, method) for name, method in sorted(names)}
    matrix.run(folder, planned)
    for name, method, other in wanted:
        found, truth = (measured(planned[f"{n}-{m}"]) for n, m in ((name, method), (other, ORACLE[method])))
        error = float("nan")
        if found is not None and truth is not None:
            error = float(np.abs(found[0] - truth[0]).max() / truth[1])
        told = {"layout": name, "ranks": layouts.LAYOUTS[name].ranks, "method": method}
        told["against"] = f"{other} {ORACLE[method]}"
        limit = ROUNDED if name in ("bf16-single", "fp16-single") else LIMITS[method]
        yield {**told, "error": error, "limit": limit, "within": error <= limit}


def main():
    with tempfile.TemporaryDirectory() as scratch:
        found = []
        for row in rows(os.environ.get("MATRIX_FOLDER", scratch)):
            found.append(row)
            print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    write(found)


def write(found):
    rounded = [{**row, "error": f"{row['error']:.2g}"} for row in found]
    matrix.write(Path(__file__).with_suffix(".csv"), rounded)


if __name__ == "__main__":
    main()
