"""`megatron-commute bilingual`: does the order of two languages matter, and which signal foresees it?

Studies: `paper` (sections 4.2 and 4.3 of Rukhovich et al., arXiv 2501.15556, with every effect judged again after a common
tail) and `signals` (which signal predicts tail-judged effects). Every number comes from cells.jsonl in the study's folder:
killed at any moment, a study goes on where it stopped; complete, it redraws its tables and figures in seconds.
"""

import dataclasses
import json
import os
import time
from pathlib import Path

from megatron_commute.experiments import bilingual_cells as cells
from megatron_commute.experiments import bilingual_end_to_end as end_to_end
from megatron_commute.experiments import bilingual_figures as figures
from megatron_commute.experiments import bilingual_paper as paper
from megatron_commute.experiments import bilingual_signals as signals
from megatron_commute.experiments import bilingual_tables as tables
from megatron_commute.experiments.bilingual_trainer import Settings

STUDIES = ("paper", "signals", "end-to-end")


def study(name, settings, out_dir, quick=False, processes=None, say=print):
    """Run (or go on with) study `name` and write its tables and figures into out_dir/name.

    settings: bilingual_trainer.Settings. quick: a few steps of everything, to see it work. processes: at a time, default the
    CPU cores. Returns {"text": tables as text, "files": paths, "seconds": of this call}. Raises ValueError for a folder that
    holds another study, DataError for missing data.
    """
    started, folder = time.monotonic(), Path(out_dir) / name
    folder.mkdir(parents=True, exist_ok=True)
    _check_same(folder, {"study": name, "quick": quick, **dataclasses.asdict(settings)})
    processes = processes or len(os.sched_getaffinity(0))
    work = {"paper": _paper, "signals": _signals, "end-to-end": end_to_end.study}[name]
    text, files = work(settings, folder, quick, processes, say)
    return {"text": text, "files": files, "seconds": time.monotonic() - started}


def settings_from(data, changes):
    """Settings over `data` with changes ["hidden=768", ...]; ValueError names what cannot be read."""
    fields = {field.name: field.default for field in dataclasses.fields(Settings)}
    found = {}
    for change in changes:
        name, _, value = change.partition("=")
        if name not in fields or name == "data":
            raise ValueError(
                f"--set {change}: write NAME=VALUE with one of {', '.join(sorted(fields.keys() - {'data'}))}"
            )
        kind = type(fields[name])
        try:
            found[name] = tuple(value.split(",")) if kind is tuple else kind(value)
        except ValueError:
            raise ValueError(f"--set {change}: {name} is of type {kind.__name__}") from None
    return Settings(data, **found)


def _check_same(folder, settings):
    """A folder belongs to one study with one set of settings."""
    path = folder / "study.json"
    settings = json.loads(json.dumps(settings))
    if not path.exists():
        path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        return
    kept = json.loads(path.read_text(encoding="utf-8"))
    changed = sorted(key for key in settings if key != "data" and kept.get(key) != settings[key])
    if changed:
        raise ValueError(
            f"{folder} holds a study with other settings ({', '.join(changed)}): give the same ones, or another folder"
        )


def _teller(say, total):
    count = iter(range(1, total + 1))
    return lambda cell: say(f"[{next(count)}/{total}] {cell['key']}: {cell['timing']['seconds']:.0f} s")


def _fill(settings, folder, parts, processes, say):
    """parts: [(settings, base job, jobs)]; bases first, since the others start from their states."""
    done = cells.read(folder)
    total = sum(job[0] not in done for _, base, jobs in parts for job in (base, *jobs))
    tell = _teller(say, total)
    for own, base, jobs in parts:
        cells.fill(folder, own, [base], 1, tell)
        done = cells.fill(folder, own, jobs, processes, tell)
    return done


def _signals(settings, folder, quick, processes, say):
    size = signals.QUICK if quick else signals.Size()
    parts = [
        (signals.settings_of(settings, run), signals.base_job(size, run), signals.jobs(size, run))
        for run in size.runs
    ]
    found = _fill(settings, folder, parts, processes, say)
    rows = [
        row
        for run in size.runs
        for row in tables.signal_rows(found, settings, size, run, signals.RUNS[run][0])
    ]
    table = [tables.judged(rows, name, kind) for kind in tables.KINDS for name in tables.SIGNALS]
    tables.write_csv(folder / "signals.csv", rows)
    tables.write_csv(folder / "hits.csv", table)
    by_window = [
        {"run": run, "window": window, **tables.judged(part, name, kind)}
        for run, window in dict.fromkeys((r["run"], r["window"]) for r in rows)
        for part in [[r for r in rows if (r["run"], r["window"]) == (run, window)]]
        for kind in tables.KINDS
        for name in tables.SIGNALS
    ]
    tables.write_csv(folder / "hits_by_window.csv", by_window)
    files = [
        figures.save(folder / "hits.png", (7.6, 3.6), lambda f: figures.hits(f, table)),
        figures.save(folder / "against_truth.png", (8.4, 3.0), lambda f: figures.against_truth(f, rows)),
    ]
    return _text([row for row in table if row["significant"]]), [
        *(str(folder / name) for name in ("signals.csv", "hits.csv", "hits_by_window.csv")),
        *files,
    ]


def _paper(settings, folder, quick, processes, say):
    size = paper.QUICK if quick else paper.Size()
    parts = [(settings, paper.base_job(size, run), paper.jobs(size, run)) for run in paper.RUNS]
    found = _fill(settings, folder, parts, processes, say)
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
