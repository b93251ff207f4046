"""Model folders and Trainer's checkpoints of Hugging Face: GPT-2 and Llama told in megatron-core's
names and layouts.

Weights come from safetensors or from torch files that checkpoints.files.load reads; transformers is
not needed, and what only unpickling could read (training_args.bin) is left alone. Source of names,
orders and formulas: modeling_gpt2, modeling_llama and trainer of transformers 5.23.
"""

import types
from pathlib import Path

import torch

from megatron_commute.checkpoints import hugging_face_models as models
from megatron_commute.checkpoints import names
from megatron_commute.checkpoints.checkpoint import Checkpoint, check_flags
from megatron_commute.checkpoints.files import CheckpointError, files, iteration, load, read_json, reading
from megatron_commute.checkpoints.zero import corrected_moments, coupled_decay, rank_state, steps_done

# what leads names of both families, of the base model and of what it was saved within
LEADING = ("transformer.", "model.")
WORDS, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
# buffers of earlier releases, which hold nothing that was learnt
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


def read(folder, extra):
    """The Checkpoint in a folder of Hugging Face. extra: {flag: value} for what the folder does not
    say: seq_length and global_batch_size always; vocab_size, the tokenizer's, goes before
    config.json, which has the rows.

    Raises CheckpointError, naming the cure, for what is damaged or partial and for models that
    megatron_core.gpt_model does not build.
    """
    folder = Path(folder)
    config = models.configuration(folder)
    family, step = models.FAMILIES[config["model_type"]], iteration(folder, extra.get("iteration", 0))
    flags = _arguments(folder, config, step, extra)
    check_flags(flags, folder)
    parts = dict(models.parts(family, flags))
    zero = _under_deepspeed(folder, step)
    stored = _weights(folder, {} if zero is None else zero.parameters)
    weights = _fitting(folder, names.bare(stored, folder, LEADING), parts, config)
    if zero is not None:
        decays, moments = names.bare(zero.decays, folder, LEADING), zero.moments
        if moments is not None:
            moments = _tied(names.bare(moments, folder, LEADING), parts)
            decays = _tied(decays, parts)
        flags.weight_decay = 0.0 if zero.coupled else getattr(flags, "weight_decay", 0.0)
    else:
        with reading(folder / "optimizer.pt"):
            moments, decays = _of_optimizer(folder / "optimizer.pt", weights, flags, step)
    return Checkpoint(
        folder=str(folder),
        iteration=step,
        arguments=flags,
        parameters=_converted(folder, weights, parts, flags),
        moments=None if moments is None else _converted(folder, moments, parts, flags),
        decays={ours: decays[theirs[0]] for ours, theirs in parts.items() if theirs[0] in decays},
        commute=None,
        ranks=f"Hugging Face ({config['model_type']}{'' if zero is None else ', under DeepSpeed'})",
        tanh=config.get("activation_function") in models.TANH,
    )


def _arguments(folder, config, step, extra):
    """Flags under the names of gpt_model and of the schedule. Raises CheckpointError for those that
    nothing names.
    """
    state_file = folder / "trainer_state.json"
    state = read_json(state_file) if state_file.is_file() else {}
    if state.get("global_step", step) != step:
        raise CheckpointError(
            f"{folder}: trainer_state.json says step {state['global_step']}, its name {step}; give the "
            "folder its own name"
        )
    missing = [name for name in ("seq_length", "global_batch_size") if not extra.get(name)]
    if missing:
        batch = state.get("train_batch_size")
        raise CheckpointError(
            f"{folder}: does not say {' and '.join(missing)}; name them with --arguments FILE, a JSON "
            "object such as "
            '{"seq_length": 1024, "global_batch_size": 64}; the global batch is per_device_train_batch_size'
            f"{f' ({batch} here)' if batch else ''} x gradient_accumulation_steps x processes"
        )
    found = {"vocab_size": config["vocab_size"], "lr_decay_style": "linear", **extra}
    found |= {
        flag: state[name]
        for flag, name in (("train_iters", "max_steps"), ("micro_batch_size", "train_batch_size"))
        if state.get(name)
    }
    flags = types.SimpleNamespace(**{**found, **models.model_flags(config, folder)})
    learned = flags.position_embedding_type == "learned_absolute"
    for name, most in (
        ("seq_length", flags.max_position_embeddings if learned else flags.seq_length),
        ("vocab_size", config["vocab_size"]),
    ):
        if getattr(flags, name) > most:
            raise CheckpointError(
                f"--arguments: {name} {getattr(flags, name)}, but the model in {folder} has {most}; write "
                f"{most} or less"
            )
    return flags


def _tied(by_name, parts):
    """Values by name, those of tied embeddings under the embeddings' name, whichever they had."""
    words = parts[WORDS][0]
    if words in by_name or "lm_head.weight" not in by_name or OUTPUT in parts:
        return by_name
    return {words: by_name["lm_head.weight"], **by_name}


def _under_deepspeed(folder, step):
    """RankState of the shards that Trainer under DeepSpeed leaves in a folder of their own, or
    None.
    """
    shards = folder / f"global_step{step}"
    return rank_state(files(shards), 0) if shards.is_dir() else None


def _weights(folder, otherwise):
    """{name: tensor} of the first kind of weights in the folder; `otherwise` where there are none
    but those.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return _tensors(folder / name)
        if (folder / f"{name}.index.json").is_file():
            return _of_shards(folder / f"{name}.index.json")
    if not otherwise:
        raise CheckpointError(
            f"{folder}: no weights in it (model.safetensors, pytorch_model.bin, or an index of their "
            "shards); copy the whole folder, or merge what FSDP has sharded (accelerate merge-weights)"
        )
    return otherwise


def _of_shards(index):
    found, where = {}, read_json(index).get("weight_map")
    if not isinstance(where, dict):
        raise CheckpointError(f"{index}: has no `weight_map`; it is damaged, copy it again")
    for name in sorted(set(where.values())):
        path = index.parent / Path(name).name
        if not path.is_file():
            raise CheckpointError(f"{path}: is missing, {index.name} names it; copy the whole folder")
        found |= _tensors(path)
    return found


def _tensors(path):
    """{name: tensor} of one file of weights."""
    if path.suffix != ".safetensors":
        return load(path)
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise CheckpointError(
            f"{path}: is read with a package that is not installed: pip install safetensors"
        ) from None
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
    except (SafetensorError, OSError) as fault:
        raise CheckpointError(
            f"{path}: damaged or cut off ({fault}); copy it again, or leave the checkpoint out"
        ) from None


def _fitting(folder, weights, parts, config):
    """`weights` in the order of their own parameters. Raises CheckpointError where they are not
    those of config.json.
    """
    weights = _tied(weights, parts)
    expected = [name for theirs in parts.values() for name in theirs]
    for name in expected:
        if name not in weights:
            raise CheckpointError(
                f"{folder}: its weights lack {name}, which config.json asks for; save the model with its "
                "output layer (AutoModelForCausalLM), or copy the whole folder"
            )
    words = weights[expected[0]]
    for name in sorted(weights.keys() - set(expected)):
        copied = name == "lm_head.weight" and torch.equal(weights[name], words)
        if not copied and not name.endswith(_BUFFERS):
            if name == "lm_head.weight":
                raise CheckpointError(
                    f"{folder}: config.json says tied embeddings, lm_head.weight and {expected[0]} differ; "
                    "write tie_word_embeddings false there, or save the model after tie_weights()"
                )
            raise CheckpointError(
                f"{folder}: its weights have {name}, which config.json does not ask for; save the language "
                "model that it was trained as (AutoModelForCausalLM)"
            )
    if len(words) != config["vocab_size"]:
        raise CheckpointError(
            f"{folder}: {expected[0]} has {len(words)} rows, config.json says a vocabulary of "
            f"{config['vocab_size']}; copy both files again"
        )
    return {name: weights[name] for name in expected}


def _of_optimizer(path, weights, flags, step):
    """(second moments {name: tensor} or None, whether weight decay acts {name: bool}) of Trainer's
    AdamW over `weights`, and its decay into `flags`; (None, {}) without it and for states in an
    order that is not known.

    Trainer's two groups are what decays (matrices) and what does not (biases and norms), each in
    the model's own order.
    """
    if not path.is_file():
        return None, {}
    stored = load(path)
    if not isinstance(stored, dict) or "param_groups" not in stored:
        return None, {}
    groups, states, order = stored["param_groups"], stored["state"], list(weights)
    done = max(steps_done(stored, path), default=0)
    if step and done > step:  # fewer are possible: half precision leaves steps out
        raise CheckpointError(
            f"{path}: its optimiser has done {done:g} steps, {path.parent.name} is of step {step}; parts of "
            "different checkpoints, copy the whole folder"
        )
    if len(groups) == 2:
        order = [
            name for matrices in (True, False) for name in order if (weights[name].dim() > 1) == matrices
        ]
    numbered = [(number, group) for group in groups for number in group["params"]]
    if len(numbered) != len(order):
        return None, {}
    moments, decays = {}, {}
    for name, (number, group) in zip(order, numbered, strict=True):
        found = corrected_moments(states.get(number, {}), group, path)
        if found is None or found.shape != weights[name].shape:
            return None, {}
        moments[name], decays[name] = found, bool(group.get("weight_decay"))
    coupled = coupled_decay(stored)
    flags.weight_decay = 0.0 if coupled else max(group.get("weight_decay", 0.0) for group in groups)
    return moments, decays


def _converted(folder, vectors, parts, flags):
    """Vectors {name: tensor} in our names and layouts, float32."""
    try:
        return {
            ours: _arranged(ours, [vectors[name] for name in theirs], flags) for ours, theirs in parts.items()
        }
    except RuntimeError as fault:
        raise CheckpointError(
            f"{folder}: its weights do not fit config.json ({fault}); copy both again"
        ) from None


def _arranged(ours, tensors, flags):
    if not flags.swiglu and ".linear_" in ours:  # GPT-2 keeps [in, out]
        tensors = [tensor.t() if tensor.dim() == 2 else tensor for tensor in tensors]
    if "linear_qkv" in ours:  # by groups: the group's queries, its key, its value
        parts = tensors if len(tensors) == 3 else tensors[0].chunk(3)
        groups = [part.reshape(flags.num_query_groups, -1, *part.shape[1:]) for part in parts]
        return torch.cat(groups, 1).flatten(0, 1).float()
    return torch.cat(tensors).float() if len(tensors) > 1 else tensors[0].float().contiguous()
