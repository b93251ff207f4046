"""The fused pass on megatron-core's own GPTModel: against its loss, its gradient and its double backward."""

import dataclasses
import types
from unittest import mock

import oracles
import pytest
import ranks
import torch
from megatron_models import (
    HEADS,
    LENGTH,
    LLAMA,
    VOCABULARY,
    WIDTH,
    direction,
    megatron_gpt,
    megatron_loss,
    message,
    probed,
    square,
)
from torch.nn import functional as F

from megatron_commute import hvp
from megatron_commute.adapters import fused_stacks
from megatron_commute.adapters.fused import fused, refuse, verify
from megatron_commute.adapters.twice_differentiable import twice_differentiable

BIASED_LLAMA = LLAMA | {"add_bias_linear": True, "rotary_interleaved": True}
VARIANTS = {
    "gpt": {},
    "llama": LLAMA,
    "biased llama, interleaved": BIASED_LLAMA,
    "scaled by layer": {"apply_query_key_layer_scaling": True, "attention_softmax_in_fp32": True},
    "biases of qkv alone": {"add_bias_linear": False, "add_qkv_bias": True},
}


def inputs():
    """Tokens [4, LENGTH + 1] of which the labels are the last LENGTH."""
    tokens, labels = oracles.batch(VOCABULARY, length=LENGTH)
    return torch.cat([tokens, labels[:, -1:]], 1)


def own_loss(model, tokens):
    return megatron_loss(model, tokens[:, :-1], tokens[:, 1:])


def gap(size, a, b):
    return (size([x.double() - y.double() for x, y in zip(a, b, strict=True)]) / size(b)) ** 0.5


def compared(model, tensor_parallel, group):
    """[(error of the fused pass, of the module itself)] of loss, gradient and H v, against the module in float64."""
    tokens, size = inputs(), square(model, tensor_parallel)
    params, v = oracles.parameters(model)[1], direction(model)
    found = fused(model, group)(params, v, tokens)
    verify(model, own_loss(model, tokens), params, tokens, group)
    plain = by_double_backward(model, tokens, params, v)
    true = by_double_backward(model.double(), tokens, [p.double() for p in params], [t.double() for t in v])
    errors = [tuple(max(abs(x.loss - true.loss), torch.finfo(params[0].dtype).eps) for x in (found, plain))]
    for name in ("gradient", "product"):
        errors.append(tuple(gap(size, getattr(x, name), getattr(true, name)) for x in (found, plain)))
    return errors


def by_double_backward(model, tokens, params, v):
    loss = own_loss(model, tokens)
    with twice_differentiable(model):
        gradient, product, *_ = hvp.gradient_and_product(loss, params, v, "exact", step=1.0)
        return types.SimpleNamespace(loss=float(loss(params)), gradient=gradient, product=product)


def wrong_layer(model):
    """What verification says of a stack whose second block has another scale."""
    right = fused_stacks.stack(model)
    blocks = right.blocks[0], dataclasses.replace(right.blocks[1], scale=0.4 * right.blocks[1].scale)
    with mock.patch.object(fused_stacks, "stack", lambda module: dataclasses.replace(right, blocks=blocks)):
        tokens = inputs()
        return message(
            ArithmeticError, verify, model, own_loss(model, tokens), oracles.parameters(model)[1], tokens
        )


def on_rank(rank):
    from megatron.core import parallel_state

    megatron_gpt()
    answers = {}
    for size in (2, 1):
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
        group = parallel_state.get_tensor_model_parallel_group() if size > 1 else None
        for name, options in VARIANTS.items():
            for dtype in (torch.float64, torch.float32):
                answers[size, name, dtype] = compared(megatron_gpt(size, dtype, **options), size, group)
    answers["tanh"] = compared(megatron_gpt(1, torch.float64, bias_activation_fusion=True), 1, None)
    answers["wrong layer"] = wrong_layer(megatron_gpt(1, torch.float32))
    answers["refused"] = {name: message(ValueError, refuse, model) for name, model in refused()}
    parallel_state.destroy_model_parallel()
    answers["probe"] = probed(rank, 2, [(method, "adam", torch.float64) for method in ("exact", "fused")])[0]
    return answers


def refused():
    """Models that the fused pass does not know."""
    yield "geglu", megatron_gpt(1, gated_linear_unit=True, activation_func=F.gelu)
    yield "relu", megatron_gpt(1, activation_func=F.relu)
    normed = megatron_gpt(1)
    normed.decoder.layers[0].self_attention.q_layernorm = torch.nn.LayerNorm(WIDTH // HEADS)
    yield "normed queries", normed
    unknown = megatron_gpt(1)
    unknown.decoder.layers[1].mlp.linear_fc2 = torch.nn.Linear(4, 4)
    yield "unknown", unknown
    frozen = megatron_gpt(1)
    frozen.embedding.position_embeddings.weight.requires_grad_(False)
    yield "frozen", frozen
    sliced = megatron_gpt(1)
    sliced.config.sequence_parallel = True
    yield "sequence parallel", sliced
    yield "no GPT", torch.nn.Linear(2, 2)


@pytest.fixture(scope="module")
def found():
    """Answers of two ranks; one start serves the file."""
    return ranks.run(on_rank, 2, timeout=300)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("size", [1, 2])
def test_the_fused_pass_is_as_exact_as_double_backward_of_the_module(found, size, name, dtype):
    """In float64 to 1e-12; in float32 within four times the error of the module's own double backward."""
    for answers in found:
        for error, own in answers[size, name, dtype]:
            assert error <= (1e-12 if dtype is torch.float64 else 4 * own) < 1e-3


def test_the_tanh_form_where_megatron_fuses(found):
    for answers in found:
        assert (
            max(error for error, _ in answers["tanh"]) < 1e-8
        )  # Megatron writes its constants with nine digits


def test_a_probe_measures_what_exact_measures(found):
    """Two tensor-parallel ranks, the metric of Adam; verification included."""
    for answers in found:
        exact, fused_ = (answers["probe"][method, "adam", torch.float64] for method in ("exact", "fused"))
        for a, b in zip(exact, fused_, strict=True):
            assert abs(a - b).max() < 1e-7 * abs(exact[0]).max()  # as above: nine digits of a constant


def test_a_layer_that_is_read_wrongly_is_named(found):
    for answers in found:
        assert (
            "the fused gradient differs from the model's own at decoder.layers.1." in answers["wrong layer"]
        )
        assert "use method difference" in answers["wrong layer"]


def test_what_is_not_known_is_refused_by_name(found):
    expected = {
        "geglu": "layer 1: gated gelu is no activation",
        "relu": "layer 1: relu is no activation",
        "normed queries": "layer 1: q_layernorm is nothing",
        "unknown": "decoder.layers.1.mlp.linear_fc2 (Linear) is no layer",
        "frozen": "embedding.position_embeddings.weight is frozen",
        "sequence parallel": "the fused pass knows nothing of sequence parallel",
        "no GPT": "Linear is no GPTModel",
    }
    for answers in found:
        assert expected.keys() == answers["refused"].keys()
        for name, text in expected.items():
            assert text in answers["refused"][name], answers["refused"][name]
            assert answers["refused"][name].endswith("use method difference")
