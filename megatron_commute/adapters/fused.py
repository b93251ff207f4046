"""The fused Hessian-vector product of Megatron's GPTModels: rop.py on the parameters of a module,
read in place.

`fused` gives a probe its pass, `verify` checks that this pass computes what the module computes,
`refuse` says before anything is run why it could not; `with_fused` does all of it for a Model.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from megatron_commute import hvp
from megatron_commute.adapters import fused_stacks
from megatron_commute.adapters.fused_stacks import refuse
from megatron_commute.measure import rop

__all__ = ["fused", "refuse", "verify", "with_fused"]

# float32: of the loss; of a parameter's gradient, and of the whole gradient where a parameter's own
# is rounding alone (a key's bias shifts all scores of a row alike)
_LOSS, _OWN, _WHOLE = 1e-5, 1e-4, 1e-6


def fused(module, tensor_parallel_group=None):
    """The fused pass of a GPTModel of megatron-core (local layers) or of Megatron-DeepSpeed.

    Returns (parameters, u, tokens i64[b, s + 1]) -> rop.Dual with .loss, .gradient, .product;
    parameters and u: float32 (float64) tensors in the order of module.named_parameters(), the
    module's own or copies. tensor_parallel_group: of the ranks that share a layer, or None. Raises
    ValueError where refuse does.
    """
    refuse(module)
    stack = fused_stacks.stack(module)

    def run(parameters, u, tokens):
        tokens = tokens.to(parameters[0].device)
        return rop.gradient_and_product(stack, parameters, u, tokens, tensor_parallel_group)

    return run


def verify(module, loss, parameters, tokens, tensor_parallel_group=None):
    """Compare the fused loss and gradient with the module's own on one batch; one gradient and one
    fused pass.

    loss: callable, list of parameters -> mean loss of `tokens`, as the module takes it (dropout
    off, in the precision of `parameters`). Raises ArithmeticError naming the parameter whose
    gradient differs most, ValueError where refuse does.
    """
    parameters = [p.detach() for p in parameters]
    with torch.no_grad():
        own_loss = float(loss(parameters))
    own = hvp.gradient(loss, parameters)
    # along the parameters themselves: any u would do that is alike on ranks that share a parameter
    found = fused(module, tensor_parallel_group)(parameters, parameters, tokens)
    names = [name for name, _ in module.named_parameters()]
    whole = math.sqrt(sum(float(g.double().square().sum()) for g in own))
    worst, where = 0.0, None
    for name, a, b in zip(names, found.gradient, own, strict=True):
        off = float(torch.linalg.vector_norm(a.double() - b.double()))
        allowed = _OWN * float(torch.linalg.vector_norm(b.double())) + _WHOLE * whole
        if off > worst * allowed:
            worst, where = off / allowed, name
    if worst > 1.0:
        raise ArithmeticError(
            f"the fused gradient differs from the model's own at {where}, by {worst:.0f} times what "
            f"rounding explains (loss {found.loss:.6f}, the model's {own_loss:.6f}): use method difference, "
            "and report what kind of layer it is"
        )
    if not abs(found.loss - own_loss) <= _LOSS * max(1.0, abs(own_loss)):
        raise ArithmeticError(
            f"the fused loss is {found.loss:.6f}, the model's own {own_loss:.6f}, but their gradients "
            "agree: are the losses of some tokens left out? use method difference"
        )


def with_fused(model, module, tensor_parallel_group=None):
    """The Model of a GPTModel with its fused pass, which is verified before the first probe that
    uses it.

    Raises ValueError where refuse does. A module in half precision is measured in float32, as by
    the other methods.
    """
    passed = []

    def verify_once(params, tokens):
        if not passed:
            verify(module, lambda at: model.loss(at, tokens), params, tokens, tensor_parallel_group)
            passed.append(True)

    return dataclasses.replace(model, fused=fused(module, tensor_parallel_group), verify=verify_once)
