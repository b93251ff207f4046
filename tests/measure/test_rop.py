"""The R-operator pass against double backward of the same stack in torch's own functions."""

import math
import sys
from pathlib import Path

import pytest
import torch
from oracles import gap, inner
from rop_cases import (
    CASES,
    GPT2,
    LENGTH,
    LLAMA,
    VOCABULARY,
    build,
    loss,
    random_tokens,
    random_vector,
)

from megatron_commute import hvp
from megatron_commute.measure import rop

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))

import hvp_methods


def truth(function, params, u):
    """Loss, gradient and H u by autograd in float64."""
    leaves = [p.double().requires_grad_(True) for p in params]
    value = function(leaves)
    gradient = torch.autograd.grad(value, leaves, create_graph=True, materialize_grads=True)
    product = torch.autograd.grad(gradient, leaves, [t.double() for t in u], materialize_grads=True)
    return value.item(), [g.detach() for g in gradient], list(product)


def case_of(name, dtype=torch.float64, samples=3):
    stack, shapes = build(CASES[name])
    params, u = random_vector(stack, shapes, 1, dtype), random_vector(stack, shapes, 2, dtype, 1.0)
    return stack, params, u, random_tokens(samples)


@pytest.mark.parametrize("name", CASES)
def test_float64_equals_double_backward(name):
    stack, params, u, tokens = case_of(name)
    found = rop.gradient_and_product(stack, params, u, tokens)
    value, gradient, product = truth(loss(stack, tokens), params, u)
    assert abs(found.loss - value) < 1e-12
    assert abs(found.slope - inner(gradient, u)) < 1e-12 * abs(found.slope)
    assert gap(found.gradient, gradient) < 1e-12
    for i, name in enumerate(stack.names):  # each by itself: none is too small to be seen
        scale = max(1e-3, float(product[i].norm()))
        assert float((found.product[i] - product[i]).norm()) < 1e-12 * scale, name


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_product_alone_is_the_same(name):
    stack, params, u, tokens = case_of(name, torch.float32)
    both = rop.gradient_and_product(stack, params, u, tokens)
    alone = rop.gradient_and_product(stack, params, u, tokens, gradient=False)
    assert alone.gradient is None and (alone.loss, alone.slope) == (both.loss, both.slope)
    assert all(torch.equal(a, b) for a, b in zip(alone.product, both.product, strict=True))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_slices_of_a_batch_add_up(name, monkeypatch):
    stack, params, u, tokens = case_of(name)
    whole = rop.gradient_and_product(stack, params, u, tokens)
    for rows, logits in ((LENGTH, 1), (1, 64)):
        monkeypatch.setattr(rop, "_ROWS", {"cpu": rows})
        monkeypatch.setattr(rop, "_LOGITS", {"cpu": logits})
        parts = rop.gradient_and_product(stack, params, u, tokens)
        assert parts.loss == pytest.approx(whole.loss, rel=1e-14)
        assert gap(parts.gradient, whole.gradient) < 1e-13 and gap(parts.product, whole.product) < 1e-13


def test_nothing_that_it_is_given_changes():
    stack, params, u, tokens = case_of("llama")
    given = [*params, *u, tokens]
    before = [t.clone() for t in given]
    rop.gradient_and_product(stack, [p.requires_grad_(True) for p in params], u, tokens)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


# --- float32 and bfloat16 ---------------------------------------------------------------------------------------------


def wide_case(case, seed=0):
    """A stack large enough for rounding to average out; ordinary weights, u of length one."""
    stack, shapes = build(case, vocabulary=64, width=64, heads=4, length=32, inner=128)
    params = random_vector(stack, shapes, 10 + seed, torch.float32, 0.1)
    u = random_vector(stack, shapes, 15 + seed, torch.float32, 1.0)
    return stack, params, [t / math.sqrt(inner(u, u)) for t in u], random_tokens(4, 32, 64, seed)


def in_bfloat16(function):
    """A loss as plain PyTorch takes it in bfloat16: weights and activations, the cross-entropy in float32."""

    def of(params):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return function([p.bfloat16() for p in params]).float()

    return of


@pytest.mark.parametrize("case", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_bfloat16_errs_no_more_than_twice_as_plain_pytorch(case):
    for seed in range(3):
        stack, params, u, tokens = wide_case(case, seed)
        _, gradient, product = truth(loss(stack, tokens), params, u)
        plain = hvp.gradient_and_product(in_bfloat16(loss(stack, tokens)), params, u, "exact", step=1.0)
        found = rop.gradient_and_product(stack, params, u, tokens, dtype=torch.bfloat16)
        assert all(t.dtype is torch.float32 for t in (*found.gradient, *found.product))
        assert gap(found.gradient, gradient) < 2 * gap(plain.gradient, gradient)
        assert gap(found.product, product) < 2 * gap(plain.product, product)


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 8])
def test_memory_stays_below_what_was_promised(samples):
    """Bytes of tensors alive at the worst moment, over those of a gradient of the same loss in torch's fused functions."""
    case = hvp_methods.Case(512, 96, 4, 4, 64, samples)
    gradient = hvp_methods.peak(lambda: hvp.gradient(case.loss, case.params))
    both = hvp_methods.peak(lambda: rop.gradient_and_product(case.stack, case.params, case.u, case.tokens))
    assert gradient > 1.5 * 4 * case.parameters  # the counter counts
    assert both < 2.2 * gradient


# --- bad input --------------------------------------------------------------------------------------------------------


def test_bad_input_is_named():
    stack, params, u, tokens = case_of("gpt2", torch.float32)
    for text, given in {
        "params and u differ at tensor 0": (params, [u[0].T, *u[1:]], tokens),
        "params and u have": (params, u[1:], tokens),
        "the stack has 28 parameters, got 27": (params[1:], u[1:], tokens),
        "must all be float32 or all float64, got": (params, [t.double() for t in u], tokens),
        r"tokens must be \[b, s \+ 1\]": (params, u, tokens[:, :1]),
        f"token {VOCABULARY} is outside the vocabulary of {VOCABULARY}": (
            params,
            u,
            tokens.clamp(min=VOCABULARY),
        ),
        "sequences of 11 tokens, but only 9 positions": (params, u, random_tokens(1, 11)),
    }.items():
        with pytest.raises(ValueError, match=text):
            rop.gradient_and_product(stack, *given)
    params[3][0] = math.nan
    with pytest.raises(FloatingPointError, match="loss nan"):
        rop.gradient_and_product(stack, params, u, tokens)
