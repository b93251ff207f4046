"""What lets a job end in time and start again, on other ranks too: limits on waiting, one job a
folder, other sizes.

DeepSpeed's ZeRO checkpoints hold one shard of the optimiser for each data-parallel rank and load on
as many ranks only. Its universal form has a file for each parameter and loads on any number; the
conversion copies the client state, and with it this plug-in's, as it is. Without ZeRO (stage 0)
every rank keeps everything and no conversion is needed.
"""

import contextlib
import fcntl
import itertools
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_commute.settings import text_files, yaml_checks

_SHARD = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL = re.compile(r"(?:zero_pp_rank_\d+_)?mp_rank_(\d+)_model_states\.pt")
_LOST = re.compile(
    r"closed by peer|reset by peer|broken pipe|timed out|timeout|nccl|socket|gloo|connection", re.IGNORECASE
)
_SOURCE = "converted_from.json"


class RestartError(ValueError):
    """The checkpoint cannot go on in this job; nothing was started."""


class Saved(NamedTuple):
    """Ranks that wrote a checkpoint. data: shards of the optimiser, 0 where it is not sharded;
    model: tensor-parallel ranks; partitioned: whether parameters are shards as well (ZeRO 3).
    """

    data: int
    model: int
    partitioned: bool


class Choice(NamedTuple):
    """tag: folder of the checkpoint below --load, None for a fresh run; universal: its form is
    DeepSpeed's universal one.
    """

    tag: str | None
    universal: bool


@contextlib.contextmanager
def explained(rank, ranks, folder):
    """A collective that fails because another rank is gone ends with a message that says so and
    what to do.

    folder: where checkpoints are saved, or None. Other exceptions pass. Under nccl the watchdog may
    abort the process before Python sees anything.
    """
    try:
        yield
    except RuntimeError as fault:
        if not _LOST.search(f"{fault} {fault.__cause__ or ''}"):
            raise
        what, at = str(fault).splitlines()[0][:200], "at the beginning"
        with contextlib.suppress(RestartError):
            at = f"from {tag}" if (tag := _newest(folder)) else at
        raise RuntimeError(
            f"rank {rank} of {ranks} has lost the others ({what}): a rank or node has ended or is stuck, "
            f"see its output. Start the same command again on all nodes, it resumes {at}"
        ) from fault


@contextlib.contextmanager
def only_job(folder):
    """The only job that writes into `folder` while this lasts; freed by the system when the process
    dies, however it dies.

    Raises RestartError where another job holds it. A file system without locks (OSError) is not
    guarded.
    """
    with _lock_file(folder) as file:
        try:
            # not flock, which a data loader's forked workers would keep when this process is killed
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise RestartError(
                f"--save {folder}: another job writes there; wait until it has ended, or name another folder"
            ) from None
        except OSError:
            pass
        yield


def _lock_file(folder):
    """The open lock file of a folder, which is made where it is absent; nothing else is followed or
    written to.
    """
    path = Path(folder, ".lock")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        file = open(os.open(path, flags, 0o644), "r+b", buffering=0)  # noqa: SIM115  the caller closes it
    except FileExistsError:
        raise RestartError(f"--save {folder}: is a file; name a folder") from None
    except OSError as error:
        strange = Path(folder).is_dir() and os.path.lexists(path)
        cure = "remove its .lock, which is no file of ours" if strange else "name one that can be written to"
        raise RestartError(f"--save {folder}: {error.strerror}; {cure}") from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise RestartError(f"--save {folder}: a pipe; remove its .lock, which is no file of ours")
    return file


def _newest(load):
    """The tag of the newest checkpoint under `load`, which `latest` names; None where there is none
    yet. Raises RestartError.
    """
    latest = Path(load or "", "latest")
    if not load or not os.path.lexists(latest):
        return None
    cure = "write the name of a folder beside it, such as global_step100"
    try:
        tag = text_files.read(latest, 4096).strip()
    except text_files.TextFileError as error:
        raise RestartError(f"{str(error).rpartition('; ')[0]}; {cure}") from None
    if not tag.isprintable() or tag in ("", ".", "..") or "/" in tag:
        raise RestartError(f"{latest}: names no checkpoint, {yaml_checks.shown(tag)}; {cure}")
    return tag


def saved(folder):
    """The Saved of a checkpoint folder, read off its file names. RestartError where it holds no
    model states.
    """
    names = [path.name for path in Path(folder).iterdir()] if Path(folder).is_dir() else []
    shards = [match for name in names if (match := _SHARD.fullmatch(name))]
    models = [match for name in names if (match := _MODEL.fullmatch(name))]
    if not models:
        raise RestartError(
            f"{folder}: no checkpoint here, though `latest` names it; write another tag there, or name "
            "another --load"
        )
    _require_shards(Path(folder), models, shards)
    return Saved(
        len({match[1] for match in shards}),
        len({match[1] for match in models}),
        any(match[0].startswith("zero_pp_rank_") for match in models),
    )


def _require_shards(folder, models, shards):
    """Raises RestartError, on every rank that looks, where an optimiser state is missing that the
    model states say was saved: fewer files would pass for a job of fewer ranks.
    """
    first = folder / min(match[0] for match in models)
    try:
        with open(first, "rb") as file:
            mapped = file.read(2) == b"PK"
        state = torch.load(first, map_location="cpu", weights_only=False, mmap=mapped)
        ranks = state["dp_world_size"] if shards or state.get("optimizer") is None else 0
    except Exception as fault:  # whatever unpickling may raise
        raise RestartError(
            f"{first}: cannot be read ({type(fault).__name__}); copy the checkpoint again, or write an "
            "earlier tag into `latest`"
        ) from fault
    prefix = shards[0][0].partition("zero_pp_rank_")[0] if shards else ""
    for model, data in itertools.product(sorted({match[1] for match in models}), range(ranks)):
        kinds = [f"{prefix}zero_pp_rank_{data}_mp_rank_{model}_optim_states.pt"]
        if first.name.startswith("zero_pp_rank_"):
            kinds.append(f"zero_pp_rank_{data}_mp_rank_{model}_model_states.pt")
        for path in (folder / name for name in kinds):
            if not path.exists():
                raise RestartError(
                    f"{path}: is missing, {ranks} data-parallel ranks saved this checkpoint; copy the whole "
                    "folder from where it was saved, or write an earlier tag into `latest`"
                )


def choose(load, data, model, stage, convert=False, say=print):
    """The Choice for a job of `data` x `model` ranks that loads the newest checkpoint under `load`
    (None: a fresh run).

    stage: of ZeRO in this job. convert: let this rank (one of all, before torch.distributed starts)
    write the universal form where it is needed; the others wait for it in the rendezvous. Raises
    RestartError, naming the cure, for another number of tensor-parallel ranks, for a change between
    sharded and whole parameters or optimisers, and for a failed conversion.
    """
    tag = _newest(load)
    if tag is None:
        return Choice(None, False)
    folder = Path(load, tag)
    found = saved(folder)
    if found.model != model:
        raise RestartError(
            f"{folder}: written by {found.model} tensor-parallel ranks, this job has {model}; write "
            f"--tensor-model-parallel-size {found.model} (the number of data-parallel ranks is free)"
        )
    was = "3" if found.partitioned else "1 or 2" if found.data else "0"
    if str(stage) not in was:
        raise RestartError(
            f"{folder}: written under ZeRO {was}, this job has zero_optimization.stage {stage}; write {was} "
            "into --deepspeed_config"
        )
    if found.data in (0, data):
        return Choice(tag, False)
    if convert:
        seconds = _convert(folder, say, f"of {found.data} data-parallel ranks, this job has {data}")
        if seconds:
            say(
                f"converted to {folder.name}_universal; it may be deleted when the next checkpoint is written"
            )
    return Choice(f"{tag}_universal", True)


def _convert(folder, say, why):
    """Write the universal form of `folder` beside it, whole or not at all; False where it is there
    already.
    """
    target = folder.with_name(f"{folder.name}_universal")
    source = {
        path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(folder.glob("*.pt"))
    }
    with contextlib.suppress(ValueError):  # written by no conversion of ours, so it is made again
        if (target / _SOURCE).exists() and json.loads(text_files.read(target / _SOURCE)) == source:
            return False
    say(f"the checkpoint {folder.name} is {why}: converting it to DeepSpeed's universal form")
    shutil.rmtree(target, ignore_errors=True)  # of an older checkpoint of the same step
    part, given = (folder.with_name(f".{target.name}.{os.getpid()}{end}") for end in ("", ".given"))
    workers = str(min(4, os.cpu_count() or 1))
    command = [sys.executable, "-W", "ignore", "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(given), "--output_folder", str(part), "--inject_missing_state"]
    command += ["--num_extract_workers", workers, "--num_merge_workers", workers]
    try:
        _tensors_only(folder, given)
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode:
            told = "\n".join((done.stdout + done.stderr).splitlines()[-5:])
            raise RestartError(
                f"{folder}: DeepSpeed's ds_to_universal failed; start on the number of ranks that wrote it, "
                f"or free disk space; it said:\n{told}"
            )
        text_files.replace(part / _SOURCE, json.dumps(source))
        os.replace(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(given, ignore_errors=True)
    text_files.replace(folder.parent / "latest_universal", target.name)
    return True


def _tensors_only(folder, given):
    """A folder of links to a checkpoint, its model states without what is no tensor:
    megatron-core's empty `_extra_state`, which ends ds_to_universal with an AttributeError
    (deepspeed 0.19.8).
    """
    given.mkdir()
    for path in folder.glob("*.pt"):
        if not path.name.startswith("mp_rank_"):
            (given / path.name).symlink_to(path.resolve())
            continue
        state = torch.load(path, map_location="cpu", weights_only=False)
        if state.get("module") is not None:
            state["module"] = {
                name: value for name, value in state["module"].items() if torch.is_tensor(value)
            }
        torch.save(state, given / path.name)


def load(engine, folder, choice):
    """The client state of the chosen checkpoint, loaded into the engine, or None for a fresh run.

    From the universal form of ZeRO 3 DeepSpeed (0.19.8) gives every optimiser group the settings of
    the first, and all flat parameters one step counter, which then counts once for each of them in
    every step; here each has its own.
    """
    if choice.tag is None:
        return None
    own = [
        {key: value for key, value in group.items() if key != "params"}
        for group in engine.optimizer.param_groups
    ]
    _, state = engine.load_checkpoint(folder, tag=choice.tag)
    if choice.universal and engine.zero_optimization_stage() == 3:
        for group, settings in zip(engine.optimizer.param_groups, own, strict=True):
            group.update(settings)
        for moments in engine.optimizer.optimizer.state.values():
            if torch.is_tensor(moments.get("step")):
                moments["step"] = moments["step"].clone()
    return state
