"""Dual causal attention against double backward of plain torch in float64."""

import subprocess
import sys

import pytest
import torch

from megatron_commute import ops
from megatron_commute.ops import attention_backward, attention_forward

NAMES = ["o", "do", "gq", "dgq", "gk", "dgk", "gv", "dgv"]
# (b, a, g, s, c): one row, a tile less one, a full one, one more, odd columns, groups of queries, 128 columns.
SIZES = [
    (1, 2, 1, 1, 16),
    (2, 2, 2, 63, 20),
    (1, 2, 1, 64, 32),
    (1, 4, 2, 65, 16),
    (1, 3, 1, 130, 64),
    (1, 1, 1, 97, 128),
]
needs_compiled = pytest.mark.skipif(
    not ops.compiled("cpu", torch.float32),
    reason="the compiled kernels were not built: pip install -e . with a C++ compiler",
)


def plain(q, k, v, scale):
    """Causal attention from primitives that can be differentiated twice."""
    heads = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(heads, 1), v.repeat_interleave(heads, 1)
    future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    score = (scale * (q @ k.mT)).masked_fill(future, -torch.inf)
    weight = (score - score.detach().amax(-1, True)).exp()
    return (weight / weight.sum(-1, True)) @ v


def truth(tensors, scale):
    """o, do, gq, dgq, gk, dgk, gv, dgv of plain(); tensors: q, dq, k, dk, v, dv, go, dgo.

    By double backward: the gradient of <go, o> in z = (q, k, v, go) is (gq, gk, gv, o), its tangent the Hessian times dz.
    """
    z = [t.clone().requires_grad_() for t in tensors[::2]]
    values = torch.autograd.grad((z[3] * plain(*z[:3], scale)).sum(), z, create_graph=True)
    along = sum((value * dz).sum() for value, dz in zip(values, tensors[1::2], strict=True))
    tangents = torch.autograd.grad(along, z)
    pairs = list(zip((v.detach() for v in values), tangents, strict=True))
    return [t for pair in (pairs[3], *pairs[:3]) for t in pair]


def draw(b, a, g, s, c, dtype=torch.float32, seed=0):
    """q, dq, k, dk, v, dv, go, dgo, standard normal."""
    random = torch.Generator().manual_seed(seed)
    heads = [a, a, g, g, g, g, a, a]
    return [torch.randn(b, n, s, c, generator=random).to(dtype) for n in heads]


def ours(tensors, scale):
    *inputs, go, dgo = tensors
    o, do, saved = attention_forward(*inputs, scale)
    return [o, do, *attention_backward(go, dgo, *inputs, o, do, saved, scale)]


def errors(found, true, floor=1e-12):
    return [
        float((f.double() - t).norm() / t.norm().clamp(min=floor)) for f, t in zip(found, true, strict=True)
    ]


@pytest.fixture(params=["portable", "avx2", "avx512"])
def machine(request):
    """The tiles of each instruction set; on a machine that lacks it, those of the widest it has."""
    from megatron_commute.kernels import compiled as _kernels

    _kernels._cpu.limit_machine(["portable", "avx2", "avx512"].index(request.param))
    yield request.param
    _kernels._cpu.limit_machine(2)


@needs_compiled
@pytest.mark.parametrize("size", SIZES)
def test_float32_is_as_exact_as_plain_torch(machine, size):
    tensors, scale = draw(*size), size[-1] ** -0.5
    true = truth([t.double() for t in tensors], scale)
    # The gradient of a lone key's score is zero: its error is measured against the others.
    least = max(float(t.norm()) for t in true) if size[3] == 1 else 1e-12
    plain_errors = errors(truth(tensors, scale), true, least)
    for name, error, bound in zip(
        NAMES, errors(ours(tensors, scale), true, least), plain_errors, strict=True
    ):
        assert error <= max(2 * bound, 4e-7), (name, error, bound)


@needs_compiled
@pytest.mark.parametrize("size", SIZES[1:])
def test_bf16_is_at_most_twice_as_far_off_as_plain_torch(machine, size):
    tensors, scale = draw(*size, torch.bfloat16), size[-1] ** -0.5
    true = truth([t.double() for t in tensors], scale)
    plain_errors = errors(truth(tensors, scale), true)
    for name, error, bound in zip(NAMES, errors(ours(tensors, scale), true), plain_errors, strict=True):
        assert error <= 2 * bound, (name, error, bound)


def test_float64_is_the_reference():
    tensors = [t.double() for t in draw(1, 2, 1, 20, 16)]
    assert max(errors(ours(tensors, 0.25), truth(tensors, 0.25))) < 1e-12


@needs_compiled
def test_large_scores_do_not_overflow(machine):
    tensors = draw(1, 1, 1, 70, 32)
    tensors[0] = (
        30 * tensors[0]
    )  # scores of some hundreds: float32 knows them, and the weights, to about 1e-4
    true = truth([t.double() for t in tensors], 1.0)
    for name, found, t in zip(NAMES, ours(tensors, 1.0), true, strict=True):
        assert errors([found], [t])[0] < 1e-3, name


@needs_compiled
def test_nan_stays_in_its_row(machine):
    tensors = draw(1, 1, 1, 100, 16)
    clean = attention_forward(*tensors[:6], 0.25)
    tensors[0][0, 0, 70, 3] = torch.nan
    for found, before in zip(attention_forward(*tensors[:6], 0.25), clean, strict=True):
        assert torch.isnan(found[0, 0, 70]).all()
        rest = torch.arange(100) != 70
        assert torch.equal(found[0, 0, rest], before[0, 0, rest])


@needs_compiled
def test_results_do_not_depend_on_threads():
    tensors, before = draw(2, 4, 2, 70, 16), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(ours(tensors, 0.25))
    finally:
        torch.set_num_threads(before)
    for results in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results, found[0], strict=True))


# 4096 x 4096 scores of one head take 64 MiB; the allowance beyond what is mapped already is 48 MiB.
LEAN = """
import contextlib, resource, sys, torch
from megatron_commute import ops
torch.set_num_threads(1)
x = [torch.randn(1, 1, 4096, 16) for _ in range(8)]
small = [t[:, :, :32].contiguous() for t in x]
def both(x):
    o, do, saved = ops.attention_forward(*x[:6], 0.25)
    return ops.attention_backward(*x[6:], *x[:6], o, do, saved, 0.25)
both(small)
with ops.references():
    both(small)
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (48 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
with ops.references() if sys.argv[1] == "reference" else contextlib.nullcontext():
    both(x)
"""


@needs_compiled
@pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is Linux's")
@pytest.mark.parametrize("which, good", [("tiled", True), ("reference", False)])
def test_memory_is_linear_in_the_sequence(which, good):
    done = subprocess.run([sys.executable, "-c", LEAN, which], capture_output=True, text=True, timeout=300)
    assert (done.returncode == 0) is good, done.stderr
    if not good:
        assert "memory" in done.stderr
