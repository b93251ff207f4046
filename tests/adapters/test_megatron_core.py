"""Probes of a megatron-core GPTModel: tensor parallelism changes nothing but the last digits."""

import numpy as np
import pytest
import ranks
import torch
from megatron_models import probed

EXACT = [("exact", "identity"), ("exact", "adam")]
CASES = [(*case, torch.float64) for case in EXACT]
CASES += [(*case, torch.float32) for case in (*EXACT, ("difference", "adam"))]


@pytest.fixture(scope="module")
def told():
    """What one process found, and what each of two tensor-parallel ranks found."""
    return ranks.run(probed, 1, 1, CASES, timeout=150)[0], ranks.run(probed, 2, 2, CASES, timeout=150)


def away(found, true):
    """Largest error of M, P, score and its error, each over the largest of its own numbers."""
    return max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(found, true, strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tensor_parallel_ranks_measure_what_one_process_does(told, case):
    """In float64 to 1e-10; in float32 within eight times what one process errs by itself."""
    (alone, _), pair = told
    true = alone["exact", case[1], torch.float64]
    assert np.abs(true[1]).max() > 1e-3 * np.abs(true[0]).max() > 0
    limit = 1e-10 if case[2] is torch.float64 else 8 * away(alone[case], true)
    for found, _ in pair:
        assert away(found[case], true) <= limit < 0.1


def test_every_parameter_is_counted_once(told):
    (_, whole), pair = told
    assert sum(counted for _, counted in pair) == whole
