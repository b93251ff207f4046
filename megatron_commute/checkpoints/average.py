"""The mean of a run's checkpoints as one more checkpoint of the same layout.

Every floating tensor of the weights, and of the float32 master copies that an optimiser keeps of
them, is the mean of its own, summed in float64 and rounded once to its type. The optimiser's state
is that before its first step (moments zero, step 0): the mean of moments belongs to no run. All
else (flags, iteration, schedule, random states, integers) is the last checkpoint's.
"""

import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_commute.checkpoints import files as checkpoint_files
from megatron_commute.checkpoints import zero
from megatron_commute.checkpoints.files import (
    CheckpointError,
    hugging_face,
    iteration,
    load,
    read_json,
    series,
)
from megatron_commute.checkpoints.rewriting import save

NAME = "average.json"
# float32 copies of the weights in optimiser states of DeepSpeed: ZeRO 0 to 2 and bf16, ZeRO 3, fp16
_MASTERS = ("single_partition_of_fp32_groups", "fp32_flat_groups", "fp32_groups_flat", "fp32_groups")
# states of optimisers that begin as zeros
_FROM_ZERO = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
# files of a Hugging Face folder that go along as they are; other weights would be the last one's
_COPIED = (".json", ".txt", ".model", ".py", ".md", ".jinja")
_COPIED_NAMES = ("training_args.bin", "scheduler.pt", "scaler.pt", "latest")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


class Part(NamedTuple):
    """One file with tensors."""

    kind: str
    # model, layer, optimizer: of DeepSpeed; safetensors, bin: weights of Hugging Face
    path: Path


def chosen(paths, last=None):
    """[(step, folder)] of the checkpoints to take, at least two, in the order of steps.

    last: of ONE folder's checkpoints those in the last part of its steps, such as 0.1, its borders
    included. Model folders of Hugging Face that say no step come in the order given.
    """
    paths = [Path(path) for path in paths]
    if last is None and len(paths) > 1 and all(_says_no_step(path) for path in paths):
        found = [(0, path) for i, path in enumerate(paths) if path not in paths[:i]]
    else:
        found = series(paths)
    if last is not None:
        if len(paths) != 1:
            raise CheckpointError("--last: is for the one --save folder of a run; name it alone")
        begin, end = (1 - last) * found[-1][0], found[-1][0]
        found = [(step, folder) for step, folder in found if step >= begin * (1 - 1e-12)]
        if len(found) < 2:
            raise CheckpointError(
                f"--last {last:g}: {paths[0]} has one checkpoint only from step {begin:g} to {end}; write a "
                "larger part, or save more often"
            )
    if len(found) < 2:
        raise CheckpointError(f"{found[0][1]}: one checkpoint alone has no mean; name two or more")
    return found


def _says_no_step(path):
    inside = path.iterdir() if path.is_dir() else ()
    alone = not any(checkpoint_files._step(p) is not None for p in inside if p.is_dir())
    return hugging_face(path) and alone and iteration(path, None) is None


def average(found, out, say=print):
    """Write the mean of `found`, [(step, folder)], to the new folder `out`: whole or not at all.

    Returns a dict: checkpoint (the folder to read it from), steps, checkpoints, layout, tensors
    (how many are means), load (how the host takes it), left_out (files). Raises CheckpointError,
    naming the cure; the checkpoints are only read.
    """
    out = Path(out)
    if out.exists() or out.is_symlink():
        raise CheckpointError(f"--out {out}: is there already and is not written to; name a new folder")
    folders = [folder for _, folder in found]
    for folder in folders:
        if folder.resolve() in out.resolve().parents:
            raise CheckpointError(f"--out {out}: lies in a checkpoint; name another folder")
    parts = [_parts(folder) for folder in folders]
    for folder, own in zip(folders, parts, strict=True):
        _refuse_other_files(folder, own, folders[-1], parts[-1])
    out.parent.mkdir(parents=True, exist_ok=True)
    written = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        place = written if hugging_face(folders[-1]) else written / folders[-1].resolve().name
        place.mkdir(parents=True)
        tensors = 0
        for key, part in parts[-1].items():
            target = place / part.path.relative_to(folders[-1])
            target.parent.mkdir(exist_ok=True)
            tensors += _mean_file(part.kind, [own[key].path for own in parts], target)
            say(f"{target.relative_to(written)}: the mean of {len(parts)}")
        if not tensors:
            raise CheckpointError(f"{folders[-1]}: holds no floating weights; it is no checkpoint of a model")
        told = {"steps": [step for step, _ in found], "checkpoints": [str(folder) for folder in folders]}
        told |= {"tensors": tensors, **_beside(folders[-1], place, parts[-1], out)}
        here = {**told, "checkpoints": [folder.name for folder in folders]}
        (written / NAME).write_text(json.dumps(here, indent=2) + "\n", encoding="utf-8")
        if out.exists():
            raise CheckpointError(f"--out {out}: came meanwhile and is not written to; name a new folder")
        written.rename(out)
    finally:
        shutil.rmtree(written, ignore_errors=True)
    return {"checkpoint": str(out / place.relative_to(written)), **told}


# --- which files ------------------------------------------------------------------------------------------


def _parts(folder):
    """{name: Part} of a checkpoint's files with tensors; the same names in all of one layout."""
    if not hugging_face(folder):
        return _of_deepspeed(folder)
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: holds an adapter (PEFT), whose mean is not that of its products; merge it into its "
            "model (merge_and_unload) and save that"
        )
    if read_json(folder / "config.json").get("quantization_config"):
        raise CheckpointError(f"{folder}: holds quantised weights; save the model without quantisation")
    found = {path.name: Part(path.suffix[1:], path) for path in _weights(folder)}
    shards = folder / f"global_step{iteration(folder)}"  # of Trainer under DeepSpeed
    if shards.is_dir():
        found |= {f"global_step/{name}": part for name, part in _of_deepspeed(shards).items()}
    if not found:
        raise CheckpointError(
            f"{folder}: no weights in it (model.safetensors, pytorch_model.bin, or an index of their "
            "shards); copy the whole folder"
        )
    return found


def _of_deepspeed(folder):
    found = checkpoint_files.files(folder)
    kinds = (
        ("model", found.model),
        ("model", found.shards),
        ("optimizer", found.optimizer),
        ("layer", found.layers),
    )
    parts = {path.name: Part(kind, path) for kind, paths in kinds for path in paths.values()}
    for path in sorted(folder.glob("*.pt")):
        if path.name not in parts:
            raise CheckpointError(
                f"{path}: is of no layout that is known here (experts?); average checkpoints without it"
            )
    return parts


def _weights(folder):
    """The files of the first kind of weights in a folder of Hugging Face, as transformers looks for
    them.
    """
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
        if (folder / f"{name}.index.json").is_file():
            where = read_json(folder / f"{name}.index.json").get("weight_map") or {}
            paths = [folder / Path(name).name for name in sorted(set(where.values()))]
            for path in paths:
                if not path.is_file():
                    raise CheckpointError(f"{path}: is missing, the index names it; copy the whole folder")
            return paths
    return []


def _refuse_other_files(folder, own, last, of_last):
    for name in sorted(own.keys() ^ of_last.keys()):
        has, lacks = (folder, last) if name in own else (last, folder)
        raise CheckpointError(
            f"{has}: has {name}, {lacks} has not; average checkpoints of one layout, from the same ranks"
        )


def _beside(last, place, parts, out):
    """Write what goes along with the means; {layout, load, left_out} of the result."""
    if hugging_face(last):
        return _beside_hugging_face(last, place, parts, out)
    (place.parent / "latest").write_text(place.name, encoding="utf-8")
    files = checkpoint_files.files(last)
    host = "Megatron-DeepSpeed" if _megatron(parts) else "launch/pretrain_gpt.py"
    ranks = zero.layout(files, len({*files.model} or {model for _, model in files.shards}))
    how = f"--load {out} goes on at the last one's iteration with fresh optimiser state"
    if host == "Megatron-DeepSpeed":
        number = place.name.rpartition("global_step")[2]
        (place.parent / "latest_checkpointed_iteration.txt").write_text(number, encoding="utf-8")
        how += "; add --finetune to begin at iteration 0"
    return {"layout": f"{host}, {ranks}", "load": how, "left_out": []}


def _megatron(parts):
    path = next(part.path for part in parts.values() if part.kind == "model")
    return "args" in load(path)


def _beside_hugging_face(last, place, parts, out):
    known, left_out = {part.path.name for part in parts.values()}, []
    for path in sorted(path for path in last.iterdir() if path.is_file() and path.name not in known):
        if path.suffix in _COPIED or path.name in _COPIED_NAMES or path.name.startswith("rng_state"):
            shutil.copyfile(path, place / path.name)
        elif path.name == "optimizer.pt":
            content = load(path)
            _fresh(content, path)
            save(content, place / path.name)
        else:
            left_out.append(path.name)
    how = f"from_pretrained({str(out)!r})"
    if (last / "trainer_state.json").is_file():
        how += ", or Trainer's resume_from_checkpoint, with fresh optimiser state where there is some"
    return {"layout": "Hugging Face", "load": how, "left_out": left_out}


# --- one file ---------------------------------------------------------------------------------------------


def _mean_file(kind, paths, target):
    """Write the mean of files of one kind; the number of tensors that are means."""
    if kind == "safetensors":
        return _mean_safetensors(paths, target)
    contents = [load(path) for path in paths]
    places = [_averaged(kind, content, path) for content, path in zip(contents, paths, strict=True)]
    for path, own in zip(paths, places, strict=True):
        _refuse_other_tensors(path, _shapes(own), paths[-1], _shapes(places[-1]))
    done, means = 0, {}
    for name, (holder, key) in places[-1].items():
        tensors = [own[name][0][own[name][1]] for own in places]
        own = tensors[-1]
        if not own.is_floating_point() or not own.numel():
            continue
        # tied weights stay one storage
        same = own.untyped_storage().data_ptr(), own.storage_offset(), own.shape, own.stride()
        if same not in means:
            means[same] = own, _mean(tensors, name, paths)  # `own` is kept, or its address could come again
        holder[key], done = means[same][1], done + 1
    optimizer = _optimizer(kind, contents[-1])
    if optimizer is not None:
        _fresh(optimizer, paths[-1])
    save(contents[-1], target)
    return done


def _mean_safetensors(paths, target):
    try:
        from safetensors import SafetensorError, safe_open
        from safetensors.torch import save_file
    except ImportError:
        raise CheckpointError(
            f"{paths[-1]}: is read with a package that is not installed: pip install safetensors"
        ) from None
    try:
        opened = [safe_open(path, "pt") for path in paths]
        told = [_told(file) for file in opened]
        for path, own in zip(paths, told, strict=True):
            _refuse_other_tensors(path, own, paths[-1], told[-1])
        found, done = {}, 0
        for name in told[-1]:
            own = opened[-1].get_tensor(name)
            if own.is_floating_point():
                own, done = _mean([file.get_tensor(name) for file in opened], name, paths), done + 1
            found[name] = own
        save_file(found, target, metadata=opened[-1].metadata())
    except (SafetensorError, OSError) as fault:
        raise CheckpointError(f"{paths[-1]} and those before it: {fault}; copy them again") from None
    return done


def _told(file):
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
    return {name: (tuple(own.get_shape()), own.get_dtype()) for name, own in slices.items()}


def _mean(tensors, name, paths):
    """The mean of tensors of one shape and type; CheckpointError where one is not finite."""
    total = torch.zeros(tensors[-1].shape, dtype=torch.float64)
    for tensor in tensors:
        total += tensor.to(torch.float64)
    if not torch.isfinite(total).all():
        for path, tensor in zip(paths, tensors, strict=True):
            if not torch.isfinite(tensor.to(torch.float64)).all():
                raise CheckpointError(f"{path}: {name} is not finite; the run had diverged, leave it out")
    return (total / len(tensors)).to(tensors[-1].dtype)


def _shapes(places):
    tensors = {name: holder[key] for name, (holder, key) in places.items()}
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def _refuse_other_tensors(path, own, last, of_last):
    """own, of_last: {name: (shape, type)}."""
    for name in sorted(own.keys() | of_last.keys()):
        if own.get(name) != of_last.get(name):
            one, other = (str(told.get(name, "none")) for told in (own, of_last))
            raise CheckpointError(
                f"{path}: {name} is {one}, in {last} {other}; average checkpoints of one model and precision"
            )


# --- what is in it ----------------------------------------------------------------------------------------


def _optimizer(kind, content):
    """The optimiser's part of a file, or None."""
    if kind == "optimizer":
        return content.get("optimizer_state_dict")
    return content.get("optimizer") if kind == "model" else None


def _averaged(kind, content, path):
    """{name: (its container, key there)} of the tensors of a file whose mean is taken."""
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds no tensors by name; it is no checkpoint, or it is damaged")
    weights = {"model": content.get("module"), "optimizer": None}.get(kind, content)
    copies = {name: place for name, place in _tensors(_optimizer(kind, content), path) if _is_master(name)}
    return dict(_tensors(weights, path)) | copies


def _is_master(name):
    return not {*_MASTERS}.isdisjoint(name.split("/"))


def _tensors(node, path, within=""):
    """(name, (container, key)) of every tensor below a dict or list."""
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in pairs:
        name = f"{within}/{key}" if within else str(key)
        if torch.is_tensor(value):
            yield name, (node, key)
        elif isinstance(value, tuple) and any(torch.is_tensor(part) for part in value):
            raise CheckpointError(
                f"{path}: {name} is a tuple of tensors, which is not known here; leave it out"
            )
        else:
            yield from _tensors(value, path, name)


def _fresh(optimizer, path):
    """Set an optimiser's states, but not its copies of the weights, to what they are before the
    first step.
    """
    for name, (holder, key) in _tensors(optimizer, path):
        if key in _FROM_ZERO:
            holder[key] = torch.zeros_like(holder[key])
        elif holder[key].numel() > 1 and not _is_master(name):
            raise CheckpointError(
                f"{path}: holds {name} of an optimiser whose beginning is not known here (Adam's and momentum "
                "are); average checkpoints without optimiser states"
            )
    _zero_counters(optimizer)


def _zero_counters(node):
    """Steps that are plain numbers, in states and in groups."""
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        _zero_counters(value)
    if isinstance(node, dict) and isinstance(node.get("step"), int | float):
        node["step"] = 0
