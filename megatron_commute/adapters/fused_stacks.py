"""GPTModels of megatron-core and of Megatron-DeepSpeed, read as the stacks of rop.py; what is not
known is refused by name.

Nothing of a module is written to. A stack holds numbers of parameters, in the order of
module.named_parameters().
"""

from __future__ import annotations

import sys

import torch

from megatron_commute.measure.rop import Block, Linear, Norm, Rotary, Stack

_INSTEAD = "use method difference"
# classes whose arithmetic is known here, and those that hold others
_BOTH = {
    "GPTModel",
    "VocabParallelEmbedding",
    "Embedding",
    "Dropout",
    "ModuleList",
    "FusedScaleMaskSoftmax",
    "RowParallelLinear",
    "ColumnParallelLinear",
    "RMSNorm",
    "RotaryEmbedding",
}
_KNOWN = {
    "megatron-core": _BOTH
    | {
        "LanguageModelEmbedding",
        "TransformerBlock",
        "TransformerLayer",
        "SelfAttention",
        "DotProductAttention",
        "IdentityOp",
        "IdentityFuncOp",
        "MLP",
        "LayerNorm",
    },
    "Megatron-DeepSpeed": _BOTH
    | {
        "TransformerLanguageModel",
        "ParallelTransformer",
        "ParallelTransformerLayer",
        "ParallelAttention",
        "CoreAttention",
        "FlashSelfAttention",
        "FlashSelfAttentionTriton",
        "ParallelMLP",
        "SPLayerNorm",
        "MixedFusedLayerNorm",
        "MixedFusedRMSNorm",
    },
}
# settings (of configurations, modules and Megatron-DeepSpeed's arguments) that change the
# arithmetic when they are on
_SWITCHES = {
    "sequence_parallel": "sequence parallel",
    "enable_ds_sequence_parallel": "DeepSpeed's sequence parallel",
    "ds_sequence_parallel_fpdt": "DeepSpeed's FPDT",
    "apply_residual_connection_post_layernorm": "residuals after the norm",
    "layernorm_zero_centered_gamma": "zero-centred norm weights",
    "apply_layernorm_1p": "zero-centred norm weights",
    "attention_output_gate": "gated attention",
    "multi_latent_attention": "multi-latent attention",
    "window_size": "sliding windows",
    "no_rope_freq": "layers without rotation",
    "num_moe_experts": "a mixture of experts",
    "mtp_num_layers": "multi-token prediction",
    "activation_func_clamp_value": "clamped activations",
    "glu_linear_offset": "an offset in the gated activation",
    "drop_path": "stochastic depth",
    "fp8": "FP8 arithmetic",
    "fp4": "FP4 arithmetic",
    "reset_position_ids": "positions that begin again at each document",
    "reset_attention_mask": "attention that ends at each document",
    "eod_mask_loss": "losses that leave out ends of documents",
}
_SIZES = {"pipeline_model_parallel_size": "pipeline stages", "context_parallel_size": "context parallelism"}


def kind(module):
    """ "megatron-core" or "Megatron-DeepSpeed"; ValueError for any other module."""
    if type(module).__name__ == "GPTModel":
        if hasattr(module, "language_model"):
            return "Megatron-DeepSpeed"
        if hasattr(module, "decoder"):
            return "megatron-core"
    raise ValueError(f"{type(module).__name__} is no GPTModel of Megatron: {_INSTEAD}")


def refuse(module):
    """Raise ValueError naming the first layer or setting of a Megatron GPTModel that the fused pass
    does not know.
    """
    known = _KNOWN[kind(module)]
    frozen = [name for name, p in module.named_parameters() if not p.requires_grad]
    if frozen:
        raise ValueError(f"{frozen[0]} is frozen, and the fused pass takes every parameter: {_INSTEAD}")
    for name, part in module.named_modules():
        if type(part).__name__ not in known:
            raise ValueError(
                f"{name} ({type(part).__name__}) is no layer that the fused pass knows: {_INSTEAD}"
            )
        _refuse_settings(part, name)
        if hasattr(getattr(part, "config", None), "__dict__"):
            _refuse_settings(part.config, name)
    if kind(module) == "Megatron-DeepSpeed":
        from megatron import get_args

        _refuse_settings(get_args(), "Megatron-DeepSpeed's arguments")
    stack(module)


def _refuse_settings(holder, name):
    values = vars(holder)
    found = [text for key, text in _SWITCHES.items() if values.get(key)]
    found += [text for key, text in _SIZES.items() if (values.get(key) or 1) > 1]
    if values.get("softmax_type", "vanilla") != "vanilla":
        found.append(f"{values['softmax_type']} softmax")
    if found:
        raise ValueError(f"{name or 'the model'}: the fused pass knows nothing of {found[0]}: {_INSTEAD}")


def stack(module):
    """rop.Stack of a GPTModel; ValueError naming the layer where its form is not known."""
    names, params = zip(*module.named_parameters(), strict=True)
    numbers = {id(p): i for i, p in enumerate(params)}

    def number(p):
        return None if p is None else numbers[id(p)]

    def norm(part):
        bias = getattr(part, "bias", None)
        form = "rms" if "RMS" in type(part).__name__ else "layer"
        return Norm(weight=number(part.weight), bias=number(bias), eps=part.eps, kind=form)

    def linear(part):
        return Linear(weight=number(part.weight), bias=number(part.bias))

    read = _core if kind(module) == "megatron-core" else _deepspeed
    embedding, layers, last, output, rotary = read(module, params[0].device)
    blocks = tuple(_block(layer, norm, linear, rotary is not None) for layer in layers)
    words = number(embedding.word_embeddings.weight)
    positions = getattr(embedding, "position_embeddings", None)
    return Stack(
        words=words,
        positions=None if positions is None else number(positions.weight),
        blocks=blocks,
        norm=norm(last),
        output=words if output is None else number(output),
        rotary=rotary,
        names=names,
    )


def _core(module, device):
    """Embedding, layers, last norm, weight of an untied output layer, rotary tables of
    megatron-core's GPTModel.
    """
    position = module.position_embedding_type
    if position not in ("learned_absolute", "rope", "none"):
        raise ValueError(f"{position} positions are nothing that the fused pass knows: {_INSTEAD}")
    rotary = None
    if position == "rope":
        angles = module.rotary_pos_emb.get_freqs_non_repeated(module.max_sequence_length).to(device)
        interleaved = bool(module.rotary_pos_emb.rotary_interleaved)
        rotary = Rotary(cos=angles.cos(), sin=angles.sin(), interleaved=interleaved)
    output = None if module.share_embeddings_and_output_weights else module.output_layer.weight
    return module.embedding, module.decoder.layers, module.decoder.final_layernorm, output, rotary


def _deepspeed(module, device):
    """The same of Megatron-DeepSpeed's GPTModel."""
    model = module.language_model
    rotary = _rotation(model, device) if model.use_rotary_position_embeddings else None
    output = model.output_layer.weight if model.untie_embeddings_and_output_weights else None
    return model.embedding, model.encoder.layers, model.encoder.final_layernorm, output, rotary


def _rotation(model, device):
    """Tables of Megatron-DeepSpeed's rotation, read off what it makes of unit vectors.

    Without flash attention it takes cosine and sine of the cosines of the angles, so formulas would
    not do. It keeps tables of its own in globals, which are put back.
    """
    module = sys.modules[type(model.rotary_pos_emb).__module__]
    table = model.rotary_pos_emb(model.seq_length)[0].to(device, torch.float32)
    unit = torch.zeros(model.seq_length, 1, 1, table.shape[-1], device=device)
    half = unit.shape[-1] // 2
    unit[..., :half] = 1.0
    kept = module.cos_cached, module.sin_cached
    module.cos_cached = module.sin_cached = None
    try:
        turned = module.apply_rotary_pos_emb(unit, table)[:, 0, 0]
    finally:
        module.cos_cached, module.sin_cached = kept
    return Rotary(cos=turned[:, :half].contiguous(), sin=turned[:, half:].contiguous())


def _block(layer, norm, linear, rotary):
    attention, mlp = layer.self_attention, layer.mlp
    if hasattr(attention, "linear_qkv"):  # megatron-core
        for name in ("q_layernorm", "k_layernorm"):
            part = getattr(attention, name, None)
            if part is not None and type(part).__name__ != "IdentityOp":
                raise ValueError(
                    f"layer {layer.layer_number}: {name} is nothing that the fused pass knows: {_INSTEAD}"
                )
        core = attention.core_attention
        if attention.config.num_query_groups < attention.config.tensor_model_parallel_size:
            raise ValueError(f"query groups that tensor-parallel ranks share: {_INSTEAD}")
        parts = attention.linear_qkv, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2
        norms = layer.input_layernorm, layer.pre_mlp_layernorm
        heads = attention.num_attention_heads_per_partition, attention.num_query_groups_per_partition
        scale, layout = core.softmax_scale * (core.scale_mask_softmax.scale or 1.0), "grouped"
    else:
        if attention.use_gqa:
            raise ValueError(f"layer {layer.layer_number}: grouped queries of Megatron-DeepSpeed: {_INSTEAD}")
        parts = attention.query_key_value, attention.dense, mlp.dense_h_to_4h, mlp.dense_4h_to_h
        norms = layer.input_layernorm, layer.post_attention_layernorm
        heads = (attention.num_attention_heads_per_partition,) * 2
        scale, layout = _score_scale(attention), "parts"
    qkv, out, up, down = (linear(part) for part in parts)
    return Block(
        norm1=norm(norms[0]),
        qkv=qkv,
        out=out,
        norm2=norm(norms[1]),
        up=up,
        down=down,
        heads=heads[0],
        groups=heads[1],
        layout=layout,
        scale=scale,
        rotary=rotary,
        activation=_activation(mlp, layer.layer_number),
    )


def _score_scale(attention):
    """What Megatron-DeepSpeed multiplies the scores by."""
    flash = getattr(attention, "core_attention_flash", None)
    if flash is not None:
        return getattr(flash, "softmax_scale", None) or attention.hidden_size_per_attention_head**-0.5
    core = attention.core_attention
    # query-key layer scaling divides the scores by the layer's number, its softmax takes them back
    return 1.0 / core.norm_factor * (core.scale_mask_softmax.scale or 1.0)


def _activation(mlp, number):
    """The activation's kind; both Megatrons fuse GELU's tanh form with the bias."""
    config, function = mlp.config, mlp.activation_func
    functional = torch.nn.functional
    if hasattr(mlp, "linear_fc1"):
        gated, fused, swiglu = (
            config.gated_linear_unit,
            config.bias_activation_fusion,
            function is functional.silu,
        )
    else:
        gated, fused, swiglu = mlp.swiglu, mlp.bias_gelu_fusion, mlp.swiglu
    if gated and swiglu:
        return "swiglu"
    name = getattr(function, "__name__", str(function))
    if not gated and (function is functional.gelu or name in ("erf_gelu", "openai_gelu")):
        return "gelu_tanh" if fused or name == "openai_gelu" else "gelu_erf"
    raise ValueError(
        f"layer {number}: {'gated ' if gated else ''}{name} is no activation that the fused pass knows: "
        f"{_INSTEAD}"
    )
