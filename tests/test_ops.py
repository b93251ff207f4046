"""gram and displace against sums in float64 and in integers; what the faces refuse; the operators' registration."""

import itertools
import math

import pytest
import torch
from kernel_cases import cases, converted, heads

from megatron_commute import ops
from megatron_commute.kernels import compiled as _kernels
from megatron_commute.kernels import reference

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


def long_vectors(count, seed, dtype=torch.float32):
    """Vectors above 2^20 elements, where compiled sums start in float32; odd sizes, tensors that split pieces."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (5, 700_001, 1, 400_003)
    return [[torch.randn(s, generator=generator).to(dtype) for s in sizes] for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [(1, 1), (3, 5), (8, 8)])
def test_gram_of_long_vectors(dtype, counts):
    x, y, minus = (long_vectors(n, i, dtype) for i, n in enumerate((*counts, counts[0])))
    metric = [t.abs() for t in long_vectors(1, 9)[0]]
    # short products of bfloat16 fall on ties of float32, whose roundings do not average out
    limit = 1e-9 if dtype is torch.float32 else 3e-8
    lengths = reference.gram(x, x).diag().sqrt()[:, None] * reference.gram(y, y).diag().sqrt()
    for arguments in ((), (metric,), (metric, minus, 0.3), (None, minus, -0.7)):
        found, truth = (m.gram(x, y, *arguments) for m in (ops, reference))
        assert ((found - truth).abs() <= limit * lengths).all()
    own = ops.gram(x, x)
    assert torch.equal(own, own.T)
    assert ((own - reference.gram(x, x)).abs() <= limit * own.diag().max()).all()


def test_gram_of_long_vectors_wherever_they_lie_and_however_many_threads_read():
    # rows are read where they are, at any place of a cache line, or from a buffer: the same bits
    x, y = long_vectors(5, 0), long_vectors(4, 1)
    moved = [[torch.cat([t.new_zeros(1 + k), t])[1 + k :] for t in row] for k, row in enumerate(x)]
    ones = [torch.ones_like(t) for t in x[0]]
    assert torch.equal(ops.gram(moved, y), ops.gram(x, y))
    assert torch.equal(ops.gram(x, y, ones), ops.gram(x, y))
    alone, before = ops.gram(x, y), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(ops.gram(x, y), alone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_gram_of_long_vectors_that_float32_products_cannot_hold(scale):
    x = [[t * scale for t in long_vectors(1, 0)[0]]]
    assert ops.gram(x, x).item() == pytest.approx(reference.gram(x, x).item(), rel=1e-12)


def test_gram_of_64_vectors_on_either_side_and_of_mixed_dtypes():
    x, y = vectors(64, 0), vectors(64, 1, torch.bfloat16)
    assert torch.allclose(ops.gram(x, y), reference.gram(x, y), rtol=1e-13, atol=1e-13)
    assert torch.allclose(
        ops.gram(x, vectors(65, 1)), reference.gram(x, vectors(65, 1)), rtol=1e-13, atol=1e-13
    )
    assert torch.equal(
        ops.gram([[torch.empty(0)]], [[torch.empty(0)]]), torch.zeros(1, 1, dtype=torch.float64)
    )
    assert ops.gram([[torch.tensor([1.0, math.nan])]], [[torch.ones(2)]]).isnan().all()


@pytest.mark.skipif(_kernels._cpu is None, reason="the CPU kernels were not built: no C++ compiler")
@pytest.mark.parametrize("size", [0, 1, 16384, 16385, 2**31 + 5, 2**40 + 1, 2**62 + 3])
def test_pieces_cover_any_number_of_elements_without_allocating(size):
    pieces = _kernels._cpu.pieces(size)
    assert 1 <= len(pieces) <= 256
    assert pieces[0][0] == 0 and pieces[-1][1] == size
    assert all(a[1] == b[0] for a, b in itertools.pairwise(pieces))
    assert all(begin <= end and end - begin <= max(2**14, size / 256 + 2**15) for begin, end in pieces)


def test_gram_of_a_list_with_itself_and_of_strided_tensors():
    x = vectors(3, 4)
    copies = [[t.clone() for t in v] for v in x]
    assert torch.equal(ops.gram(x, x), ops.gram(x, copies))
    turned = [[t.T.contiguous().T if t.dim() == 2 else t for t in v] for v in x]
    assert torch.equal(ops.gram(turned, x), ops.gram(x, x))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_displace_along_a_metric_says_what_it_really_added(dtype):
    params, v = vectors(1, 8, dtype)[0], vectors(1, 9)[0]
    metric = [t.abs() for t in vectors(1, 10)[0]]
    moved, step = ops.displace(params, v, 0.3, metric, realised=True)
    for p, u, d, m, s in zip(params, v, metric, moved, step, strict=True):
        assert m.dtype is dtype and s.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
        exact = p.double() + 0.3 * d.double() * u.double()
        assert torch.allclose(m.double(), exact, rtol=5e-3 if dtype is torch.bfloat16 else 1e-6, atol=1e-6)
        assert torch.allclose(s.double(), m.double() - p.double(), rtol=1e-6, atol=1e-6)
    with ops.references():
        plain = ops.displace(params, v, 0.3, metric)
    assert all(torch.allclose(a, b, rtol=1e-2, atol=1e-6) for a, b in zip(moved, plain, strict=True))


def every_case():
    return [*cases(5, 6), *heads(s=5, c=8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_references_can_be_asked_for(dtype):
    assert ops.compiled("cpu", dtype) == (_kernels._cpu is not None)
    with ops.references():
        assert not ops.compiled("cpu", dtype)
        for _, function, arguments in every_case():
            given = converted(arguments, dtype)
            found, truth = (getattr(m, function)(*given) for m in (ops, reference))
            pairs = zip(*(t if isinstance(t, tuple) else (t,) for t in (found, truth)), strict=True)
            assert all(a is b is None or torch.equal(a, b) for a, b in pairs)
    assert not ops.compiled("cpu", torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operators_pass_opcheck(dtype):
    seen = set()
    for name, function, arguments in every_case():
        if name in seen:
            continue
        seen.add(name)
        operator = getattr(torch.ops.megatron_commute, function).default
        torch.library.opcheck(operator, converted(arguments, dtype))
    tensors = [t.flatten() for v in vectors(3, 0, dtype) for t in v]
    torch.library.opcheck(torch.ops.megatron_commute.gram.default, (tensors, 1, 1, True, 0.0, False))
    arguments = (tensors[0], tensors[3], None, 0.5, True)
    torch.library.opcheck(torch.ops.megatron_commute.displace.default, arguments)


def test_no_rows_give_empty_results_and_zero_sums():
    none, weight = torch.empty(0, 6), torch.ones(6)
    y, dy, saved = ops.norm_forward(none, none, weight, weight, None, None, 1e-5, "rms")
    assert y.shape == dy.shape == (0, 6) and saved.shape == (0, 4)
    back = ops.norm_backward(none, none, none, none, saved, weight, weight, "layer")
    assert all(torch.equal(t, torch.zeros(6)) for t in back[2:])
    assert ops.cross_entropy_statistics(none, none, torch.empty(0, dtype=torch.int64), 0).shape == (0, 5)


def test_memory_that_is_not_contiguous_is_copied():
    for _, function, arguments in every_case():
        given = converted(arguments, torch.float32)
        turned = [t.mT.contiguous().mT if isinstance(t, torch.Tensor) and t.dim() > 1 else t for t in given]
        found, truth = (getattr(ops, function)(*a) for a in (turned, given))
        pairs = zip(*(t if isinstance(t, tuple) else (t,) for t in (found, truth)), strict=True)
        assert all(a is b is None or torch.equal(a, b) for a, b in pairs)


X, W, L = torch.ones(3, 4), torch.ones(4), torch.zeros(3, dtype=torch.int64)
Q = torch.ones(1, 4, 3, 2)


@pytest.mark.parametrize(
    ("function", "arguments", "error", "text"),
    [
        ("norm_forward", (X, X[:2], W, W, W, W, 1e-5, "layer"), ValueError, "dx has shape"),
        ("norm_forward", (X, X, W.bfloat16(), W, W, W, 1e-5, "layer"), TypeError, "weight has dtype"),
        ("norm_forward", (X, X, W, W.to("meta"), W, W, 1e-5, "layer"), ValueError, "dweight is on meta"),
        ("norm_forward", (X, X, W, W, W, None, 1e-5, "layer"), ValueError, "both of bias and dbias"),
        ("norm_forward", (X, X, W, W, W, W, 1e-5, "batch"), ValueError, "unknown kind 'batch'"),
        ("norm_backward", (X, X, X, X, X[:, :3], W, W, "rms"), ValueError, "saved has shape"),
        ("activation_forward", (X[:, :3], X[:, :3], None, None, "swiglu"), ValueError, "even number"),
        ("activation_backward", (X, X, X, X, None, None, "swiglu"), ValueError, "gy has shape"),
        ("cross_entropy_statistics", (X, X, L.int(), 0), TypeError, "labels has dtype"),
        ("cross_entropy_backward", (X, X, L, 0, X.double(), 1.0), TypeError, "statistics has dtype"),
        ("attention_forward", (Q, Q, *[Q[:, :3]] * 4, 1.0), ValueError, "multiple of the heads"),
        ("attention_forward", (Q, Q, *[Q[:, :2]] * 3, Q, 1.0), ValueError, "dv has shape"),
    ],
)
def test_arguments_that_do_not_fit_are_named(function, arguments, error, text):
    with pytest.raises(error, match=text):
        getattr(ops, function)(*arguments)
