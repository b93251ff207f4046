"""The fused pass on Megatron-DeepSpeed's own GPTModel; needs a checkout, named by MEGATRON_DEEPSPEED."""

import os
import sys
import warnings

import oracles
import pytest
import ranks
import test_twice_differentiable_deepspeed as twice_deepspeed
import torch
from test_twice_differentiable import LENGTH, VOCABULARY, message

from megatron_commute import hvp
from megatron_commute.adapters.fused import fused, refuse, verify
from megatron_commute.adapters.twice_differentiable import twice_differentiable

pytestmark = [
    pytest.mark.megatron_deepspeed,
    pytest.mark.skipif("MEGATRON_DEEPSPEED" not in os.environ, reason="MEGATRON_DEEPSPEED names no checkout"),
]
VARIANTS = {
    "gpt": "",
    "llama": "--swiglu --ffn-hidden-size 24 --normalization rmsnorm --use-rotary-position-embeddings --rotary-percent 0.5 "
    "--untie-embeddings-and-output-weights --disable-bias-linear --no-position-embedding",
}


def on_rank(rank, tensor_parallel, flags):
    """|difference| of loss, gradient and H v from the module's own, largest over parameters; texts of refusals."""
    warnings.simplefilter("ignore")
    twice_deepspeed.FLAGS += " " + flags
    args = twice_deepspeed.start(tensor_parallel)
    from megatron.arguments import core_transformer_config_from_args
    from megatron.core import parallel_state
    from megatron.model import GPTModel

    group = parallel_state.get_tensor_model_parallel_group() if tensor_parallel > 1 else None
    model = GPTModel(core_transformer_config_from_args(args), num_tokentypes=0, parallel_output=True)
    generator = torch.Generator().manual_seed(rank)
    with torch.no_grad():
        for p in model.parameters():
            whole = getattr(p, "tensor_model_parallel", False)
            p.add_(
                0.2 * torch.randn(p.shape, generator=generator if whole else torch.Generator().manual_seed(7))
            )
    # one sequence: its attention takes more only with queries that lie one after the other
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(VOCABULARY, (1, LENGTH + 1), generator=generator)
    positions, mask = torch.arange(LENGTH)[None], torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1)
    names, params = oracles.parameters(model)

    def loss(at):
        state = dict(zip(names, at, strict=True))
        given = tokens[:, :-1], positions, mask
        out = torch.func.functional_call(model, state, given, {"labels": tokens[:, 1:].contiguous()})
        return (out[0] if isinstance(out, tuple) else out).mean()

    tables = sys.modules["megatron.model.rotary_pos_embedding"]
    tables.cos_cached = before = torch.zeros(1)
    run = fused(model, group)
    assert tables.cos_cached is before
    found = run(params, params, tokens)
    tables.cos_cached = None
    with twice_differentiable(model):
        gradient, product, *_ = hvp.gradient_and_product(loss, params, params, "exact", step=1.0)
        away = [abs(found.loss - float(loss(params)))]
    verify(model, loss, params, tokens, group)
    for a, b in ((found.gradient, gradient), (found.product, product)):
        largest = max(float(t.norm()) for t in b)
        away.append(max(float((x - y).norm()) / largest for x, y in zip(a, b, strict=True)))
    args.eod_mask_loss = True
    return away, message(ValueError, refuse, model)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", VARIANTS)
def test_fused_is_the_modules_own(name, size):
    for away, refused in ranks.run(on_rank, size, size, VARIANTS[name], timeout=300):
        assert max(away) < 4e-6
        assert "losses that leave out ends of documents" in refused
