"""megatron-core under a DeepSpeed engine: everything this project asks of Megatron, in one place.

Megatron and DeepSpeed are imported inside functions, so that the rest of the package works without
them.
"""

import contextlib
import dataclasses
import functools
import types
import warnings

import torch

from megatron_commute import reduce
from megatron_commute.adapters import torch_loop, zero_partitions

_MPU = ("rank", "world_size", "group")


@contextlib.contextmanager
def quiet_import():
    """megatron-core warns a dozen times about Transformer Engine and Apex while it is imported;
    users need not see it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def on_cpu():
    """Let megatron-core run without CUDA: its device and random-state calls become harmless.
    Idempotent.
    """
    if torch.cuda.is_available():
        return
    with quiet_import():
        from megatron.core.tensor_parallel import random

    torch.cuda.current_device = lambda: torch.device("cpu")
    random.CudaRNGStatesTracker.add = lambda self, name, seed: None
    random.CudaRNGStatesTracker.fork = lambda self, name=None: contextlib.nullcontext()


def initialise(tensor_parallel, seed, minutes=30):
    """Set up megatron-core's process groups and random states; torch.distributed is initialised
    already.

    minutes: how long a collective of these groups waits for a rank that is gone or stuck.
    """
    on_cpu()
    with quiet_import():
        from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_parallel, distributed_timeout_minutes=minutes
    )
    seed_dropout(seed)


def seed_dropout(seed):
    """Seed all random states from here on; `seed` must be equal on ranks that share a replica.

    They drop the same elements of what they hold in common; of what tensor parallelism splits, on
    GPUs, each drops its own.
    """
    torch.manual_seed(seed)
    if torch.cuda.is_available():
        with quiet_import():
            from megatron.core import tensor_parallel as tp

        tp.model_parallel_cuda_manual_seed(seed)


def groups():
    """reduce.Groups of the running job; a group of one rank is None."""
    with quiet_import():
        from megatron.core import parallel_state as mpu

    data, model = mpu.get_data_parallel_group(), mpu.get_model_parallel_group()
    return reduce.Groups(
        data if reduce.size(data) > 1 else None, model if reduce.size(model) > 1 else None, reduce.everyone()
    )


def deepspeed_mpu():
    """megatron-core's process groups under the names that DeepSpeed asks for (those of older
    Megatron).
    """
    with quiet_import():
        from megatron.core import parallel_state as mpu

    kinds = {
        "model": "tensor_model",
        "tensor_model": "tensor_model",
        "data": "data",
        "pipeline_model": "pipeline_model",
    }
    names = {
        f"get_{old}_parallel_{what}": f"get_{new}_parallel_{what}"
        for old, new in kinds.items()
        for what in _MPU
    }
    return types.SimpleNamespace(**{old: getattr(mpu, new) for old, new in names.items()})


def gpt_model(args, vocab_size):
    """megatron-core's GPTModel (local spec) from Megatron's own flags, on the device of this rank.

    args: namespace with num_layers, hidden_size, num_attention_heads, ffn_hidden_size, seq_length,
    max_position_embeddings, tensor_model_parallel_size, hidden_dropout, attention_dropout,
    init_method_std, normalization, swiglu, group_query_attention, num_query_groups,
    position_embedding_type, untie_embeddings_and_output_weights, disable_bias_linear, bf16, and
    where it has them, norm_epsilon, kv_channels, rotary_base, use_rope_scaling,
    rope_scaling_factor, rotary_seq_len_interpolation_factor. vocab_size: padded to a multiple of
    the tensor-parallel size.
    """
    with quiet_import():
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.transformer import TransformerConfig

    with quiet_import():
        config = TransformerConfig(
            num_layers=args.num_layers,
            hidden_size=args.hidden_size,
            num_attention_heads=args.num_attention_heads,
            num_query_groups=args.num_query_groups if args.group_query_attention else None,
            ffn_hidden_size=args.ffn_hidden_size,
            tensor_model_parallel_size=args.tensor_model_parallel_size,
            hidden_dropout=args.hidden_dropout,
            attention_dropout=args.attention_dropout,
            init_method_std=args.init_method_std,
            normalization=args.normalization,
            gated_linear_unit=args.swiglu,
            activation_func=torch.nn.functional.silu if args.swiglu else torch.nn.functional.gelu,
            add_bias_linear=not args.disable_bias_linear,
            use_cpu_initialization=True,
            gradient_accumulation_fusion=False,
            masked_softmax_fusion=torch.cuda.is_available(),
            bias_dropout_fusion=False,
            bias_activation_fusion=False,
            params_dtype=torch.float32,
            bf16=args.bf16,
            **_given(args, layernorm_epsilon="norm_epsilon", kv_channels="kv_channels"),
        )
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization=args.normalization),
        vocab_size=vocab_size,
        max_sequence_length=args.max_position_embeddings,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        **_given(
            args,
            rotary_base="rotary_base",
            rope_scaling="use_rope_scaling",
            rope_scaling_factor="rope_scaling_factor",
            seq_len_interpolation_factor="rotary_seq_len_interpolation_factor",
        ),
    )
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def _given(args, **flags):
    """{name: value of the flag} of those flags that `args` has; megatron-core's defaults hold for
    the others.
    """
    return {name: getattr(args, flag) for name, flag in flags.items() if hasattr(args, flag)}


def token_losses(model, tokens, labels):
    """Loss of every token, f32[b, s], of a GPTModel; tokens, labels: i64[b, s]. Causal attention
    over whole sequences.
    """
    length = tokens.shape[1]
    positions = torch.arange(length, device=tokens.device).expand_as(tokens)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=tokens.device).triu(1)
    return model(tokens, positions, mask, labels=labels).float()


def mean_loss(model, tokens):
    """Mean loss in nats per token; tokens: i64[b, s + 1] on any device."""
    tokens = tokens.to(next(model.parameters()).device)
    return token_losses(model, tokens[:, :-1], tokens[:, 1:]).mean()


def probe_model(engine, micro_batch, method, loss=mean_loss):
    """The Model of a GPTModel under a DeepSpeed engine with ZeRO stage 0 to 2; loss as for
    torch_loop.probe_model.

    Raises ValueError for ZeRO stage 3, whose parameters are partitioned, for an optimiser that
    hides them (bf16 without ZeRO), for method exact where a part of the model cannot be
    differentiated twice, and for method fused where it is not known to the hand-written pass.
    """
    from megatron_commute.adapters import fused
    from megatron_commute.adapters import twice_differentiable as twice

    if engine.zero_optimization_stage() > 2:
        raise ValueError("probes read whole parameters: set zero_optimization.stage to 0, 1 or 2")
    module, here = engine.module, groups()
    if method == "exact":
        twice.refuse(module)
    params = [p for p in module.parameters() if p.requires_grad]
    first = reduce.rank_in(here.model) == 0
    owned = [first or getattr(p, "tensor_model_parallel", False) for p in params]
    model = torch_loop.probe_model(
        module,
        loss,
        micro_batch,
        second_moments=lambda: zero_partitions.second_moments(engine, params, groups()),
        owned=owned,
        decayed=decayed(engine, params),
        groups=here,
        exact=lambda: twice.twice_differentiable(module),
        verify=functools.partial(twice.verify, module),
    )
    if method == "fused":
        model = fused.with_fused(model, module, here.model)

    @contextlib.contextmanager
    def quiet(method):
        with in_float32(module), without_recomputing(module), model.quiet(method):
            yield

    return dataclasses.replace(model, quiet=quiet)


def decayed(engine, params):
    """Per parameter, whether the optimiser's weight decay acts on it. ValueError where DeepSpeed
    hides the parameters.
    """
    both = zip(zero_partitions.of(engine), engine.optimizer.param_groups, strict=True)
    decay = {id(p): bool(group.get("weight_decay")) for (members, _), group in both for p in members}
    if any(id(p) not in decay for p in params):
        kind = type(engine.optimizer).__name__
        raise ValueError(
            f"DeepSpeed's {kind} hides the model's parameters: set zero_optimization.stage to 1 or 2"
        )
    return [decay[id(p)] for p in params]


def in_float32(module):
    """Let a half-precision model run on float32 weights: its softmax would cast to the training
    precision.
    """
    return replaced(module, input_in_fp16=False, input_in_bf16=False, input_in_float16=False)


def without_recomputing(module):
    """Keep activations instead of recomputing them: the backward pass would recompute with the
    module's own weights.

    The names are those of Megatron-DeepSpeed; megatron-core keeps its own in a configuration that
    the trainer never sets.
    """
    return replaced(
        module, checkpoint_activations=False, recompute_granularity=None, checkpoint_core_attention=False
    )


@contextlib.contextmanager
def replaced(module, **values):
    """Give these values to every submodule that has an attribute of the name, for a time."""
    kept = [(m, name, vars(m)[name]) for m in module.modules() for name in values if name in vars(m)]
    try:
        for m, name, _ in kept:
            setattr(m, name, values[name])
        yield
    finally:
        for m, name, value in kept:
            setattr(m, name, value)


def stock_dataset(blend, samples, seq_length, vocab_size, seed, cache):
    """megatron-core's own blended GPTDataset of `samples` sequences: the data path of a run without
    this plug-in.

    blend: Megatron's --train-data-path list, "weight prefix" pairs or one prefix.
    """
    with quiet_import():
        from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
        from megatron.core.datasets.utils import get_blend_from_list

    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend_per_split=[get_blend_from_list(blend), None, None],
        path_to_cache=cache,
        tokenizer=types.SimpleNamespace(
            vocab_size=vocab_size, eod=-2, pad=-1, unique_identifiers={"vocab": vocab_size}
        ),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    builder = BlendedMegatronDatasetBuilder(GPTDataset, [samples, 0, 0], lambda: True, config)
    return builder.build()[0]
