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
from megatron_commute.checkpoints.mean_files import make_fresh, mean_file
from megatron_commute.checkpoints.rewriting import save
from megatron_commute.settings import text_files

NAME = "average.json"
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
            tensors += mean_file(part.kind, [own[key].path for own in parts], target)
            say(f"{target.relative_to(written)}: the mean of {len(parts)}")
        if not tensors:
            raise CheckpointError(f"{folders[-1]}: holds no floating weights; it is no checkpoint of a model")
        told = {"steps": [step for step, _ in found], "checkpoints": [str(folder) for folder in folders]}
        told |= {"tensors": tensors, **_beside(folders[-1], place, parts[-1], out)}
        # the record in it names no place of one machine
        here = {name: told[name] for name in ("steps", "tensors", "layout")}
        here["checkpoints"] = [folder.name for folder in folders]
        text_files.replace(written / NAME, json.dumps(here, indent=2) + "\n")
        if out.exists():
            raise CheckpointError(f"--out {out}: came meanwhile and is not written to; name a new folder")
        written.rename(out)
    finally:
        shutil.rmtree(written, ignore_errors=True)
    return {"checkpoint": str(out / place.relative_to(written)), **told}


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
    text_files.replace(place.parent / "latest", place.name)
    files = checkpoint_files.files(last)
    host = "Megatron-DeepSpeed" if _megatron(parts) else "launch/pretrain_gpt.py"
    ranks = zero.layout(files, len({*files.model} or {model for _, model in files.shards}))
    how = f"--load {out} goes on at the iteration of the last, with fresh optimiser state"
    if host == "Megatron-DeepSpeed":
        number = place.name.rpartition("global_step")[2]
        text_files.replace(place.parent / "latest_checkpointed_iteration.txt", number)
        # under ZeRO 3 the host cannot take its own checkpoints that way either
        how += "" if files.shards else "; add --finetune to begin at iteration 0"
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
            make_fresh(content, path)
            save(content, place / path.name)
        else:
            left_out.append(path.name)
    how = f"from_pretrained({str(out)!r})"
    if (last / "trainer_state.json").is_file():
        how += ", or Trainer's resume_from_checkpoint, with fresh optimiser state where there is some"
    return {"layout": "Hugging Face", "load": how, "left_out": left_out}
