"""Probes of a run that trains with FlashAttention: attention is torch's own meanwhile."""

import math
from types import SimpleNamespace

import agreement
import half_precision_kernel
import pytest
import torch
from planned_jobs import Jobs

from megatron_commute.adapters.megatron_deepspeed import attention

FLASH = [row for row in agreement.ROWS if row[0].startswith("flash")]


class FlashSelfAttention(torch.nn.Module):
    """As the host's: [b, s, heads, d], half precision alone."""

    causal, softmax_scale = True, None

    def forward(self, q, k, v):
        ends = torch.arange(0, q.shape[0] * q.shape[1] + 1, q.shape[1])
        flat = (x.flatten(0, 1) for x in (q, k, v))
        out = half_precision_kernel.attention(*flat, ends, None, q.shape[1], None, 0.0, None, self.causal)
        return out.unflatten(0, q.shape[:2])


class FlashSelfAttentionTriton(FlashSelfAttention):
    """As the host's: [s, b, heads, d], and heads joined in what it returns."""

    def forward(self, q, k, v):
        return super().forward(*(x.transpose(0, 1) for x in (q, k, v))).transpose(0, 1).flatten(2)


def formula(q, k, v):
    """Causal softmax attention in float64 of [b, s, heads, d], written out."""
    q, k, v = (x.double() for x in (q, k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
    later = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(later, float("-inf")).softmax(-1), v)


@pytest.mark.parametrize("twice", [False, True])
def test_attention_of_a_probe_is_exact_in_float32_and_the_kernel_comes_back(twice):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 7, 3, 4) for _ in range(3))
    layers = torch.nn.ModuleList([FlashSelfAttention(), FlashSelfAttentionTriton()])
    with pytest.raises(AssertionError):
        layers[0](q, k, v)
    with attention.in_float32(layers, twice):
        found = layers[0](q, k, v)
        joined = layers[1](*(x.transpose(0, 1) for x in (q, k, v)))
    assert found.dtype == torch.float32 and joined.shape == (7, 2, 12)
    torch.testing.assert_close(found.double(), formula(q, k, v), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(joined.transpose(0, 1).unflatten(2, (3, 4)), found)
    half = [x.bfloat16() for x in (q, k, v)]
    assert layers[0](*half).dtype == torch.bfloat16 and "forward" not in vars(layers[0])
    torch.testing.assert_close(layers[0](*half).double(), formula(*half), rtol=0.02, atol=0.02)


def test_what_autograd_follows_twice():
    q, k, v = (torch.randn(1, 5, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    layers = torch.nn.ModuleList([FlashSelfAttention()])
    with attention.in_float32(layers, twice=True):
        assert torch.autograd.gradgradcheck(layers[0], (q, k, v))


def test_layers_without_such_a_kernel_are_left_alone():
    layer = torch.nn.Linear(2, 2)
    with attention.in_float32(SimpleNamespace(modules=lambda: [layer])):
        assert "forward" not in vars(layer)


def test_the_host_trains_with_half_precision_attention_and_is_measured(scratch, tmp_path):
    here = Jobs(scratch, tmp_path, "flash")
    here.add("stock", hooked=False)
    here.add("shadow", "--commute", here.data / "shadow.yaml")
    seen = here.run()
    assert seen["stock"][0]["losses"] and seen["shadow"] == seen["stock"]
    events = [line["event"] for line in here.record("shadow")]
    assert events.count("probe") == 4 and "skip" not in events


def test_it_measures_what_is_measured_without_the_kernel(scratch):
    wrong = [row for row in agreement.rows(scratch, FLASH) if not row["within"]]
    assert len(FLASH) == 4 and not wrong
