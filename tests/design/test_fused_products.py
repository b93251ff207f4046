"""The proxy's gradients, losses and Hessian products against the R operator of measure/rop.py, which
has no autograd."""

import math

import numpy as np
import pytest
import torch
from proxies import run_of

from megatron_commute.design import adjoint
from megatron_commute.measure import rop


def stack_of(model):
    """(rop.Stack, which parts of the model's vector each of its parameters joins)."""
    shape, names, joined = model.shape, [], []
    gpt2 = shape.flavour == "gpt2"

    def number(*parts):
        names.append(parts[0])
        joined.append(parts)
        return len(names) - 1

    def linear(*parts):
        weight = number(*parts)
        return rop.Linear(weight=weight, bias=number(f"{parts[0]}.bias") if gpt2 else None)

    def norm(name):
        scale = number(f"{name}.scale")
        bias = number(f"{name}.bias") if gpt2 else None
        return rop.Norm(weight=scale, bias=bias, eps=1e-5, kind="layer" if gpt2 else "rms")

    words, positions = number("words"), number("positions") if gpt2 else None
    blocks = tuple(
        rop.Block(
            norm1=norm(f"{i}.first"),
            qkv=linear(f"{i}.qkv"),
            out=linear(f"{i}.out"),
            norm2=norm(f"{i}.second"),
            up=linear(f"{i}.up") if gpt2 else linear(f"{i}.gate", f"{i}.up"),
            down=linear(f"{i}.down"),
            heads=shape.heads,
            groups=shape.heads,
            layout="parts",
            scale=1 / math.sqrt(shape.hidden // shape.heads),
            rotary=not gpt2,
            activation="gelu_erf" if gpt2 else "swiglu",
        )
        for i in range(shape.layers)
    )
    last = norm("last")
    rotary = None if gpt2 else rop.Rotary(cos=model._turns[0], sin=model._turns[1])
    output = words if gpt2 else number("logits")
    about = {"words": words, "positions": positions, "blocks": blocks, "norm": last, "output": output}
    return rop.Stack(**about, rotary=rotary, names=tuple(names)), joined


def given(model, joined, vector):
    own = dict(zip(model.parts, model.unflat(vector), strict=True))
    return [torch.cat([own[part] for part in parts]).contiguous() for parts in joined]


def flat(model, joined, found):
    own = {}
    for parts, whole in zip(joined, found, strict=True):
        own |= dict(zip(parts, whole.split([model.parts[part][0] for part in parts]), strict=True))
    return torch.cat([own[part].reshape(-1) for part in model.parts])


@pytest.mark.parametrize("flavour", ["gpt2", "llama"])
def test_products_and_slopes_are_those_of_the_r_operator(flavour):
    run = run_of(flavour)
    model, theta = run.model, run.advance(run.start(), np.tile(run.proxy.shares, (20, 1)), 0, 20).theta
    stack, joined = stack_of(model)
    tokens, scale = run.weighted_batch(20, run.proxy.shares)
    force = torch.randn(model.size, generator=torch.Generator().manual_seed(5), dtype=theta.dtype)
    product, slopes, gradient, losses = torch.zeros_like(theta), [], torch.zeros_like(theta), []
    for sequence, weight in zip(tokens.split(1), scale.tolist(), strict=True):
        one = rop.gradient_and_product(
            stack, given(model, joined, theta), given(model, joined, force), sequence
        )
        product += weight * flat(model, joined, one.product)
        gradient += weight * flat(model, joined, one.gradient)
        slopes.append(one.slope)
        losses.append(one.loss)
    own, seen = model.gradient(theta, tokens, scale)
    assert torch.allclose(own, gradient, rtol=0, atol=1e-10 * float(own.abs().max()))
    assert np.allclose(seen.numpy(), losses, rtol=1e-12)
    for method, error in (("exact", 1e-11), ("difference", 1e-6)):
        found, along = adjoint._product(model, theta, tokens, scale, force, method)
        assert float((found - product).norm()) <= error * float(product.norm()), method
        assert np.allclose(along.numpy(), slopes, rtol=0, atol=error * np.abs(slopes).max()), method
