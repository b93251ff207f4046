"""Probes with vectors in shards on Megatron-DeepSpeed: the same P as with whole vectors, in every kind of layout."""

from pathlib import Path

import agreement
import layouts
import matrix
import numpy as np
import pytest

# the three stages that cut something, precision of its own, replicas of a pipeline and of a tensor-parallel model
LAYOUTS = ["zero1", "zero2", "zero3", "bf16-zero1", "pp2-dp2", "tp2-dp2"]


def job(scratch, data, tree, name, mode, *more):
    """Two steps with a probe between them, under the optimiser's own metric. more: flags."""
    planned = agreement.job(scratch, data, tree, name, "difference")
    out = Path(scratch, "probes", "-".join([name, mode, *more]))
    extra = f"probe: {{samples: 8, splits: 2, metric: adam, memory: {mode}}}"
    file = matrix.jobs.write_mixture(
        str(data), f"{mode}.yaml", mode="shadow", iters=2, batch=layouts.BATCH, extra=extra
    )
    Path(file).write_text(Path(file).read_text().replace("every: 8", "every: 1"))
    argv = layouts.flags(name, data, out / "save", *agreement.STILL, *more, "--commute", file, iters=2)
    return {**planned, "argv": argv, "out": str(out)}


@pytest.fixture(scope="module")
def told(scratch):
    """{(layout, mode): (P, largest |M|, how the start line says probes work)}."""
    _, tree = matrix.trees(scratch)
    data = matrix.prepare(scratch)
    planned = {
        (name, mode): job(scratch, data, tree, name, mode) for name in LAYOUTS for mode in ("full", "sharded")
    }
    matrix.run(scratch, {"-".join(key): one for key, one in planned.items()})
    return {
        key: (*agreement.measured(one), matrix.record(one)[0]["memory"]["mode"])
        for key, one in planned.items()
    }


@pytest.mark.parametrize("name", LAYOUTS)
def test_shards_measure_what_whole_vectors_do(told, name):
    """A difference in float32: to 1e-4 of max|M|, as between layouts. ZeRO 3 has nothing but shards, whatever is wished:
    agreement.py compares it with one process.
    """
    whole, shards = told[name, "full"], told[name, "sharded"]
    assert shards[2] == "sharded" and whole[2] == ("sharded" if name == "zero3" else "full")
    assert np.abs(shards[0] - whole[0]).max() <= 1e-4 * whole[1]


def test_adams_metric_under_zero3_is_that_of_one_process_where_nothing_decays(scratch):
    """This host decays what has two dimensions, and under ZeRO 3 no parameter has: there Adam, which on a CPU adds the
    decay to the gradient, has other second moments, and P goes with them.
    """
    _, tree = matrix.trees(scratch)
    data = matrix.prepare(scratch)
    off = ("--weight-decay", "0")
    planned = {
        (name, more): job(scratch, data, tree, name, "auto", *more)
        for name in ("single", "zero1", "zero3")
        for more in ((), off)
    }
    matrix.run(scratch, {" ".join([name, *more]): one for (name, more), one in planned.items()})
    found = {key: agreement.measured(one) for key, one in planned.items()}
    error = {
        key: np.abs(P - found["single", key[1]][0]).max() / found["single", key[1]][1]
        for key, (P, _) in found.items()
    }
    assert max(error["zero1", ()], error["zero1", off], error["zero3", off]) <= 1e-4 < error["zero3", ()]
