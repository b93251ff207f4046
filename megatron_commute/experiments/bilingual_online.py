"""Study `online`: what law flow in mode act keeps of its gain when a run changes half-way.

Part `target`: another target from half of the run on, by the control file, beside going on with
the old one and beside the best schedule of a grid for the second half. Part `length`: 30 % fewer or
more steps from half of the run on, by consent, beside law flow that knew the true length from its
first step. Seeds and sequences that choose are not those that report. Runs:
bilingual_online_run.py. Parts `memory` and `record`: bilingual_memory.py,
bilingual_online_record.py.
"""

import dataclasses

from megatron_commute.design import cells
from megatron_commute.experiments import bilingual_memory as memory
from megatron_commute.experiments import bilingual_online_record as record
from megatron_commute.experiments import bilingual_online_tables as tables
from megatron_commute.experiments.bilingual_flow import FIRST_CHOOSING
from megatron_commute.experiments.bilingual_online_run import OnlineRun, changed_length, changed_target
from megatron_commute.experiments.bilingual_tables import refuse_unknown_parts, write_csv

RECORDED = ("code", "russian")  # those of the run whose record is kept
LENGTHS = (0.7, 1.3)  # of the run, as a part of its planned steps
# the best schedule for the second half is one of these: law flow at other strengths, or nine tenths
# of what is left of the target's budget between two parts of the second half
GRID = {f"flow x {s:g}": {"strength": s} for s in (0.5, 2.0, 4.0)}
GRID |= {f"{b:g} to {e:g}": {"window": (b, e)} for b, e in ((0.0, 0.4), (0.2, 0.8), (0.4, 1.0), (0.7, 1.0))}
# memory that fits the influences on code's loss (targets_fitted.csv of study design), at most 10
FITTED = {"WSD": 8.4, "cosine": 5.6, "constant": 10.0}


@dataclasses.dataclass(frozen=True)
class Size:
    """How much of the study is run."""

    parts: tuple = ("target", "length", "memory", "record")
    # of the study, in their order
    styles: tuple = ("WSD", "cosine", "constant")
    # of the learning rate
    changes: tuple = ("mixture>russian", "russian>code")
    # target of the first half, of the second; a style after these: under that one alone
    steps: int = 500
    # of a run as it is planned
    decisions: int = 20
    # of a run
    seeds: int = 6
    # paired, that report
    choosing: int = 3
    # paired, that choose


QUICK = Size(steps=40, decisions=8, seeds=2, choosing=2)


def seeds_of(size, choosing=False):
    first = FIRST_CHOOSING if choosing else 1
    return range(first, first + (size.choosing if choosing else size.seeds))


OLD, NEW = {"old plan": {}}, {"flow": {"strength": 1.0}}


def _target(settings, folder, size, processes, tell):
    """Rows of part `target`."""
    tried = []
    about = {"steps": size.steps, "decisions": size.decisions}
    changes = [change.split(">") for change in size.changes]
    places = [(first, then, style) for first, then, *own in changes for style in own or size.styles]
    for first, then, style in places:
        own = {"style": style, "first": first, "then": then, **about, "branches": OLD | GRID}
        for seed in seeds_of(size, True):
            tried.append((f"grid/{first}/{then}/{style}/{seed}", changed_target, {**own, "seed": seed}))
    found = cells.fill(folder, settings, tried, processes, tell)
    best, chosen = {}, []
    for first, then, style in places:
        losses = [found[f"grid/{first}/{then}/{style}/{seed}"]["losses"] for seed in seeds_of(size, True)]
        rows = tables.tried(losses, then, {"first": first, "then": then, "style": style})
        best[first, then, style] = min(rows, key=lambda row: row["percent"])["schedule"]
        chosen += rows
    write_csv(folder / "grid.csv", chosen)
    jobs = []
    for (first, then, style), name in best.items():
        own = {"style": style, "first": first, "then": then, **about}
        own["branches"] = OLD | NEW | {f"best: {name}": GRID[name]}
        for seed in seeds_of(size):
            jobs.append(
                (f"target/{first}/{then}/{style}/{name}/{seed}", changed_target, {**own, "seed": seed})
            )
    found = cells.fill(folder, settings, jobs, processes, tell)
    rows = []
    for (first, then, style), name in best.items():
        losses = [found[f"target/{first}/{then}/{style}/{name}/{seed}"]["losses"] for seed in seeds_of(size)]
        about = {"first": first, "then": then, "style": style}
        if then == "code":
            known = _with_fitted_memory(settings, folder, size, style, first, processes, tell)
            losses = [one | more for one, more in zip(losses, known, strict=True)]
        rows += tables.recovered(losses, f"best: {name}", about)
    return rows


def _with_fitted_memory(settings, folder, size, style, first, processes, tell):
    """Final losses of runs whose memory becomes, with the target, the one that fits code."""
    name = f"own memory: {FITTED[style]:g}"
    own = {"style": style, "first": first, "then": "code", "steps": size.steps, "decisions": size.decisions}
    own["branches"] = {name: {"strength": 1.0, "memory": FITTED[style]}}
    at = f"{name}/{first}/{style}"
    jobs = [(f"{at}/{seed}", changed_target, {**own, "seed": seed}) for seed in seeds_of(size)]
    found = cells.fill(folder, settings, jobs, processes, tell)
    return [found[key]["losses"] for key, _, _ in jobs]


def _length(settings, folder, size, processes, tell):
    """Rows of part `length`."""
    jobs = []
    about = {"steps": size.steps, "decisions": size.decisions}
    for part in LENGTHS:
        for style in size.styles:
            for seed in seeds_of(size):
                own = {"style": style, "part": part, **about, "seed": seed}
                jobs.append((f"length/{part:g}/{style}/{seed}", changed_length, own))
    found = cells.fill(folder, settings, jobs, processes, tell)
    rows = []
    for part in LENGTHS:
        for style in size.styles:
            losses = [found[f"length/{part:g}/{style}/{seed}"]["losses"] for seed in seeds_of(size)]
            rows += tables.kept(losses, {"length": part, "style": style})
    return rows


def study(settings, folder, size, processes, say):
    """Run what is missing of the parts and write their tables and pictures; (text, files)."""
    parts = {"target": _target, "length": _length, "memory": memory.part}
    refuse_unknown_parts(size.parts, Size().parts)
    tell = lambda cell: say(f"{cell['key']}: {cell['timing']['seconds']:.0f} s")  # noqa: E731
    text, files = [], []
    for part in size.parts:
        if part == "record":
            about = {"style": "WSD", "steps": size.steps, "decisions": size.decisions // 2, "seed": 1}
            if not (folder / "record" / "report.html").exists():
                record.recorded(OnlineRun(settings, **about), folder, *RECORDED)
            files += sorted(str(path) for path in (folder / "record").iterdir())
            continue
        shown, written = tables.written(folder, part, parts[part](settings, folder, size, processes, tell))
        text.append(shown)
        files += written
    return "\n\n".join(text), files
