"""The plain-torch references of the dual kernels against autograd's double backward of torch's own functions, in float64."""

import math

import pytest
import torch
from torch.nn import functional as F

from megatron_commute.kernels import reference

NORMS = {
    "layer": lambda x, w, b: F.layer_norm(x, x.shape[1:], w, b, 1e-5),
    "rms": lambda x, w: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * w,
}
ACTIVATIONS = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_erf": lambda x: F.gelu(x),
    "swiglu": lambda x: F.silu(x[:, : x.shape[1] // 2]) * x[:, x.shape[1] // 2 :],
}


def random(*shapes, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def truth(function, inputs, tangents, gy, dgy):
    """y, dy, gradients by each input and their tangents when the slope of y moves with dgy: autograd alone.

    phi(inputs, slope) = slope . f(inputs); its second derivative along (tangents, dgy) holds every tangent, and the part
    by slope is dy.
    """
    leaves = [t.clone().requires_grad_(True) for t in (*inputs, gy)]
    y = function(*leaves[:-1])
    first = torch.autograd.grad((leaves[-1] * y).sum(), leaves, create_graph=True)
    second = torch.autograd.grad(first, leaves, (*tangents, dgy), allow_unused=True, materialize_grads=True)
    return y.detach(), second[-1], [g.detach() for g in first[:-1]], list(second[:-1])


def close(found, expected, tolerance=1e-12):
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape, i
        assert (a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max())), (
            i,
            float((a - b).abs().max()),
        )


@pytest.mark.parametrize("kind", reference.NORMS)
def test_norms(kind):
    bias = kind == "layer"
    x, dx, gy, dgy = random((7, 12), (7, 12), (7, 12), (7, 12))
    x += 3.0  # a mean far from zero
    weights = random(*[(12,)] * (4 if bias else 2), seed=1)
    values, tangents = weights[::2], weights[1::2]
    y, dy, saved = reference.norm_forward(x, dx, *weights, *([] if bias else [None, None]), 1e-5, kind)
    found = reference.norm_backward(gy, dgy, x, dx, saved, *weights[:2], kind)
    ty, tdy, gradients, moved = truth(NORMS[kind], [x, *values], [dx, *tangents], gy, dgy)
    close([y, dy], [ty, tdy])
    pairs = [t for pair in zip(gradients, moved, strict=True) for t in pair]
    close([t for t in found if t is not None], pairs)
    assert saved.shape == (7, 4) and (found[4] is None) == (kind == "rms")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", reference.ACTIVATIONS)
def test_activations(kind, bias):
    wide = 2 if kind == "swiglu" else 1
    x, dx = random((9, 6 * wide), (9, 6 * wide))
    x *= 3
    gy, dgy, *biases = random((9, 6), (9, 6), *[(6 * wide,)] * 2, seed=2)
    value, tangent = ([biases[0]], [biases[1]]) if bias else ([], [])
    given = biases if bias else (None, None)
    ty, tdy, gradients, moved = truth(
        lambda x, *b: ACTIVATIONS[kind](sum(b, x)), [x, *value], [dx, *tangent], gy, dgy
    )
    close(reference.activation_forward(x, dx, *given, kind), [ty, tdy])
    found = reference.activation_backward(gy, dgy, x, dx, *given, kind)
    close(
        [t for t in found if t is not None], [t for pair in zip(gradients, moved, strict=True) for t in pair]
    )


@pytest.mark.parametrize("shards", [1, 3])
def test_cross_entropy_in_shards(shards):
    logits, dlogits = random((8, 12), (8, 12))
    logits[0] *= 300  # far beyond what exp can hold
    labels = torch.randint(12, (8,), generator=torch.Generator().manual_seed(3))
    cuts = list(
        zip(
            logits.chunk(shards, 1),
            dlogits.chunk(shards, 1),
            range(0, 12, 12 // shards),
            strict=True,
        )
    )
    statistics = reference.combine_statistics(
        [reference.cross_entropy_statistics(a, b, labels, first) for a, b, first in cuts]
    )
    found = [reference.cross_entropy_backward(a, b, labels, first, statistics, 1 / 8) for a, b, first in cuts]
    one = torch.ones((), dtype=torch.float64)
    loss, dloss, (gradient,), (moved,) = truth(
        lambda l: F.cross_entropy(l, labels), [logits], [dlogits], one, one * 0
    )
    close(reference.cross_entropy_loss(statistics, 1 / 8), [loss, dloss])
    close([torch.cat(part, 1) for part in zip(*found, strict=True)], [gradient, moved])


def plain_attention(q, k, v):
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    score = q @ k.mT / math.sqrt(q.shape[-1])
    return score.masked_fill(torch.ones_like(score[0, 0]).triu(1).bool(), -math.inf).softmax(-1) @ v


@pytest.mark.parametrize(("heads", "groups", "length"), [(4, 4, 5), (4, 2, 6), (3, 1, 1)])
def test_attention(heads, groups, length):
    shapes = [(2, heads, length, 8)] * 2 + [(2, groups, length, 8)] * 4
    pairs = random(*shapes, seed=4)
    go, dgo = random(*shapes[:2], seed=5)
    scale = 1 / math.sqrt(8)
    o, do, saved = reference.attention_forward(*pairs, scale)
    found = reference.attention_backward(go, dgo, *pairs, o, do, saved, scale)
    ty, tdy, gradients, moved = truth(plain_attention, pairs[::2], pairs[1::2], go, dgo)
    close([o, do], [ty, tdy])
    close(found, [t for pair in zip(gradients, moved, strict=True) for t in pair])
    assert saved.shape == (2, heads, length, 2)


def test_half_precision_is_computed_in_float32():
    x, dx, weight, dweight = random((6, 64), (6, 64), (64,), (64,), dtype=torch.bfloat16)
    narrow = reference.norm_forward(x, dx, weight, dweight, None, None, 1e-5, "rms")
    wide = reference.norm_forward(*(t.float() for t in (x, dx, weight, dweight)), None, None, 1e-5, "rms")
    assert narrow[0].dtype is torch.bfloat16 and narrow[2].dtype is torch.float32
    for a, b in zip(narrow, wide, strict=True):
        assert torch.equal(a, b.to(a.dtype))
    pairs = random(*[(1, 2, 5, 8)] * 6, dtype=torch.bfloat16)
    for a, b in zip(
        reference.attention_forward(*pairs, 0.3),
        reference.attention_forward(*(t.float() for t in pairs), 0.3),
        strict=True,
    ):
        assert torch.equal(a, b.to(a.dtype))


def test_inputs_are_not_written_to():
    tensors = random(*[(2, 2, 4, 6)] * 8)
    copies = [t.clone() for t in tensors]
    o, do, saved = reference.attention_forward(*tensors[:6], 1.0)
    reference.attention_backward(*tensors[6:], *tensors[:6], o, do, saved, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))


def test_gram_of_a_difference_under_a_metric():
    X, minus, Y = ([random((5, 3), (4,), seed=10 * i + k) for k in range(n)] for i, n in enumerate((2, 2, 3)))
    metric = [t.abs() for t in random((5, 3), (4,), seed=99)]
    found = reference.gram(X, Y, metric, minus, 0.1)

    def flat(v):
        return torch.cat([t.flatten() for t in v])

    expected = [
        [(((flat(x) - flat(m)) / 0.2) * flat(metric) * flat(y)).sum() for y in Y]
        for x, m in zip(X, minus, strict=True)
    ]
    close([found], [torch.tensor(expected, dtype=torch.float64)])
    with pytest.raises(ValueError, match="minus and a nonzero eps together"):
        reference.gram(X, Y, minus=minus)
    with pytest.raises(ValueError, match="2 and 1 vectors"):
        reference.gram(X, Y, minus=minus[:1], eps=0.1)


def test_displace_in_half_precision_says_what_it_did():
    params, v = random((50,), dtype=torch.bfloat16), random((50,), seed=1, dtype=torch.float32)
    metric = [torch.full((50,), 2.0)]
    moved, realised = reference.displace(params, v, 1e-3, metric, realised=True)
    wide = params[0].float() + 2e-3 * v[0]
    assert torch.equal(moved[0], wide.to(torch.bfloat16))
    assert torch.equal(realised[0], moved[0].float() - params[0].float())
    assert (realised[0] - 2e-3 * v[0]).abs().max() > 1e-4
    assert torch.equal(reference.displace(params, v, 1e-3, metric)[0], moved[0])
