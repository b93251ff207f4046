"""The exact Hessian-vector product of megatron models against an independent plain GPT and against
differences."""

import contextlib
import math
import sys

import oracles
import pytest
import ranks
import torch
from megatron_models import (
    LENGTH,
    LLAMA,
    VOCABULARY,
    direction,
    gap,
    megatron_gpt,
    megatron_loss,
    message,
    raw_product,
    square,
    truth,
    whole,
)

from megatron_commute import hvp
from megatron_commute.adapters import twice_differentiable as twice_differentiable_module
from megatron_commute.adapters.twice_differentiable import twice_differentiable, verify

USED = (
    "_VocabParallelCrossEntropy",
    "_ReduceFromModelParallelRegion",
    "LinearWithGradAccumulationAndAsyncCommunication",
)


@contextlib.contextmanager
def half_cured(missing):
    """Megatron with one stand-in missing, and the stock function declared innocent: what `verify` must
    notice."""
    stand_ins = twice_differentiable_module._FUNCTIONS
    key = next(k for k in stand_ins if k[1] == missing)
    kept = stand_ins.pop(key)
    stock = getattr(sys.modules[key[0]], missing)
    stock.twice_differentiable = True
    try:
        yield
    finally:
        stand_ins[key] = kept
        del stock.twice_differentiable


def llama(tensor_parallel):
    """|exact - difference| / |exact| of a Llama on megatron-core."""
    model = megatron_gpt(tensor_parallel, torch.float64, **LLAMA)
    loss = megatron_loss(model, *oracles.batch(VOCABULARY, length=LENGTH))
    params, size = oracles.parameters(model)[1], square(model, tensor_parallel)
    verify(model, loss, params, size)
    v = direction(model, seed=5)
    with twice_differentiable(model):
        exact = hvp.hessian_vector_product(loss, params, v, "exact", step=1.0)
        difference = hvp.hessian_vector_product(loss, params, v, step=1e-5)
    return math.sqrt(size([x - y for x, y in zip(difference, exact, strict=True)]) / size(exact))


def layout(tensor_parallel):
    """What this rank finds at one tensor-parallel size; see the tests for what each answer means."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor_parallel)
    answers = {"llama": llama(tensor_parallel)}
    for dtype in (torch.float64, torch.float32):
        model = megatron_gpt(tensor_parallel, dtype)
        loss = megatron_loss(model, *oracles.batch(VOCABULARY, length=LENGTH))
        names, params = oracles.parameters(model)
        v = direction(model)
        with twice_differentiable(model) as changed:
            inside = hvp.gradient(loss, params)
            found = {
                "exact": hvp.hessian_vector_product(loss, params, v, "exact", step=1.0),
                "difference": hvp.hessian_vector_product(loss, params, v, step=1e-5),
                "raw": raw_product(loss, params, v),
            }
        found |= {"stock": raw_product(loss, params, v), "params": params, "v": v}
        answers[dtype] = {key: dict(zip(names, vector, strict=True)) for key, vector in found.items()}
        same = [torch.equal(a, b) for a, b in zip(inside, hvp.gradient(loss, params), strict=True)]
        answers[dtype] |= {"same bits": all(same), "changed": changed}
        verify(model, loss, params, square(model, tensor_parallel))
    answers["unknown"] = message(ValueError, hvp.hessian_vector_product, loss, params, v, "exact", step=1.0)
    # megatron-core at TP 2 sums inside its linear layers and never calls its Copy
    for name in USED if tensor_parallel > 1 else USED[:1]:
        with half_cured(name):
            answers[name] = message(
                ArithmeticError, verify, model, loss, params, square(model, tensor_parallel)
            )
    return answers


FUSED = {"bias_activation_fusion": True, "bias_dropout_fusion": True, "cross_entropy_loss_fusion": True}
RECOMPUTED = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def on_rank(rank):
    megatron_gpt()
    answers = {size: layout(size) for size in (2, 1)}
    return answers | {"fused": optional(FUSED, "tanh"), "recomputed": optional(RECOMPUTED, "none")}


def optional(options, gelu):
    """Exact product with fusions and recomputation asked for, and what the context turned off for it."""
    model = megatron_gpt(1, torch.float64, **options)
    before = dict(vars(model.config))
    loss = megatron_loss(model, *oracles.batch(VOCABULARY, length=LENGTH))
    names, params = oracles.parameters(model)
    v = direction(model)
    with twice_differentiable(model) as changed:
        exact = hvp.hessian_vector_product(loss, params, v, "exact")
    assert dict(vars(model.config)) == before
    shard = {k: dict(zip(names, x, strict=True)) for k, x in (("params", params), ("v", v), ("exact", exact))}
    return gap(shard["exact"], truth([shard], gelu)), changed


@pytest.fixture(scope="module")
def found():
    """{tensor-parallel size: answers of its ranks}; one start of two ranks serves every test of this file."""
    answers = ranks.run(on_rank, 2, timeout=300)
    single = {key: answers[0][key] for key in ("fused", "recomputed")}
    return single | {size: [a[size] for a in answers[:size]] for size in (1, 2)}


@pytest.mark.parametrize("size", [1, 2])
def test_exact_equals_the_plain_gpt_in_float64(found, size):
    shards = [a[torch.float64] for a in found[size]]
    assert gap(whole(shards, "exact"), truth(shards)) < 1e-10
    assert gap(whole(shards, "difference"), whole(shards, "exact")) < 1e-6


@pytest.mark.parametrize("size", [1, 2])
def test_exact_in_float32_keeps_the_stock_gradient_bit_by_bit(found, size):
    shards = [a[torch.float32] for a in found[size]]
    true = truth(shards)
    assert gap(whole(shards, "exact"), true) < 4 * gap(truth(shards, dtype=torch.float32), true)
    assert all(a["same bits"] and a["changed"] == [] for a in shards)


@pytest.mark.parametrize("size", [1, 2])
def test_stock_megatron_is_wrong_and_a_silent_fallback_would_be_seen(found, size):
    shards = [a[torch.float64] for a in found[size]]
    assert gap(whole(shards, "stock"), truth(shards)) > 0.1
    assert gap(whole(shards, "raw"), truth(shards)) < 1e-10
    for answers in found[size]:
        assert "_VocabParallelCrossEntropy" in answers["unknown"]
        assert "method: difference" in answers["unknown"]


@pytest.mark.parametrize(("size", "name"), [(1, USED[0]), *((2, name) for name in USED)])
def test_verification_notices_each_missing_stand_in(found, size, name):
    for answers in found[size]:
        assert "exact Hessian-vector product is" in answers[name]


@pytest.mark.parametrize("size", [1, 2])
def test_exact_on_a_llama_equals_a_difference(found, size):
    for answers in found[size]:
        assert answers["llama"] < 1e-6


@pytest.mark.parametrize(
    # the fused kernels write the constants of GELU's tanh form with nine digits
    ("what", "bound", "off"),
    [("fused", 1e-8, sorted(FUSED)), ("recomputed", 1e-10, ["recompute_granularity"])],
)
def test_fusions_and_recomputation_are_turned_off_and_activations_keep_their_function(
    found, what, bound, off
):
    error, changed = found[what]
    assert error < bound and changed == off
