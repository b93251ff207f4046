"""Attention while a probe runs: torch's own in float32, whatever kernel trains.

FlashAttention takes half precision alone, and a probe runs in float32. What stands in for it here
is the same function: exact softmax over the tokens up to each one's own.
"""

import contextlib

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

# class of Megatron-DeepSpeed -> whether sequences come first in its queries, keys and values
_KERNELS = {"FlashSelfAttention": False, "FlashSelfAttentionTriton": True}


@contextlib.contextmanager
def in_float32(module, twice=False):
    """Let torch's attention stand in for FlashAttention in every layer of `module`.

    twice: by operations that autograd can follow twice, which keep the scores [b, h, s, s].
    """
    layers = [layer for layer in module.modules() if type(layer).__name__ in _KERNELS]
    try:
        for layer in layers:
            layer.forward = _stand_in(layer, twice)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _stand_in(layer, twice):
    """forward(q, k, v) of `layer`: [b, s, heads, d] each and returned; in Triton
    [s, b, heads, d], and [s, b, heads * d] back.
    """
    sequence_first = _KERNELS[type(layer).__name__]
    scale = getattr(layer, "softmax_scale", None)

    def forward(q, k, v):
        axes = (1, 2, 0, 3) if sequence_first else (0, 2, 1, 3)
        heads = [x.permute(axes) for x in (q, k, v)]
        with sdpa_kernel(SDPBackend.MATH) if twice else contextlib.nullcontext():
            found = torch.nn.functional.scaled_dot_product_attention(
                *heads, is_causal=layer.causal, scale=scale
            )
        return found.permute(2, 0, 1, 3).flatten(2) if sequence_first else found.transpose(1, 2)

    return forward
