"""Half precision on CPU: a stand-in for FlashAttention-2, which refuses anything else, and training in fp16."""

import torch


def let_cpu_train_in_fp16():
    """DeepSpeed asks its accelerator, which on CPU says no, though torch computes in fp16."""
    from deepspeed.accelerator import get_accelerator

    type(get_accelerator()).is_fp16_supported = lambda self: True


def install():
    """Under the name that Megatron-DeepSpeed's FlashSelfAttention takes with --use-flash-attn-v2."""
    from megatron.model import transformer

    transformer.flash_attn_varlen_func = attention
    transformer.FlashAttentionBuilder = None  # deepspeed's own raises a ValueError on CPU


def attention(q, k, v, ends, _ends_k, length, _length_k, dropout, softmax_scale=None, causal=False):
    """q, k, v [b s, h, d]; the sequences have equal lengths, as in pretraining."""
    assert all(x.dtype in (torch.float16, torch.bfloat16) for x in (q, k, v))
    assert len(ends) - 1 == len(q) // length
    q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2).float() for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) * (softmax_scale or q.shape[-1] ** -0.5)
    if causal:
        scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf"))
    weights = torch.nn.functional.dropout(scores.softmax(-1), dropout)
    return (weights @ v).transpose(1, 2).flatten(0, 1).to(torch.bfloat16)
