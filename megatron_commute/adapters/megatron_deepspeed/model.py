"""The Model of a run of Megatron-DeepSpeed, by the kind of its engine."""

import contextlib
import dataclasses
import sys

from megatron_commute.adapters import megatron_core, zero_partitions
from megatron_commute.adapters.megatron_deepspeed import attention


def probe_model(engine, micro_batch, method):
    """The Model of the model under `engine`: a GPTModel under ZeRO stage 0 to 3, or a GPTModelPipe.

    micro_batch: sequences of one forward pass; method: of the configuration. Activation
    checkpointing is off while a probe runs, and attention is torch's own. Raises ValueError where
    method, model and engine do not go together.
    """
    from deepspeed.runtime.pipe.engine import PipelineEngine

    staged = isinstance(engine, PipelineEngine)
    if not staged and engine.zero_optimization_stage() < 3:
        model = megatron_core.probe_model(engine, micro_batch, method, mean_loss)

        twice = method == "exact"

        @contextlib.contextmanager
        def silent(method):
            with own_rotation(), attention.in_float32(engine.module, twice), model.quiet(method):
                yield

        return dataclasses.replace(model, quiet=silent)
    if method != "difference":
        layout = "pipelines have" if staged else "ZeRO-3 has"
        raise ValueError(f"{layout} no double backward: write `method: difference` under `probe`")
    module, here = engine.module, megatron_core.groups()
    params = [p for p in module.parameters() if p.requires_grad]
    owned = _counted_here(params)

    @contextlib.contextmanager
    def quiet():
        with contextlib.ExitStack() as rest:
            rest.enter_context(own_rotation())
            for change in (attention.in_float32, megatron_core.in_float32, megatron_core.without_recomputing):
                rest.enter_context(change(module))
            yield

    if staged:
        from megatron_commute.adapters import pipeline

        place = next(module.parameters()).device
        return pipeline.probe_model(
            engine,
            lambda tokens: pipeline_batch(tokens.to(place)),
            micro_batch,
            second_moments=lambda: zero_partitions.second_moments(engine, params, here),
            owned=owned,
            decayed=megatron_core.decayed(engine, params),
            groups_=here,
            quiet=quiet,
        )
    from megatron_commute.adapters import zero3

    return zero3.probe_model(engine, mean_loss, micro_batch, owned=owned, groups=here, quiet=quiet)


@contextlib.contextmanager
def own_rotation():
    """Rotary tables of the probe's own. Megatron keeps them in globals, in the dtype of whoever
    comes first: a probe before the first step of a resumed bf16 run would leave it float32 tables,
    and training float32 activations.
    """
    tables = sys.modules.get("megatron.model.rotary_pos_embedding")
    if tables is None:
        yield
        return
    kept = tables.cos_cached, tables.sin_cached
    tables.cos_cached = tables.sin_cached = None
    try:
        yield
    finally:
        tables.cos_cached, tables.sin_cached = kept


def _counted_here(params):
    """Per parameter, False where another tensor-parallel rank holds the same values and counts
    them.
    """
    from megatron.core import parallel_state as mpu

    first = mpu.get_tensor_model_parallel_rank() == 0
    return [first or getattr(p, "tensor_model_parallel", False) for p in params]


def _masked(tokens, without_mask=False):
    """(inputs, labels, attention mask, which tokens count, positions) of tokens i64[b, s + 1], as
    pretrain_gpt.py makes them, without its broadcast: every rank draws the same tokens itself.
    without_mask: None for the attention mask.
    """
    from megatron import get_args, get_tokenizer
    from megatron.utils import get_ltor_masks_and_position_ids

    args = get_args()
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    mask, counted, positions = get_ltor_masks_and_position_ids(
        inputs,
        get_tokenizer().eod,
        args.reset_position_ids,
        args.reset_attention_mask,
        args.eod_mask_loss,
        without_mask,
    )
    return inputs, labels, mask, counted, positions


def pipeline_batch(tokens):
    """What get_batch_pipe of pretrain_gpt.py makes of tokens i64[b, s + 1]: first inputs, last
    labels.
    """
    inputs, labels, mask, counted, positions = _masked(tokens)
    return (inputs, positions, mask), (labels, counted)


def mean_loss(module, tokens):
    """Mean loss in nats per token that counts, as pretrain_gpt.py takes it; tokens: i64[b, s + 1]
    on any device.
    """
    from megatron import get_args

    flash = get_args().use_flash_attn or get_args().use_flash_attn_triton
    tokens = tokens.to(next(module.parameters()).device)
    inputs, labels, mask, counted, positions = _masked(tokens, without_mask=flash)
    found = module(inputs, positions, mask, labels=labels)
    losses = found[0] if isinstance(found, tuple) else found
    counted = counted.reshape(losses.shape).to(losses.dtype)
    return (losses * counted).sum() / counted.sum()


def decoupled_decay(engine, weight_decay):
    """The decay that acts beside the gradient's flow: weight_decay of AdamW and its kin, 0 where it
    enters the gradient.

    torch.optim.Adam, which Megatron takes without CUDA, and SGD add it to the gradient.
    """
    import torch

    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    if isinstance(inner, torch.optim.Adam):  # AdamW is one with the flag set
        return weight_decay if inner.defaults.get("decoupled_weight_decay") else 0.0
    return 0.0 if isinstance(inner, torch.optim.SGD) else weight_decay


def learning_rate(scheduler, batches, seq_length, behind=lambda: 0):
    """step -> rate of that step (0-based) by Megatron's scheduler, which stays as it is. batches:
    settings.batches.Batches of the run. behind: ()
    -> samples of steps that it has not counted, as their update was left out.
    """
    import copy

    def rate(step):
        there = copy.copy(scheduler)
        begin = batches.begin(step)
        there.num_steps = max(0, begin - behind())
        there.num_tokens = begin * seq_length
        return float(there.get_lr())

    return rate
