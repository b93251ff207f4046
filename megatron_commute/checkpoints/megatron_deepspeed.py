"""Checkpoints of Megatron-DeepSpeed: its names and layouts told in those of megatron-core's
GPTModel.

ZeRO 0 to 3, tensor parallelism, pipelines with their layer files. Source of the layouts:
megatron/model of Megatron-DeepSpeed (4efb479d). A rank's queries, keys and values lie one after the
other there, and head by head in megatron-core.
"""

import json
import re
import types

from megatron_commute.checkpoints.checkpoint import Checkpoint
from megatron_commute.checkpoints.files import CheckpointError, load
from megatron_commute.checkpoints.names import unwrapped
from megatron_commute.checkpoints.parallel import merged, refuse_other_steps
from megatron_commute.checkpoints.zero import layout, rank_state

_PARTS = {
    "embedding.word_embeddings": "embedding.word_embeddings",
    "embedding.position_embeddings": "embedding.position_embeddings",
    "final_layernorm": "decoder.final_layernorm",
    "output_layer": "output_layer",
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "pre_mlp_layernorm",
    "self_attention.query_key_value": "self_attention.linear_qkv",
    "self_attention.dense": "self_attention.linear_proj",
    "mlp.dense_h_to_4h": "mlp.linear_fc1",
    "mlp.dense_4h_to_h": "mlp.linear_fc2",
}
# flag: the only values that are known here, for models and losses that are those of
# megatron_core.gpt_model
_KNOWN = {
    "apply_layernorm_1p": (False, None), "apply_residual_connection_post_layernorm": (False, None),
    "openai_gelu": (False, None), "squared_relu": (False, None), "onnx_safe": (False, None),
    "rotary_percent": (1.0, None), "rope_theta": (10000, None), "layernorm_epsilon": (1e-5, None),
    "reset_position_ids": (False, None), "reset_attention_mask": (False, None),
    "eod_mask_loss": (False, None), "rampup_batch_size": (None,), "num_experts": ([1], None),
    "ds_sequence_parallel_size": (1, None),
}  # fmt: skip


def read(folder, files):
    """The Checkpoint in a folder that Megatron-DeepSpeed wrote. Raises CheckpointError for what is
    damaged, partial, or of a model that megatron_core.gpt_model does not build.
    """
    ranks = sorted(files.model or {model for _, model in files.shards})
    state = load(next(iter((files.model or files.shards).values())))
    flags = state.get("args")
    if flags is None:
        raise CheckpointError(
            f"{folder}: layer files, but no `args` in its model states; it was not written by "
            "Megatron-DeepSpeed"
        )
    flags = vars(flags)
    arguments = _arguments(flags, folder)
    size = flags.get("tensor_model_parallel_size") or 1
    if len(ranks) % size:
        raise CheckpointError(
            f"{folder}: {len(ranks)} model-parallel ranks, its flags say tensor-parallel ranks of {size}; "
            "the checkpoint is incomplete, copy the whole folder"
        )
    layers = _layers(files, size)
    shards, moments, decays = [{} for _ in range(size)], [{} for _ in range(size)], {}
    for rank in ranks:  # of a pipeline stage by stage, the tensor-parallel ranks of each in order
        own = layers[rank % size] if layers else None
        own_files = _of_stage(own, load(files.model[rank])) if own else None
        held = rank_state(files, rank, own_files)
        refuse_other_steps([state, held.state], folder)
        arguments.weight_decay = 0.0 if held.coupled else arguments.weight_decay
        names = {name: _name(name, files, size, folder) for name in {**held.parameters, **held.decays}}
        # the last stage's copy of the embeddings comes after the first's, which alone has seen
        # positions
        first = shards[rank % size]
        new = {n: p for n, p in held.parameters.items() if names[n] not in first}
        first |= {names[n]: _by_head(names[n], p, flags) for n, p in new.items()}
        decays |= {names[n]: decay for n, decay in held.decays.items()}
        if held.moments is None:
            moments = None
        elif moments is not None:
            moments[rank % size] |= {names[n]: _by_head(names[n], held.moments[n], flags) for n in new}
    if moments is not None:
        moments = merged(moments, arguments.swiglu, str(folder))
    commute = state.get("commute")
    return Checkpoint(
        folder=str(folder),
        iteration=state["iteration"],
        arguments=arguments,
        parameters=merged(shards, arguments.swiglu, str(folder)),
        moments=moments,
        decays=decays,
        commute=json.loads(commute) if isinstance(commute, str) else commute,
        ranks=f"Megatron-DeepSpeed, {layout(files, len(ranks))}" + (", pipeline" if layers else ""),
        tanh=bool(flags.get("bias_gelu_fusion")) and not arguments.swiglu,
        turned=arguments.position_embedding_type == "rope",
    )


def _arguments(flags, folder):
    """Flags under the names of gpt_model, and of the schedule. Raises CheckpointError for models it
    does not build.
    """
    for name, known in _KNOWN.items():
        if name in flags and flags[name] not in known:
            raise CheckpointError(
                f"{folder}: was trained with {name} = {flags[name]}, which the analysis cannot rebuild; it "
                f"reads {known[0]}"
            )
    heads = flags["num_attention_heads"]
    if flags.get("num_key_value_heads", heads) not in (heads, None):
        raise CheckpointError(
            f"{folder}: grouped queries of Megatron-DeepSpeed are not read; analyse the run with the probe "
            "of a live job"
        )
    rope = bool(flags.get("use_rotary_position_embeddings"))
    steps = {}
    for name, samples in (("samples", 1), ("tokens", flags["seq_length"])):
        for what in ("decay", "warmup"):
            if flags.get(f"lr_{what}_{name}"):
                steps[f"lr_{what}_iters"] = flags[f"lr_{what}_{name}"] / samples / flags["global_batch_size"]
    same = (
        "num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "seq_length",
        "max_position_embeddings", "init_method_std", "lr", "min_lr", "lr_decay_style", "lr_decay_iters",
        "lr_warmup_iters", "lr_warmup_fraction", "weight_decay", "global_batch_size", "micro_batch_size",
        "train_iters", "vocab_size",
    )  # fmt: skip
    kept = {name: flags.get(name) for name in same}
    return types.SimpleNamespace(
        **{**kept, **steps},
        normalization={"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}[
            flags.get("normalization", "layernorm")
        ],
        swiglu=bool(flags.get("swiglu")),
        group_query_attention=False,
        num_query_groups=1,
        position_embedding_type="rope" if rope else "learned_absolute",
        untie_embeddings_and_output_weights=bool(flags.get("untie_embeddings_and_output_weights")),
        disable_bias_linear=not flags.get("add_bias_linear", True),
    )


def _layers(files, size):
    """By tensor-parallel rank, {layer number: its tensors} of a pipeline's layer files; [] without
    them.
    """
    found = [{} for _ in range(size)] if files.layers else []
    for (layer, rank), path in files.layers.items():
        if rank < size:
            found[rank][layer] = load(path)
    return found


def _of_stage(layers, state):
    """{name: tensor} of one pipeline stage, under the names that its optimiser uses (`param_shapes`
    of its model states).
    """
    found = {}
    for group in state.get("param_shapes") or [layers]:
        for name in group:
            layer, _, rest = name.partition(".")
            if layer == "tied_modules":
                rest = rest.partition(".")[2]
                layer = next(n for n, held in layers.items() if rest in held)
            found[name] = layers[int(layer)][rest]
    return found


def _name(name, files, size, folder):
    """megatron-core's name of a parameter of GPTModel or GPTModelPipe."""
    rest = re.sub(r"^(tied_modules\.embed\.|language_model\.)", "", unwrapped(name))
    if unwrapped(name).startswith("tied_modules."):
        rest = f"embedding.{rest}"
    rest = re.sub(r"^encoder\.", "", rest)
    layer = None
    if match := re.match(r"layers\.(\d+)\.", rest):
        layer, rest = int(match[1]), rest[match.end() :]
    elif match := re.match(r"(\d+)\.", rest):
        layer, rest = _in_pipeline(int(match[1]), rest[match.end() :], files)
    part, _, kind = rest.rpartition(".")
    if part not in _PARTS:
        raise CheckpointError(f"{folder}: {name} has no counterpart in megatron-core's GPTModel")
    place = "" if layer is None else f"decoder.layers.{layer}."
    return f"{place}{_PARTS[part]}.{kind}"


def _in_pipeline(number, rest, files):
    """(transformer layer or None, name within) of `rest` in layer file `number`: the files tell
    what each number is.
    """
    numbers = sorted({layer for layer, _ in files.layers})
    if "word_embeddings" in rest or "position_embeddings" in rest:
        return None, f"embedding.{rest}"
    if rest.startswith("lm_head."):
        return None, rest.replace("lm_head", "output_layer")
    if "." not in rest:
        return None, f"final_layernorm.{rest}"
    return numbers.index(number) - 1, rest  # the first file holds the embeddings


def _by_head(name, tensor, flags):
    """A rank's queries, keys and values head by head; any other tensor as it is."""
    if "linear_qkv" not in name:
        return tensor
    width = flags.get("kv_channels") or flags["hidden_size"] // flags["num_attention_heads"]
    parts = tensor.reshape(3, -1, width, *tensor.shape[1:])
    return parts.transpose(0, 1).reshape(tensor.shape)
