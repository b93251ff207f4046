"""Training jobs in other layouts and precisions: tensor parallelism with dropout, and probes of a bf16 model."""

import jobs
import numpy as np
import pytest
import ranks

from megatron_commute import record

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
