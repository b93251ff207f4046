"""Double backward and the fused pass on Megatron-DeepSpeed's own GPTModel, in float64; needs a checkout."""

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
from megatron_models import (
    HEADS,
    LAYERS,
    LENGTH,
    VOCABULARY,
    WIDTH,
    direction,
    gap,
    message,
    raw_product,
    square,
    truth,
    whole,
)

from megatron_commute import hvp
from megatron_commute.adapters import fused as fused_pass
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


LLAMA = (
    " --swiglu --ffn-hidden-size 24 --normalization rmsnorm --use-rotary-position-embeddings --rotary-percent 0.5 "
    "--untie-embeddings-and-output-weights --disable-bias-linear --no-position-embedding"
)


def start(tensor_parallel, flags=""):
    """Megatron-DeepSpeed's global state for this rank; returns its arguments."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    sys.path.insert(0, os.environ["MEGATRON_DEEPSPEED"])
    for name, attribute in (("transformers", "AutoTokenizer"), ("regex", "compile")):
        if importlib.util.find_spec(name) is None:  # its tokenizers want them on import, the model does not
            sys.modules[name] = types.ModuleType(name)
            setattr(sys.modules[name], attribute, None)
    words = [*(FLAGS + flags).split(), "--tensor-model-parallel-size", str(tensor_parallel)]
    sys.argv = ["pretrain_gpt.py", *words]
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


def gpt(args, rank):
    """A GPTModel in float64 away from its initialisation, its loss on one sequence, names, parameters and tokens.

    One sequence: its attention takes more only with queries that lie one after the other.
    """
    from megatron.arguments import core_transformer_config_from_args
    from megatron.model import GPTModel

    model = GPTModel(core_transformer_config_from_args(args), num_tokentypes=0, parallel_output=True).double()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            seed = i + 1000 * rank * getattr(p, "tensor_model_parallel", False)
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed), dtype=p.dtype))
    tokens, labels = oracles.batch(VOCABULARY, samples=1, length=LENGTH)
    positions, mask = torch.arange(LENGTH)[None], torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1)
    names, params = oracles.parameters(model)

    def loss(at):
        state = dict(zip(names, at, strict=True))
        out = torch.func.functional_call(model, state, (tokens, positions, mask), {"labels": labels})
        return (out[0] if isinstance(out, tuple) else out).mean()

    return model, loss, names, params, torch.cat([tokens, labels[:, -1:]], 1)


def by_double_backward(rank, tensor_parallel):
    """Answers where a Copy sums the gradient of the linear layers' input, and where they overlap that themselves."""
    warnings.simplefilter("ignore")
    args, answers = start(tensor_parallel), {}
    for overlapped in (False, True):
        args.async_tensor_model_parallel_allreduce = overlapped
        model, loss, names, params, _ = gpt(args, rank)
        v = direction(model)
        with twice_differentiable(model) as changed:
            exact = hvp.hessian_vector_product(loss, params, v, "exact", step=1.0)
        found = {"params": params, "v": v, "exact": exact, "stock": raw_product(loss, params, v)}
        verify(model, loss, params, square(model, tensor_parallel))
        answers[overlapped] = {key: dict(zip(names, vector, strict=True)) for key, vector in found.items()}
        answers[overlapped]["changed"] = changed
    return answers


@pytest.mark.parametrize("size", [1, 2])
def test_exact_equals_the_plain_gpt_and_stock_does_not(size):
    answers = ranks.run(by_double_backward, size, size, timeout=300)
    for overlapped in (False, True):
        shards = [a[overlapped] for a in answers]
        expected = truth(shards, gelu="tanh", samples=1)
        assert gap(whole(shards, "exact"), expected) < 1e-6  # constants of nine digits, a loss in float32
        assert gap(whole(shards, "stock"), expected) > 0.1
        assert shards[0]["changed"] == ["bias_dropout_fusion", "bias_gelu_fusion"]


def by_the_fused_pass(rank, tensor_parallel, flags):
    """|difference| of loss, gradient and H v from the module's own, largest over parameters; the text of a refusal."""
    warnings.simplefilter("ignore")
    args = start(tensor_parallel, flags)
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group() if tensor_parallel > 1 else None
    model, loss, _, params, tokens = gpt(args, rank)
    tables = sys.modules["megatron.model.rotary_pos_embedding"]
    tables.cos_cached = before = torch.zeros(1)
    run = fused_pass.fused(model, group)
    assert tables.cos_cached is before
    found = run(params, params, tokens)
    tables.cos_cached = None
    with twice_differentiable(model):
        gradient, product, *_ = hvp.gradient_and_product(loss, params, params, "exact", step=1.0)
        away = [abs(found.loss - float(loss(params)))]
    fused_pass.verify(model, loss, params, tokens, group)
    for a, b in ((found.gradient, gradient), (found.product, product)):
        largest = max(float(t.norm()) for t in b)
        away.append(max(float((x - y).norm()) / largest for x, y in zip(a, b, strict=True)))
    args.eod_mask_loss = True
    return away, message(ValueError, fused_pass.refuse, model)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("flags", ["", LLAMA], ids=["gpt", "llama"])
def test_fused_is_the_modules_own(flags, size):
    for away, refused in ranks.run(by_the_fused_pass, size, size, flags, timeout=300):
        assert max(away) < 1e-5  # the host takes its loss and its rotations in float32
        assert "losses that leave out ends of documents" in refused
