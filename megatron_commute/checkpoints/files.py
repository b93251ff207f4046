"""Checkpoint folders and their files: found, sorted and read, never written to.

Files are unpickled by torch.load(weights_only=True): tensors, containers and the few classes named
here, for which plain stand-ins are made, so that nothing of a checkpoint is executed and DeepSpeed
need not be imported.
"""

import argparse
import contextlib
import re
import struct
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from megatron_commute.data.tokenizer_note import json_value
from megatron_commute.settings import text_files

_STEP = re.compile(r"(?:global_step|iter_|checkpoint-)(\d+)")
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_SHARD = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt")
_LAYER = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")


LARGEST_JSON = 64 << 20  # bytes; an index of shards has a line for each parameter
LAST_STEP = 10**12  # beyond any run: what says more is damaged


class CheckpointError(ValueError):
    """A checkpoint that cannot be analysed; the message names the file and the cure."""


class Files(NamedTuple):
    """Files of one checkpoint."""

    model: dict
    # {model-parallel rank: path}
    shards: dict
    # {(data-parallel rank, model-parallel rank): path} of ZeRO-3's model states
    optimizer: dict
    # likewise, of sharded optimisers
    layers: dict
    # {(layer, tensor-parallel rank): path} of pipelines


class _Plain:
    """Stands in for a class of DeepSpeed that a checkpoint names; keeps its attributes and does
    nothing.
    """

    def __init__(self, *args, **kwargs):
        self.args = args


_STAND_INS = [
    (type(name.rpartition(".")[2], (_Plain,), {}), name)
    for name in (
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
        "megatron.core.enums.ModelType",
        "megatron.model.enums.ModelType",
        "megatron.model.enums.PositionEmbeddingType",
    )
]
# of the random states that Megatron-DeepSpeed keeps
_NUMPY = [
    (np.empty(0).__reduce__()[0], f"numpy.{name}.multiarray._reconstruct") for name in ("core", "_core")
]
_NUMPY += [np.ndarray, np.dtype] + [type(np.dtype(kind)) for kind in ("u4", "u1", "i8", "f8")]


def series(paths, unnamed=0):
    """[(iteration, folder)] of every checkpoint below `paths`, sorted: checkpoint folders, --save
    folders of many, or model folders of Hugging Face, which are of iteration `unnamed` where
    nothing says theirs.

    Raises CheckpointError for a path that is none and where two checkpoints have one iteration.
    """
    found = {}
    if not paths:
        raise CheckpointError("name a checkpoint (global_stepN, checkpoint-N), or the --save folder of a run")
    for path in map(Path, paths):
        if not path.is_dir():
            raise CheckpointError(
                f"{path}: no such folder; name a --save folder or a checkpoint such as global_step1000"
            )
        with reading(path):
            inside = [path] if _step(path) is not None else [p for p in path.iterdir() if p.is_dir()]
        steps = {folder: _step(folder) for folder in inside}
        chosen = {folder: step for folder, step in steps.items() if step is not None}
        if not chosen and hugging_face(path):
            chosen = {path: iteration(path, unnamed)}
        if not chosen:
            raise CheckpointError(
                f"{path}: holds no checkpoint (global_stepN, checkpoint-N); name the --save folder of a "
                "run, and save with --save-interval"
            )
        for folder, step in chosen.items():
            other = found.setdefault(step, folder)
            if other.resolve() != folder.resolve():
                raise CheckpointError(
                    f"{folder} and {other} are both of iteration {step}; analyse one run at a time"
                )
    return sorted(found.items())


def _step(folder):
    match = _STEP.fullmatch(folder.resolve().name)
    return int(match[1]) if match else None


def hugging_face(folder):
    """Whether a folder is of Hugging Face's libraries: the configuration of a model or of an
    adapter lies in it.
    """
    return any(Path(folder, name).is_file() for name in ("config.json", "adapter_config.json"))


def iteration(folder, unnamed=0):
    """Steps that a folder of Hugging Face says by its name, else in trainer_state.json; `unnamed`
    where neither does.
    """
    named, state = _step(Path(folder)), Path(folder, "trainer_state.json")
    if named is not None or not state.is_file():
        return unnamed if named is None else named
    return whole_step(read_json(state).get("global_step", unnamed), state)


def whole_step(step, where):
    """`step` as an int. Raises CheckpointError, naming `where`, for what is no number of steps."""
    if isinstance(step, bool) or not isinstance(step, int | float) or not 0 <= step <= LAST_STEP or step % 1:
        raise CheckpointError(
            f"{where}: says step {str(step)[:40]}, which is none of a run; give it the right one, or leave "
            "the checkpoint out"
        )
    return int(step)


def read_json(path):
    """The object in a JSON file. Raises CheckpointError for a damaged one."""
    try:
        found = json_value(text_files.read_bytes(path, LARGEST_JSON, "a JSON file"))
        if not isinstance(found, dict):
            raise ValueError("it is no object")
    except text_files.TextFileError as fault:
        raise CheckpointError(str(fault)) from None
    except (ValueError, RecursionError) as fault:
        told = " ".join(str(fault).split())[:160]
        raise CheckpointError(f"{path}: damaged ({told}); copy it again") from None
    return found


def files(folder):
    """The Files of a checkpoint folder. Raises CheckpointError where a rank's file is missing."""
    model, shards, optimizer, layers = {}, {}, {}, {}
    for path in sorted(Path(folder).glob("*.pt")):
        if match := _MODEL.fullmatch(path.name):
            model[int(match[1])] = path
        for kind, into in ((_SHARD, shards), (_OPTIMIZER, optimizer), (_LAYER, layers)):
            if match := kind.fullmatch(path.name):
                into[int(match[1]), int(match[2])] = path
    if not model and not shards:
        raise CheckpointError(
            f"{folder}: no model states in it; the checkpoint is incomplete, copy the whole folder"
        )
    for name, found in (("model states", shards), ("optimiser states", optimizer), ("layers", layers)):
        for missing in _holes(found):
            raise CheckpointError(
                f"{folder}: the {name} of ranks {missing} are missing; the checkpoint is incomplete, copy "
                "the whole folder"
            )
    if model and sorted(model) != list(range(len(model))):
        raise CheckpointError(
            f"{folder}: model states of ranks {sorted(model)} only; the checkpoint is incomplete, copy the "
            "whole folder"
        )
    return Files(model=model, shards=shards, optimizer=optimizer, layers=layers)


def _holes(found):
    """Pairs of ranks that the largest ones imply and that are not there, one after the other: a
    damaged name may imply very many.
    """
    firsts = sorted({pair[0] for pair in found})
    seconds = range(1 + max((pair[1] for pair in found), default=-1))
    if firsts and "layer" not in next(iter(found.values())).name:
        firsts = range(1 + firsts[-1])
    pairs = ((first, second) for first in firsts for second in seconds)
    return (pair for pair in pairs if pair not in found)


def load(path):
    """The content of one file on the CPU, mapped where the file allows it. Raises CheckpointError
    for a damaged file and for one that names classes which are not known to be harmless.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: is missing, or no regular file; copy the whole folder")
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *_STAND_INS, *_NUMPY]), _in_silence():
            mapped = _zipped(path)
            if mapped:
                _require_records(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as fault:
        told = str(fault).strip()
        if name := re.search(r"GLOBAL (\S+)", told):
            raise CheckpointError(
                f"{path}: names {name[1]}, which is not among the harmless classes that are read; save the "
                "checkpoint without it, or leave it out"
            ) from None
        first = " ".join(told.splitlines()[0].split())[:160] if told else type(fault).__name__
        first = "it cannot be unpickled" if first.startswith("Weights only") else first
        raise CheckpointError(
            f"{path}: damaged or cut off ({first}); copy it again, or leave the checkpoint out"
        ) from None


def _require_records(path):
    """Raises where a record of a file of torch does not lie where its directory says: torch checks
    headers when it copies a record, and not when it maps it.
    """
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        records = sorted(archive.infolist(), key=lambda record: record.header_offset)
        ends = [record.header_offset for record in records[1:]] + [archive.start_dir]
        for record, end in zip(records, ends, strict=True):
            archive.open(record).close()  # its magic and its name
            file.seek(record.header_offset + 26)
            begin = file.tell() + 4 + sum(struct.unpack("<HH", file.read(4)))
            # a descriptor of 16 or 24 bytes may follow
            if record.compress_type or not 0 <= end - begin - record.file_size <= 24:
                raise ValueError(f"record {record.filename[:80]!r} lies elsewhere than its directory says")


# what Python, numpy and torch raise at content of another type, length or size than was expected
_RAW = (ArithmeticError, AttributeError, LookupError, RuntimeError, OSError, TypeError, ValueError)


@contextlib.contextmanager
def reading(place):
    """A section that reads what stands in `place`, a file or a folder: content that is not as its
    writer leaves it ends in a CheckpointError that names it.
    """
    try:
        yield
    except CheckpointError:
        raise
    except _RAW as fault:
        told = " ".join(str(fault).split())[:160]
        raise CheckpointError(
            f"{place}: is not as its writer leaves it ({type(fault).__name__}: {told}); copy it again, or "
            "leave the checkpoint out"
        ) from fault


@contextlib.contextmanager
def _in_silence():
    """torch warns about typed storages of older files, which does not concern people."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _zipped(path):
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def content(folder):
    """Names and sizes of a checkpoint's files, as JSON values: what tells whether it is still the
    same.
    """
    return {path.name: path.stat().st_size for path in sorted(Path(folder).iterdir()) if path.is_file()}
