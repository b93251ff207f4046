"""Checkpoints of the three kinds under attack: small ones made by hand in the layouts of their writers, each held to
what torch, pydantic and transformers make of the same files."""

import argparse
import json

import mutations
import pydantic_core
import torch
from mutation_structure import structure
from mutations import Difference, Reader, require_line

from megatron_commute.checkpoints.files import CheckpointError
from megatron_commute.checkpoints.readers import read

WIDTH, HEADS, INNER, WORDS, PLACES, STEP, BETA = 8, 2, 12, 20, 16, 8, 0.999
FLAGS = {
    "num_layers": 1, "hidden_size": WIDTH, "num_attention_heads": HEADS, "ffn_hidden_size": INNER, "seq_length": PLACES,
    "max_position_embeddings": PLACES, "init_method_std": 0.02, "normalization": "LayerNorm", "swiglu": False,
    "group_query_attention": False, "num_query_groups": HEADS, "position_embedding_type": "learned_absolute",
    "untie_embeddings_and_output_weights": False, "disable_bias_linear": True, "lr": 1e-3, "train_iters": 40,
    "global_batch_size": 8, "micro_batch_size": 2,
}  # fmt: skip
COUNTED = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "ffn_hidden_size",
    "seq_length",
    "global_batch_size",
)
LAYER = "decoder.layers.0"
SHAPES = {
    "embedding.word_embeddings.weight": (WORDS, WIDTH),
    "embedding.position_embeddings.weight": (PLACES, WIDTH),
    f"{LAYER}.self_attention.linear_qkv.weight": (3 * WIDTH, WIDTH),
    f"{LAYER}.mlp.linear_fc1.weight": (INNER, WIDTH),
    "decoder.final_layernorm.weight": (WIDTH,),
}
HOST = {
    "language_model.embedding.word_embeddings.weight": "embedding.word_embeddings.weight",
    "language_model.embedding.position_embeddings.weight": "embedding.position_embeddings.weight",
    "language_model.encoder.layers.0.self_attention.query_key_value.weight": f"{LAYER}.self_attention.linear_qkv.weight",
    "language_model.encoder.layers.0.mlp.dense_h_to_4h.weight": f"{LAYER}.mlp.linear_fc1.weight",
    "language_model.encoder.final_layernorm.weight": "decoder.final_layernorm.weight",
}


def tensors(names):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(*SHAPES[ours], generator=generator) for name, ours in names.items()}


# launch/pretrain_gpt.py, ZeRO 1 on two ranks


def write_ours(folder):
    from deepspeed.utils.tensor_fragment import fragment_address

    step = folder / f"global_step{STEP}"
    step.mkdir()
    module = tensors({name: name for name in SHAPES})
    shapes = {name: p.shape for name, p in module.items()}
    state = {
        "module": module,
        "iteration": STEP,
        "global_steps": STEP,
        "arguments": json.dumps(FLAGS),
        "commute": None,
    }
    state |= {"param_shapes": [shapes], "dp_world_size": 2, "optimizer": None}
    torch.save(state, step / "mp_rank_00_model_states.pt")
    flat = torch.cat([p.reshape(-1) for p in module.values()])
    half = flat.numel() // 2
    for rank in range(2):
        own, mapping, at = flat[rank * half : (rank + 1) * half].clone(), {}, 0
        for name, p in module.items():
            begin, end = max(at, rank * half), min(at + p.numel(), (rank + 1) * half)
            if begin < end:
                mapping[name] = fragment_address(start=begin - rank * half, numel=end - begin)
            at += p.numel()
        inner = {"state": {0: {"step": STEP, "exp_avg": own, "exp_avg_sq": own.square()}}}
        inner["param_groups"] = [{"params": [0], "betas": (0.9, BETA), "weight_decay": 0.1, "lr": 1e-3}]
        optimizer = {"base_optimizer_state": inner, "param_slice_mappings": [mapping]}
        optimizer["single_partition_of_fp32_groups"] = [own]
        torch.save(
            {"optimizer_state_dict": optimizer}, step / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        )


def read_ours(folder, known):
    step = folder / f"global_step{STEP}"
    found = attempt(step, {})
    if not isinstance(found, str):
        state = torch.load(step / "mp_rank_00_model_states.pt", weights_only=False)
        require_equal(
            found.parameters, {n: p for n, p in state["module"].items() if torch.is_tensor(p)}, "parameters"
        )
        said = pydantic_core.from_json(state["arguments"])
        if found.iteration != state["iteration"] or any(
            getattr(found.arguments, n) != said[n] for n in FLAGS if n in said
        ):
            raise Difference("another iteration, or other flags")
        if found.moments is not None:
            pieces = {}
            for rank in range(2):
                shard = torch.load(
                    step / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", weights_only=False
                )
                optimizer = shard["optimizer_state_dict"]
                inner = optimizer["base_optimizer_state"]
                for i, mapping in enumerate(optimizer["param_slice_mappings"]):
                    corrected = second_moment(inner["state"][i], inner["param_groups"][i])
                    for name, place in mapping.items():
                        part = corrected.reshape(-1)[place.start :][: place.numel]
                        pieces[name] = torch.cat([pieces.get(name, part[:0]), part])
            require_equal({n: m.reshape(-1) for n, m in found.moments.items()}, pieces, "second moments")
        found = "same"
    return found


def second_moment(state, group):
    step = state["step"] if "step" in state else group["step"]
    return state["exp_avg_sq"].float() / (1 - group["betas"][1] ** float(step))


def attempt(folder, extra):
    """The Checkpoint in a folder, or "refused"."""
    try:
        return read(folder, extra)
    except CheckpointError as fault:
        return require_line(fault, folder, "--arguments")


def require_equal(ours, theirs, what):
    if ours.keys() != theirs.keys():
        raise Difference(f"{what}: {ours.keys() ^ theirs.keys()}")
    for name, p in ours.items():
        if not torch.equal(p.nan_to_num(), theirs[name].float().reshape(p.shape).nan_to_num()):
            raise Difference(f"{what}: {name}")


# Megatron-DeepSpeed, without ZeRO


def write_host(folder):
    step = folder / f"global_step{STEP}"
    step.mkdir()
    module = tensors(HOST)
    order = sorted(module, key=lambda name: module[name].dim() < 2)
    matrices = sum(p.dim() > 1 for p in module.values())
    groups = [{"params": list(range(matrices)), "betas": (0.9, BETA), "weight_decay": 0.1}]
    groups += [{"params": list(range(matrices, len(order))), "betas": (0.9, BETA), "weight_decay": 0.0}]
    states = {i: {"step": STEP, "exp_avg_sq": module[name].square()} for i, name in enumerate(order)}
    flags = {**FLAGS, "normalization": "layernorm", "add_bias_linear": False, "tensor_model_parallel_size": 1}
    state = {"module": module, "iteration": STEP, "global_steps": STEP, "args": argparse.Namespace(**flags)}
    state["optimizer"] = {"state": states, "param_groups": groups}
    torch.save(state, step / "mp_rank_00_model_states.pt")


def read_host(folder, known):
    step = folder / f"global_step{STEP}"
    found = attempt(step, {})
    if isinstance(found, str):
        return found
    state = torch.load(step / "mp_rank_00_model_states.pt", weights_only=False)
    held, flags = {n: p for n, p in state["module"].items() if torch.is_tensor(p)}, vars(state["args"])
    require_equal(found.parameters, {HOST[n]: by_head(n, p) for n, p in held.items()}, "parameters")
    pairs = [(name, flags[name], getattr(found.arguments, name)) for name in COUNTED if name in flags]
    if found.iteration != state["iteration"] or any(theirs != ours for _, theirs, ours in pairs):
        raise Difference(f"step {found.iteration} of {state['iteration']}, flags {pairs}")
    if found.moments is not None:
        groups, states = state["optimizer"]["param_groups"], state["optimizer"]["state"]
        numbered = [(number, group) for group in groups for number in group["params"]]
        order = sorted(held, key=lambda name: held[name].dim() < 2)
        theirs = {n: second_moment(states[i], group) for n, (i, group) in zip(order, numbered, strict=True)}
        require_equal(found.moments, {HOST[n]: by_head(n, m) for n, m in theirs.items()}, "second moments")
    return "same"


def by_head(name, p):
    """Rows of queries, keys and values, which lie one kind after the other, head by head."""
    if "query_key_value" not in name:
        return p
    width = WIDTH // HEADS
    rows = [p[kind * WIDTH + head * width :][:width] for head in range(HEADS) for kind in range(3)]
    return torch.cat(rows)


# Hugging Face


SAID = (
    "vocab_size",
    "n_positions",
    "n_embd",
    "n_layer",
    "n_head",
    "n_inner",
    "layer_norm_epsilon",
    "tie_word_embeddings",
)


def write_hugging_face(folder):
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    place = folder / f"checkpoint-{STEP}"
    torch.manual_seed(0)
    sizes = {
        "vocab_size": WORDS,
        "n_positions": PLACES,
        "n_embd": WIDTH,
        "n_layer": 1,
        "n_head": HEADS,
        "n_inner": INNER,
    }
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    model.save_pretrained(place)
    (place / "generation_config.json").unlink()
    (place / "trainer_state.json").write_text(
        json.dumps({"global_step": STEP, "max_steps": 40, "train_batch_size": 2})
    )
    order = sorted(dict(model.named_parameters()), key=lambda name: model.get_parameter(name).dim() < 2)
    matrices = sum(p.dim() > 1 for p in model.parameters())
    groups = [{"params": list(range(matrices)), "betas": (0.9, BETA), "weight_decay": 0.1}]
    groups += [{"params": list(range(matrices, len(order))), "betas": (0.9, BETA), "weight_decay": 0.0}]
    states = {
        i: {"step": torch.tensor(8.0), "exp_avg_sq": model.get_parameter(n).detach() ** 2}
        for i, n in enumerate(order)
    }
    torch.save({"state": states, "param_groups": groups}, place / "optimizer.pt")
    return transformers.GPT2LMHeadModel


def read_hugging_face(folder, kind):
    place = folder / f"checkpoint-{STEP}"
    found = attempt(place, {"seq_length": PLACES, "global_batch_size": 8})
    if isinstance(found, str):
        return found
    said = pydantic_core.from_json((place / "config.json").read_bytes())
    if type(said.get("layer_norm_epsilon")) is int:  # transformers wants 1.0 for 1
        said["layer_norm_epsilon"] = float(said["layer_norm_epsilon"])
    # the rest of a configuration says nothing of the weights, and transformers is strict about its types
    config = kind.config_class(**{name: said[name] for name in SAID if name in said})
    config.save_pretrained(folder / "theirs")
    (folder / "theirs" / "model.safetensors").symlink_to(place / "model.safetensors")
    model, flags = kind.from_pretrained(folder / "theirs"), found.arguments
    pairs = [
        (config.n_layer, flags.num_layers),
        (config.n_embd, flags.hidden_size),
        (config.n_head, flags.num_attention_heads),
    ]
    pairs += [
        (config.layer_norm_epsilon, flags.norm_epsilon),
        (config.n_positions, flags.max_position_embeddings),
    ]
    if found.iteration != STEP or any(theirs != ours for theirs, ours in pairs):
        raise Difference(f"(theirs, ours): {pairs}, step {found.iteration}")
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    require_same_tensors(found.parameters, parameters, flags, "parameters")
    if found.moments is not None:
        stored = torch.load(place / "optimizer.pt", weights_only=False)
        order = sorted(parameters, key=lambda name: parameters[name].dim() < 2)
        numbered = [(number, group) for group in stored["param_groups"] for number in group["params"]]
        order = order if len(stored["param_groups"]) == 2 else list(parameters)
        pairs = zip(order, numbered, strict=True)
        theirs = {name: second_moment(stored["state"][i], group) for name, (i, group) in pairs}
        require_same_tensors(found.moments, theirs, flags, "second moments")
    return "same"


def require_same_tensors(ours, theirs, flags, what):
    """Vectors of GPT-2 as transformers keeps them, [in, out] and one kind after the other, and ours; names aside."""
    arranged = []
    for name, p in theirs.items():
        p = p.t() if p.dim() == 2 and ".h." in name else p
        if "c_attn" in name:
            width, heads = flags.hidden_size // flags.num_attention_heads, range(flags.num_attention_heads)
            p = torch.cat(
                [p[kind * flags.hidden_size + h * width :][:width] for h in heads for kind in range(3)]
            )
        arranged.append(p)
    pairs = [
        sorted(some, key=lambda p: (tuple(p.shape), float(p.sum()))) for some in (ours.values(), arranged)
    ]
    require_equal(dict(enumerate(pairs[0])), dict(enumerate(pairs[1])), what)


MUTATIONS = mutations.BYTES | {f"structure {n}": structure for n in range(16)}
KINDS = {
    "pretrain_gpt": (write_ours, read_ours),
    "Megatron-DeepSpeed": (write_host, read_host),
    "Hugging Face": (write_hugging_face, read_hugging_face),
}
READERS = [
    Reader(name=f"checkpoint of {name}", prepare=prepare, attempt=attempted, mutations=MUTATIONS)
    for name, (prepare, attempted) in KINDS.items()
]
