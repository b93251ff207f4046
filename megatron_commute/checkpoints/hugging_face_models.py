"""Configurations of Hugging Face's GPT-2 and Llama: their modules by those of megatron-core, and
its flags.

Source of names, orders and formulas: modeling_gpt2 and modeling_llama of transformers 5.23. What
megatron_core.gpt_model cannot build is refused by name.
"""

import dataclasses

from megatron_commute.checkpoints.files import CheckpointError, read_json

TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of model: its modules by those of megatron-core, {module of ours: theirs in the order
    of their parameters}.
    """

    first: dict
    # modules before the layers
    layers: str
    # name of the list of layers
    layer: dict
    # modules of each layer
    last: dict
    # modules after them
    known: dict
    # {key of config.json: the values that are read}, the first of which a missing key means


FAMILIES = {
    "gpt2": Family(
        first={"embedding.word_embeddings": ["wte"], "embedding.position_embeddings": ["wpe"]},
        layers="h",
        layer={
            "input_layernorm": ["ln_1"],
            "self_attention.linear_qkv": ["attn.c_attn"],
            "self_attention.linear_proj": ["attn.c_proj"],
            "pre_mlp_layernorm": ["ln_2"],
            "mlp.linear_fc1": ["mlp.c_fc"],
            "mlp.linear_fc2": ["mlp.c_proj"],
        },
        last={"decoder.final_layernorm": ["ln_f"]},
        known={
            "activation_function": (*TANH, "gelu"),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
            "quantization_config": (None,),
        },
    ),
    "llama": Family(
        first={"embedding.word_embeddings": ["embed_tokens"]},
        layers="layers",
        layer={
            "self_attention.linear_qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            "self_attention.linear_proj": ["self_attn.o_proj"],
            "mlp.linear_fc1": ["mlp.gate_proj", "mlp.up_proj"],
            "mlp.linear_fc2": ["mlp.down_proj"],
            "input_layernorm": ["input_layernorm"],
            "pre_mlp_layernorm": ["post_attention_layernorm"],
        },
        last={"decoder.final_layernorm": ["norm"]},
        known={"hidden_act": ("silu", "swish"), "quantization_config": (None,)},
    ),
}


def configuration(folder):
    """config.json with the family's defaults. Raises CheckpointError for what is no model, or one
    that is not known.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: holds an adapter (PEFT), no whole model; merge it into its model (merge_and_unload) "
            "and save that"
        )
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise CheckpointError(
            f"{folder}: config.json says model_type {kind}; of Hugging Face's models "
            f"{' and '.join(FAMILIES)} are read"
        )
    for name, known in FAMILIES[kind].known.items():
        if config.setdefault(name, known[0]) not in known:
            raise CheckpointError(
                f"{folder}: config.json says {name} {config[name]}, which the analysis cannot rebuild; it "
                f"reads {' or '.join(map(str, known))}"
            )
    for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        if not isinstance(config.get(name), bool | None):
            raise CheckpointError(
                f"{folder}: config.json says {name} {str(config[name])[:40]}; write true or false there, or "
                "save it with the model again"
            )
    for name in ("layer_norm_epsilon", "rms_norm_eps", "initializer_range"):
        value = config.get(name, 0.0)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(
                f"{folder}: config.json says {name} {str(value)[:40]}; write a number there, or save it with "
                "the model again"
            )
    return config


def model_flags(config, folder):
    """gpt_model's flags {name: value} of a configuration. Raises CheckpointError for what it cannot
    build.
    """
    try:
        return _gpt2(config) if config["model_type"] == "gpt2" else _llama(config, folder)
    except KeyError as fault:
        raise CheckpointError(f"{folder}: config.json lacks {fault}; save it with the model again") from None


def _gpt2(config):
    width, heads = config["n_embd"], config["n_head"]
    return {
        "num_layers": config["n_layer"],
        "hidden_size": width,
        "num_attention_heads": heads,
        "ffn_hidden_size": config.get("n_inner") or 4 * width,
        "max_position_embeddings": config["n_positions"],
        "init_method_std": config.get("initializer_range", 0.02),
        "normalization": "LayerNorm",
        "norm_epsilon": config.get("layer_norm_epsilon", 1e-5),
        "swiglu": False,
        "group_query_attention": False,
        "num_query_groups": heads,
        "position_embedding_type": "learned_absolute",
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", True),
        "disable_bias_linear": False,
    }


def _llama(config, folder):
    heads = config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    biases = {bool(config.get(name)) for name in ("attention_bias", "mlp_bias")}
    if len(biases) > 1:
        raise CheckpointError(
            f"{folder}: config.json says attention_bias {bool(config.get('attention_bias'))}, mlp_bias "
            f"{bool(config.get('mlp_bias'))}, which the analysis cannot rebuild; it reads both or neither"
        )
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "num_attention_heads": heads,
        "kv_channels": config.get("head_dim") or config["hidden_size"] // heads,
        "ffn_hidden_size": config["intermediate_size"],
        "max_position_embeddings": config["max_position_embeddings"],
        "init_method_std": config.get("initializer_range", 0.02),
        "normalization": "RMSNorm",
        "norm_epsilon": config.get("rms_norm_eps", 1e-6),
        "swiglu": True,
        "group_query_attention": groups != heads,
        "num_query_groups": groups,
        "position_embedding_type": "rope",
        **_rotation(config, folder),
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
        "disable_bias_linear": biases == {False},
    }


def _rotation(config, folder):
    """Flags of the rotary positions: their base, and the scalings that megatron-core has."""
    said = {"rope_theta": config.get("rope_theta", 10000.0), **(config.get("rope_scaling") or {})}
    said |= config.get("rope_parameters") or {}  # since transformers 5
    kind = said.get("rope_type", said.get("type", "default"))
    flags = {"rotary_base": said["rope_theta"]}
    if kind == "linear":
        return {**flags, "rotary_seq_len_interpolation_factor": said["factor"]}
    names = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if kind == "llama3" and tuple(said.get(name) for name in names) == (1, 4, 8192):
        return {**flags, "use_rope_scaling": True, "rope_scaling_factor": said["factor"]}
    if kind != "default" or said.get("partial_rotary_factor", 1) != 1:
        raise CheckpointError(
            f"{folder}: config.json says the rotary positions {said}, which the analysis cannot rebuild; it "
            "reads the types default, linear, and llama3 with low_freq_factor 1, high_freq_factor 4, "
            "original_max_position_embeddings 8192"
        )
    return flags


def parts(family, flags):
    """(our parameter, [theirs, without the prefix]) of the whole model, in the order of their own
    parameters.
    """
    every = [*family.first.items()]
    for number in range(flags.num_layers):
        for ours, theirs in family.layer.items():
            inside = [f"{family.layers}.{number}.{name}" for name in theirs]
            every.append((f"decoder.layers.{number}.{ours}", inside))
    every += family.last.items()
    if flags.untie_embeddings_and_output_weights:
        every.append(("output_layer", ["lm_head"]))
    for ours, theirs in every:
        plain = flags.normalization == "RMSNorm" if "layernorm" in ours else flags.disable_bias_linear
        alone = plain or ours.startswith(("embedding", "output"))
        for kind in ("weight",) if alone else ("weight", "bias"):
            yield f"{ours}.{kind}", [f"{name}.{kind}" for name in theirs]
