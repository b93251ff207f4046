"""Training jobs in other layouts and precisions: tensor parallelism with dropout, and probes of a bf16 model."""

import jobs
import numpy as np
import pytest
import ranks
import stacks
import torch

from megatron_commute import reduce
from megatron_commute.adapters import torch_loop
from megatron_commute.measure import probe
from megatron_commute.record import log as record

PROBE = "probe: {samples: 8, splits: 2, method: %s, metric: adam}"


def both(rank, folder):
    """On two ranks: a tensor-parallel run with dropout, then bf16 runs by both methods. What the first probe saw."""
    act = jobs.write_mixture(folder, f"act{rank}.yaml", iters=10, extra=PROBE % "difference")
    exact = jobs.write_mixture(folder, f"exact{rank}.yaml", iters=10, extra=PROBE % "exact")
    short = {"iters": 10}
    tensor = jobs.flags(
        folder, "--commute", act, "--save", folder / "tensor", "--tensor-model-parallel-size", 2, **short
    )
    (seen,) = jobs.train(rank, [tensor])
    half = [("difference", act), ("exact", exact)]
    runs = [
        (jobs.flags(folder, "--commute", file, "--save", folder / name, "--bf16", **short), None)
        for name, file in half
    ]
    return seen["probes"][0]["state"], seen["losses"], jobs.outcomes(rank, runs)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    jobs.write_data(folder)
    return folder, ranks.run(both, 2, folder, timeout=200)


def test_with_dropout_tensor_parallel_ranks_keep_equal_copies_of_what_they_share(told):
    """Dropout of shared activations must be the same on both, or layer norms and positions drift apart."""
    one, two = (state for state, _, _ in told[1])
    shared = [name for name in one if "layernorm" in name or "position" in name]
    assert len(shared) > 8
    for name in shared:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)
    np.testing.assert_array_equal(*(np.array(losses) for _, losses, _ in told[1]))


def test_bf16_models_are_measured_in_float32_by_both_methods(told):
    """Both read the same float32 copies of bf16 weights, so they agree as closely as in a float32 run."""
    folder, outcomes = told
    assert [ended for _, _, ended in outcomes] == [["finished", "finished"]] * 2
    probes = [
        [line for line in record.read(folder / name) if line["event"] in ("probe", "skip")]
        for name in ("difference", "exact")
    ]
    assert [[line["event"] for line in lines] for lines in probes] == [["probe"]] * 2
    one, two = (np.array(lines[0]["P"]) for lines in probes)
    assert 0 < np.abs(one - two).max() <= 1e-3 * np.abs(probes[1][0]["M"]).max()


REASONS = {
    "data": "rank 1: Hessian-vector products: ValueError: token 99 is outside the vocabulary",
    "memory": "rank 1: Hessian-vector products: OutOfMemoryError: CUDA out of memory",
    "nan": "rank 1: Hessian-vector products: FloatingPointError: the gradient is not finite",
    "late": "rank 1: direction: TimeoutError: the probe ran past probe.time_limit",
}


def shared(rank):
    """On 2 ranks that hold one model, as tensor-parallel ranks do: each kind of fault on rank 1 alone."""
    module, groups, how = stacks.Stack(), reduce.Groups(None, reduce.everyone(), reduce.everyone()), {}
    owned = [rank == 0 or p.dim() > 1 for p in module.parameters()]
    for kind in (*REASONS, "none"):

        def draw(part, domain, numbers, kind=kind):
            if rank == 1 and (part, domain, len(numbers)) == ("gradient", 2, 2):
                if kind == "data":
                    raise ValueError("token 99 is outside the vocabulary")
                if kind == "memory":
                    raise torch.OutOfMemoryError("CUDA out of memory")
            return stacks.draw(part, domain, numbers)

        def loss(module, tokens, kind=kind):
            value = stacks.loss(module, tokens)
            return value * float("nan") if kind == "nan" and rank == 1 and len(tokens) == 2 else value

        model = torch_loop.probe_model(module, loss, 2, owned=owned, groups=groups)
        limit = 0.0 if kind == "late" and rank == 1 else 1e9
        asked, team = stacks.settings(), reduce.team(groups, 2)
        try:
            arguments = (groups, team, draw, asked, stacks.TARGET, stacks.WEIGHTS, stacks.FLOW, limit)
            how[kind] = str(np.isfinite(probe.measure(model, *arguments).P).all())
        except probe.ProbeFailed as fault:
            how[kind] = str(fault)
    return how


def test_ranks_that_share_a_model_give_a_probe_up_together():
    for told in ranks.run(shared, 2, timeout=200):
        assert told.pop("none") == "True"
        assert set(told) == set(REASONS)
        assert all(REASONS[kind] in reason for kind, reason in told.items()), told
