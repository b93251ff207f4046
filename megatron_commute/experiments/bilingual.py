"""`megatron-commute bilingual`: does the order in which languages are used matter to a small GPT?

Studies: `paper` (sections 4.2 and 4.3 of Rukhovich et al., arXiv 2501.15556, with every effect
judged again after a common tail), `end-to-end` (whole runs with equal budgets under several
schedules), `flow` (the same for schedules that follow the learning rate), `design` (for those
designed on proxies) and `online` (for runs that change half-way). Every number comes from
cells.jsonl in the study's folder: killed at any moment, a study goes on where it stopped; complete,
it redraws its tables and figures in seconds.
Started by torchrun or deepspeed, all ranks work on every cell of study `paper` together.
"""

import dataclasses
import json
import os
import time
from pathlib import Path

import torch

from megatron_commute import reduce
from megatron_commute.design import cells
from megatron_commute.experiments import bilingual_cost as cost
from megatron_commute.experiments import bilingual_design as design
from megatron_commute.experiments import bilingual_end_to_end as end_to_end
from megatron_commute.experiments import bilingual_figures as figures
from megatron_commute.experiments import bilingual_flow as flow
from megatron_commute.experiments import bilingual_online as online
from megatron_commute.experiments import bilingual_paper as paper
from megatron_commute.experiments import bilingual_tables as tables
from megatron_commute.experiments.bilingual_trainer import Settings
from megatron_commute.settings import text_files

MODULES = {"paper": paper, "end-to-end": end_to_end, "flow": flow, "design": design, "online": online}
ALONE = ("end-to-end", "flow", "design", "online")  # studies of one process, without an estimate


@reduce.joined()
def study(name, settings, out_dir, quick=False, processes=None, say=print, size=None):
    """Run (or go on with) study `name` and write its tables and figures into out_dir/name.

    settings: bilingual_trainer.Settings. quick: a few steps of everything, to see it work.
    processes: at a time, default the CPU cores, one where there is a GPU. size: of the study,
    default `size_of`. Returns {"text": tables as text, "files": paths, "seconds": of this call};
    None on all ranks but the first. Collective. Raises ValueError for a folder that holds another
    study and for ranks that cannot share the work, DataError for missing data.
    """
    started, folder, ranks = time.monotonic(), Path(out_dir) / name, reduce.size(reduce.everyone())
    size = size or size_of(name, quick)
    if ranks > 1:
        _refuse(name, settings, processes, ranks)
        processes, say = 1, say if reduce.rank() == 0 else _nothing
    _claim(
        folder, {"study": name, "quick": quick, **dataclasses.asdict(settings), **_changed(name, quick, size)}
    )
    processes = processes or (1 if torch.cuda.is_available() else len(os.sched_getaffinity(0)))
    work = {"paper": _paper, "end-to-end": _end_to_end}.get(name) or MODULES[name].study
    found = work(settings, folder, size, processes, say)
    if found is None:
        return None
    text, files = found
    return {"text": text, "files": files, "seconds": time.monotonic() - started}


def estimate(name, settings, out_dir, size, tflops):
    """What study `name` would cost, counted from its jobs; writes out_dir/name/estimate.csv and
    trains nothing.

    tflops: assumed sustained TFLOP/s of one GPU in bfloat16. Returns {"text", "files", "rows"}.
    """
    if name in ALONE:
        raise ValueError("--estimate: for study paper only")
    rows = cost.rows(MODULES[name].parts(settings, size), tflops)
    path = Path(out_dir) / name / "estimate.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    tables.write_csv(path, [{"study": name, **row, "assumed_tflops": tflops} for row in rows])
    return {"text": f"{_text(rows)}\n{cost.sentences(settings, tflops)}", "files": [str(path)], "rows": rows}


def size_of(name, quick):
    """The Size of a study, or its QUICK."""
    return MODULES[name].QUICK if quick else MODULES[name].Size()


def asked(name, data, changes, quick=False):
    """(Settings over `data`, Size of study `name`) with changes ["hidden=768", "window=4000",
    "starts=200,600", ...].

    ValueError names what cannot be read.
    """
    size = size_of(name, quick)
    own = {} if name == "end-to-end" else vars(size)
    fields = {field.name: field.default for field in dataclasses.fields(Settings) if field.name != "data"}
    found = {}
    for change in changes:
        field, _, value = change.partition("=")
        default = {**fields, **own}.get(field)
        if default is None:
            known = ", ".join(sorted({*fields, *own}))
            raise ValueError(f"--set {change}: write NAME=VALUE with one of {known}")
        kind = type(default[0] if isinstance(default, tuple) else default)
        try:
            many = isinstance(default, tuple)
            found[field] = tuple(kind(word) for word in value.split(",") if word) if many else kind(value)
        except ValueError:
            raise ValueError(f"--set {change}: {field} is of type {kind.__name__}") from None
    of_size = {key: found.pop(key) for key in own if key in found}
    return Settings(data=data, **found), dataclasses.replace(size, **of_size)


def _changed(name, quick, size):
    """What study.json says of a size: fields that differ from the study's own, whichever of its
    parts are asked.
    """
    own = vars(size_of(name, quick))
    return {f"size.{key}": value for key, value in vars(size).items() if value != own[key] and key != "parts"}


def _refuse(name, settings, processes, ranks):
    """What several ranks cannot do."""
    if name in ALONE:
        raise ValueError(f"--study {name}: runs in one process; start it without a launcher")
    if processes not in (None, 1):
        raise ValueError(
            f"--processes {processes}: {ranks} ranks work on every cell together; leave --processes out"
        )
    if settings.batch // len(settings.domains) < ranks:
        raise ValueError(
            f"--set batch={settings.batch}: {settings.batch // len(settings.domains)} sequences of a domain "
            f"for {ranks} ranks; write at least {ranks * len(settings.domains)}, or start fewer ranks"
        )


def _nothing(line):
    """What the other ranks say."""


def _claim(folder, wanted):
    """A folder belongs to one study with one set of settings; a field that its study.json lacks has
    its default.
    """
    path = folder / "study.json"
    wanted = json.loads(json.dumps(wanted))
    with reduce.agreed(reduce.everyone()):
        if reduce.rank() == 0 and not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            text_files.replace(path, json.dumps(wanted, indent=1) + "\n")
    with reduce.agreed(reduce.everyone()):
        if not path.exists():
            raise ValueError(
                f"{path}: not there on rank {reduce.rank()}; give an OUT_DIR that all ranks share"
            )
        kept = json.loads(path.read_text(encoding="utf-8"))
    kept = {**json.loads(json.dumps(dataclasses.asdict(Settings(data="")))), **kept}
    changed = sorted(key for key in {*kept, *wanted} - {"data"} if kept.get(key) != wanted.get(key))
    if changed:
        raise ValueError(
            f"{folder} holds a study with other settings ({', '.join(changed)}): give the same ones, or "
            "another folder"
        )


def _teller(say, total):
    count = iter(range(1, total + 1))
    return lambda cell: say(f"[{next(count)}/{total}] {cell['key']}: {cell['timing']['seconds']:.0f} s")


def _fill(folder, parts, processes, say):
    """parts: [(settings, base job, jobs)]; bases first, since others start from their states."""
    done = cells.read(folder)
    total = sum(job[0] not in done for _, base, jobs in parts for job in (base, *jobs))
    tell = _teller(say, total)
    for own, base, jobs in parts:
        cells.fill(folder, own, [base], 1, tell)
        done = cells.fill(folder, own, jobs, processes, tell)
    return done


def _end_to_end(settings, folder, size, processes, say):
    return end_to_end.study(settings, folder, size == end_to_end.QUICK, processes, say)


def _paper(settings, folder, size, processes, say):
    found = _fill(folder, paper.parts(settings, size), processes, say)
    if reduce.rank():
        return None
    effects = [row for run in paper.RUNS for row in paper.effects(found, settings, size, run)]
    brackets = [row for run in paper.RUNS for row in paper.brackets(found, settings, size, run)]
    agreement = [
        row for reading in ("end", "tail") for row in paper.agreement(effects, brackets, settings, reading)
    ]
    gains = [paper.who_gains(effects, settings, run) for run in paper.RUNS]
    beside = [
        row for run in paper.RUNS for row in paper.beside(found, effects, brackets, settings, size, run)
    ]
    files = []
    for name, rows in (
        ("excess_losses.csv", effects),
        ("brackets.csv", brackets),
        ("agreement.csv", agreement),
        ("who_gains.csv", gains),
        ("beside_the_paper.csv", beside),
    ):
        tables.write_csv(folder / name, rows)
        files.append(str(folder / name))
    for run, number in (("even", 3), ("skewed", 4)):
        about = (effects, settings, size, run)
        plane, both = folder / f"figure{number}_{run}.png", folder / f"effects_{run}.png"
        files.append(figures.save(plane, (7.4, 4.2), lambda f, a=about: figures.loss_plane(f, found, *a)))
        files.append(figures.save(both, (7.4, 3.2), lambda f, a=about: figures.effects(f, *a)))
    return "\n\n".join(_text(rows) for rows in (beside, agreement, gains)), files


def _text(rows):
    from tabulate import tabulate

    return tabulate(rows, headers="keys", floatfmt=".3g") if rows else "nothing significant"
