"""gram and displace against sums in float64 and in integers."""

import math

import pytest
import torch

from megatron_commute import ops

SHAPES = [(3, 5), (7,), ()]


def vectors(count, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(s, generator=generator).to(dtype) for s in SHAPES] for _ in range(count)]


def numbers(vector):
    return [x for t in vector for x in t.double().flatten().tolist()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("weighted", [False, True])
def test_gram_equals_exactly_rounded_sums(dtype, weighted):
    x, y = vectors(3, 0, dtype), vectors(4, 1, dtype)
    metric = [t.abs() for t in vectors(1, 2)[0]] if weighted else None
    d = numbers(metric) if weighted else [1.0] * len(numbers(x[0]))
    found = ops.gram(x, y, metric)
    assert found.shape == (3, 4)
    assert found.dtype is torch.float64
    for k, a in enumerate(x):
        for m, b in enumerate(y):
            truth = math.fsum(p * q * r for p, q, r in zip(numbers(a), d, numbers(b), strict=True))
            assert found[k, m].item() == pytest.approx(truth, rel=1e-13, abs=1e-13)


def test_gram_accumulates_in_float64_across_chunks(monkeypatch):
    # 2^24 + many ones: float32 sums would stop counting
    x = [[torch.cat([torch.tensor([4096.0]), torch.ones(1000)])]]
    assert ops.gram(x, x).item() == 4096.0**2 + 1000
    monkeypatch.setattr(ops, "_CHUNK", 7)
    y = vectors(2, 3)
    assert torch.allclose(ops.gram(y, y), ops.gram(y, y).T, rtol=0, atol=0)
    assert ops.gram(x, x).item() == 4096.0**2 + 1000


def test_gram_of_a_list_with_itself_and_of_strided_tensors():
    x = vectors(3, 4)
    copies = [[t.clone() for t in v] for v in x]
    assert torch.equal(ops.gram(x, x), ops.gram(x, copies))
    turned = [[t.T.contiguous().T if t.dim() == 2 else t for t in v] for v in x]
    assert torch.equal(ops.gram(turned, x), ops.gram(x, x))


def test_gram_of_large_values_does_not_overflow():
    big = [[torch.full((10,), 1e30)]]
    assert ops.gram(big, big).item() == pytest.approx(1e61)


@pytest.mark.parametrize(
    ("x", "y", "metric", "text"),
    [
        ([], vectors(1, 0), None, "at least one vector"),
        (vectors(1, 0), [], None, "at least one vector"),
        ([[]], [[]], None, "at least one tensor"),
        (vectors(2, 0), [vectors(1, 0)[0][:2]], None, r"X\[0\] and Y\[0\] have 3 and 2 tensors"),
        (vectors(1, 0), [[t[:1] if t.dim() else t for t in vectors(1, 0)[0]]], None, "differ at tensor 0"),
        (vectors(1, 0), vectors(1, 0), vectors(1, 0)[0][:1], "X.0. and metric"),
    ],
)
def test_gram_refuses_what_does_not_fit(x, y, metric, text):
    with pytest.raises(ValueError, match=text):
        ops.gram(x, y, metric)


def test_displace_leaves_its_arguments_alone():
    params, v = vectors(2, 5)
    params = [p.requires_grad_(True) for p in params]
    before = [p.detach().clone() for p in params]
    moved = ops.displace(params, v, 0.5)
    assert all(torch.equal(m, b + 0.5 * u) for m, b, u in zip(moved, before, v, strict=True))
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert not any(
        m.requires_grad or m.data_ptr() == p.data_ptr() for m, p in zip(moved, params, strict=True)
    )


def test_displace_keeps_the_precision_of_the_parameters_and_refuses_other_shapes():
    params, v = vectors(1, 6, torch.float64)[0], vectors(1, 7)[0]
    assert all(m.dtype is torch.float64 for m in ops.displace(params, v, 1e-9))
    fine = [p / 3 for p in params]  # needs float64
    moved = ops.displace(params, fine, 0.5)
    assert all(torch.equal(m, p + 0.5 * u) for m, p, u in zip(moved, params, fine, strict=True))
    with pytest.raises(ValueError, match="params and v have 3 and 2 tensors"):
        ops.displace(params, v[:2], 1.0)
