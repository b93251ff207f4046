"""The exact Hessian-vector product on Megatron-DeepSpeed's own GPTModel; needs a checkout, named by
MEGATRON_DEEPSPEED."""

import contextlib
import importlib.util
import os
import sys
import types
import warnings

import oracles
import pytest
import ranks
import torch
from test_twice_differentiable import (
    HEADS,
    LAYERS,
    LENGTH,
    VOCABULARY,
    WIDTH,
    direction,
    gap,
    raw_product,
    square,
    truth,
    whole,
)

from megatron_commute import hvp
from megatron_commute.adapters.twice_differentiable import twice_differentiable, verify

pytestmark = [
    pytest.mark.megatron_deepspeed,
    pytest.mark.skipif("MEGATRON_DEEPSPEED" not in os.environ, reason="MEGATRON_DEEPSPEED names no checkout"),
]
FLAGS = (
    f"--num-layers {LAYERS} --hidden-size {WIDTH} --num-attention-heads {HEADS} --seq-length {LENGTH} "
    f"--max-position-embeddings {LENGTH} --micro-batch-size 1 --lr 1e-3 --train-iters 1 --hidden-dropout 0 "
    f"--attention-dropout 0 --tokenizer-type NullTokenizer --vocab-size {VOCABULARY} "
    "--no-gradient-accumulation-fusion --no-masked-softmax-fusion"
)


def start(tensor_parallel):
    """Megatron-DeepSpeed's global state for this rank; returns its arguments."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    sys.path.insert(0, os.environ["MEGATRON_DEEPSPEED"])
    for name, attribute in (("transformers", "AutoTokenizer"), ("regex", "compile")):
        if importlib.util.find_spec(name) is None:  # its tokenizers want them on import, the model does not
            sys.modules[name] = types.ModuleType(name)
            setattr(sys.modules[name], attribute, None)
    sys.argv = ["pretrain_gpt.py", *FLAGS.split(), "--tensor-model-parallel-size", str(tensor_parallel)]
    from megatron import global_vars
    from megatron.arguments import parse_args, validate_args
    from megatron.core import parallel_state
    from megatron.core.enums import ModelType
    from megatron.core.tensor_parallel import random

    args = parse_args()
    validate_args(args)
    args.padded_vocab_size, args.model_type = VOCABULARY, ModelType.encoder_or_decoder
    args.curriculum_learning_legacy = False
    global_vars.set_args(args)
    global_vars._build_num_microbatches_calculator(args)
    parallel_state.initialize_model_parallel(tensor_parallel)
    random.CudaRNGStatesTracker.fork = lambda self, name=None: contextlib.nullcontext()
    return args


def on_rank(rank, tensor_parallel):
    """Answers where a Copy sums the gradient of the linear layers' input, and where they overlap that
    themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args = start(tensor_parallel)
        return {overlapped: layout(args, tensor_parallel, overlapped) for overlapped in (False, True)}


def layout(args, tensor_parallel, overlapped):
    """Exact and stock products on this rank."""
    args.async_tensor_model_parallel_allreduce = overlapped
    from megatron.arguments import core_transformer_config_from_args
    from megatron.model import GPTModel

    model = GPTModel(core_transformer_config_from_args(args), num_tokentypes=0, parallel_output=True)
    with torch.no_grad():
        for p, noise in zip(model.parameters(), direction(model, seed=4), strict=True):
            p.add_(0.2 * noise)
    tokens, labels = oracles.batch(VOCABULARY, samples=1, length=LENGTH)
    positions = torch.arange(LENGTH)[None]
    mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1)
    names, params = oracles.parameters(model)
    v = direction(model)

    def loss(at):
        state = dict(zip(names, at, strict=True))
        out = torch.func.functional_call(model, state, (tokens, positions, mask), {"labels": labels})
        return (out[0] if isinstance(out, tuple) else out).mean()

    with twice_differentiable(model) as changed:
        exact = hvp.hessian_vector_product(loss, params, v, "exact", step=1.0)
    stock = raw_product(loss, params, v)
    verify(model, loss, params, square(model, tensor_parallel))
    found = {"params": params, "v": v, "exact": exact, "stock": stock}
    return {key: dict(zip(names, vector, strict=True)) for key, vector in found.items()} | {
        "changed": changed
    }


@pytest.mark.parametrize("size", [1, 2])
def test_exact_equals_the_plain_gpt_and_stock_does_not(size):
    answers = ranks.run(on_rank, size, size, timeout=300)
    for overlapped in (False, True):
        shards = [a[overlapped] for a in answers]
        expected = truth(shards, gelu="tanh", samples=1)
        assert gap(whole(shards, "exact"), expected) < 1e-6
        assert gap(whole(shards, "stock"), expected) > 0.1
        assert shards[0]["changed"] == ["bias_dropout_fusion", "bias_gelu_fusion"]
