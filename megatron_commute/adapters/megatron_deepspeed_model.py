"""The probe.Model of a run of Megatron-DeepSpeed, by the kind of its engine."""

from megatron_commute.adapters import megatron_core


def probe_model(engine, micro_batch, method):
    """The probe.Model of the model under `engine`: a GPTModel under ZeRO stage 0 to 3, or a GPTModelPipe.

    micro_batch: sequences of one forward pass; method: of the configuration. Activation checkpointing is off while a probe
    runs. Raises ValueError where method, model and engine do not go together.
    """
    from deepspeed.runtime.pipe.engine import PipelineEngine

    if isinstance(engine, PipelineEngine):
        from megatron_commute.adapters import pipeline

        return pipeline.probe_model(engine, micro_batch, method)
    if engine.zero_optimization_stage() == 3:
        from megatron_commute.adapters import zero3

        return zero3.probe_model(engine, micro_batch, method, mean_loss)
    return megatron_core.probe_model(engine, micro_batch, method, mean_loss)


def mean_loss(module, tokens):
    """Mean loss in nats per token that counts, as pretrain_gpt.py takes it; tokens: i64[b, s + 1] on any device."""
    from megatron import get_args, get_tokenizer
    from megatron.utils import get_ltor_masks_and_position_ids

    args = get_args()
    tokens = tokens.to(next(module.parameters()).device)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    attention, counted, positions = get_ltor_masks_and_position_ids(
        inputs,
        get_tokenizer().eod,
        args.reset_position_ids,
        args.reset_attention_mask,
        args.eod_mask_loss,
        args.use_flash_attn or args.use_flash_attn_triton,
    )
    found = module(inputs, positions, attention, labels=labels)
    losses = found[0] if isinstance(found, tuple) else found
    counted = counted.reshape(losses.shape).to(losses.dtype)
    return (losses * counted).sum() / counted.sum()


def decoupled_decay(engine, weight_decay):
    """The decay that acts beside the gradient's flow: weight_decay of AdamW and its kin, 0 where it enters the gradient.

    torch.optim.Adam, which Megatron takes without CUDA, and SGD add it to the gradient.
    """
    import torch

    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    if isinstance(inner, torch.optim.Adam):  # AdamW is one with the flag set
        return weight_decay if inner.defaults.get("decoupled_weight_decay") else 0.0
    return 0.0 if isinstance(inner, torch.optim.SGD) else weight_decay


def learning_rate(scheduler, global_batch, seq_length):
    """step -> rate of that step (0-based) by Megatron's scheduler, which stays as it is."""
    import copy

    def rate(step):
        there = copy.copy(scheduler)
        there.num_steps = step * global_batch
        there.num_tokens = there.num_steps * seq_length
        return float(there.get_lr())

    return rate
