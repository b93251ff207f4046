"""Study `design`: schedules designed on proxies beside law flow as it is, and where they carry
over.

Roads are planned on one seed by the influences of a recorded run; every reported seed is fresh,
paired with the constant mixture, served by the product's own Mixture at equal budgets, and judged
on text that planned nothing.
"""

import dataclasses
import functools
import json

import numpy as np

from megatron_commute.config import Run, load, resolve
from megatron_commute.data.indexed import inspect_data
from megatron_commute.decide import flow
from megatron_commute.design import cells, options, plan
from megatron_commute.design import run as work
from megatron_commute.experiments import bilingual_criterion as criterion
from megatron_commute.experiments import bilingual_design_tables as tables
from megatron_commute.experiments import bilingual_halves as halves
from megatron_commute.experiments import bilingual_targets as targets
from megatron_commute.experiments.bilingual_flow import BATCH, rate_of
from megatron_commute.experiments.bilingual_flow_variants import UNTRAINED_TEXT, VARIANTS
from megatron_commute.experiments.bilingual_tables import refuse_unknown_parts, write_csv
from megatron_commute.settings import text_files
from megatron_commute.settings.rates import rates

STYLES = ("WSD", "cosine", "constant")
TWO = STYLES[:2]
PEAKS = (1e-3, 2e-3, 4e-3)  # tried for each rate schedule before averaging is judged
AVERAGED = 0.1  # last part of a run
CHOOSING = (101, 102)  # seeds of these peaks
DESIGNS = 20  # of random halves of one text: nothing is to gain there
PARTS = ("main", "length", "size", "rate", "memory")
PARTS = (*PARTS, "averaging", "folding", "criterion", "halves", "targets")


@dataclasses.dataclass(frozen=True)
class Size:
    """How much of the study is run."""

    parts: tuple = PARTS
    # of the study, in their order
    steps: int = 500
    # of a proxy that plans
    seeds: int = 6
    # pairs that report
    few: int = 3
    # pairs of longer and larger runs
    lengths: tuple = (250, 500, 1000, 2000)
    # steps of runs whose memory is fitted
    hidden: int = 48
    # width of the proxy that plans
    designs: int = DESIGNS
    # of random halves
    short: int = 150
    # steps of their proxies


QUICK = Size(steps=20, seeds=2, few=2, lengths=(20, 40), hidden=16, designs=2, short=20)


def designed(settings, folder, size, style, untrained=True, setting=VARIANTS["base"], **changes):
    """The Design of the study's three domains, with the texts that only judge or without; setting:
    other shares and another target; changes: of options.Options.
    """
    own = options.Options(
        vocabulary=settings.vocabulary + 1, steps=size.steps, hidden=size.hidden, batch=BATCH
    )
    own = dataclasses.replace(own, sequence=settings.sequence, **changes)
    samples = own.steps * BATCH
    budgets = {name: round(share * samples) for name, share in setting.shares.items()}
    budgets["english"] += samples - sum(budgets.values())
    domains = {
        name: {
            "path": f"{settings.data}/{name}_train",
            "holdout": f"{settings.data}/{name}_valid",
            "budget": budget,
        }
        for name, budget in budgets.items()
    }
    texts = [(name, f"{settings.data}/{name}_valid") for name in UNTRAINED_TEXT if untrained]
    told = {"domains": domains, "target": setting.target}
    return design_of(folder / f"{style}-{own.steps}.yaml", told, style, own, texts)


def design_of(path, told, style, own, texts=()):
    """The Design of a mixture file with the keys `told`, written to `path`, for a run as long as
    its proxy. own: options.Options; texts: as `untrained` of options.design.
    """
    told = {**told, "mode": "fixed", "probe": {"samples": 8, "splits": 2}}
    text_files.replace(path, json.dumps(told))  # JSON is YAML
    config = load(str(path))
    a_run = Run(
        seq_length=own.sequence,
        global_batch=own.batch,
        micro_batch=own.batch,
        data_parallel=1,
        train_iters=own.steps,
        prefetched=0,
    )
    about = {"config": config, "plan": resolve(config, a_run, *inspect_data(config, own.sequence))}
    about |= {"run": a_run, "rates": rates(rate_of(style, own.steps, own.lr)), "options": own}
    return options.design(**about, untrained=texts, harm=flow.HARM)


def study(settings, folder, size, processes, say):
    """Run what is missing of the parts and write their tables and pictures; (text, files)."""
    parts = {"main": _main, "length": _length, "size": _size, "rate": _rate, "memory": _memory}
    parts |= {"averaging": _averaging, "folding": _folding, "criterion": _criterion}
    parts |= {"halves": _halves, "targets": _targets}
    refuse_unknown_parts(size.parts, parts)
    tell = lambda cell: say(f"{cell['key']}: {cell['timing']['seconds']:.0f} s")  # noqa: E731
    text, files = [], []
    for part in size.parts:
        rows = parts[part](settings, folder, size, processes, tell)
        shown, written = tables.written(folder, part, rows)
        text.append(shown)
        files += written
    return "\n\n".join(text), files


def roads(settings, folder, size, style, processes, tell):
    """({name: (edges, weights)} of the schedules compared under a style: law flow as it is, and the
    roads at the strengths that a design chooses; rows about these).
    """
    design = designed(settings, folder, size, style)
    found = work.planned(design, folder / style, processes, tell)
    result, rows = {"flow": designed_flow(design)}, []
    for number, entry in enumerate(found["roads"]):
        road, strength = entry["road"], entry["strength"]
        name = "fitted flow" if road.name == "flow" else road.name
        result[name] = road.edges, work.segments_of(design, road, strength)
        row = {"style": style, "road": name, "memory": road.memory, "explained": road.explained}
        row |= {"strength": strength, "foreseen": entry["gain"], "chosen": number == found["chosen"]}
        rows.append(row)
    return result, rows


def _judged(design, folder, schedules, seeds, about, processes, tell, choosing=False):
    """Rows of the change of every loss under the schedules {name: (edges, weights)}, against the
    constant mixture and against law flow where it is among them. choosing: on what chooses.
    """
    at, cell = ("choosing/", work.tried) if choosing else ("", work.judged)
    jobs = []
    for seed in seeds:
        for name, segments in {"constant": (None, None), **schedules}.items():
            edges, weights = (None if part is None else np.asarray(part).tolist() for part in segments)
            told = {"seed": seed, "edges": edges, "weights": weights}
            jobs.append((f"{at}{name}/{seed}", cell, told))
    found = cells.fill(folder, design, jobs, processes, tell)
    losses = {
        name: [found[f"{at}{name}/{seed}"]["losses"] for seed in seeds] for name in ("constant", *schedules)
    }
    pairs = [(name, "constant") for name in schedules]
    pairs += [(name, "flow") for name in schedules if "flow" in schedules and name != "flow"]
    return [
        {**about, "schedule": ours, "against": base, **row}
        for ours, base in pairs
        for row in _changes(design, [losses[ours], losses[base]])
    ]


def _changes(design, pairs):
    """Rows of changes with plain 95 % intervals; pairs as of work.changes_of."""
    return [change.as_dict() for change in work.changes_of(dataclasses.replace(design, looks=(1,)), pairs)]


def _seeds(count):
    return tuple(range(1, count + 1))


def _main(settings, folder, size, processes, tell):
    rows, planned = [], []
    for style in STYLES:
        schedules, found = roads(settings, folder, size, style, processes, tell)
        planned += found
        design, about = designed(settings, folder, size, style), {"x": "main", "style": style}
        rows += _judged(design, folder / style, schedules, _seeds(size.seeds), about, processes, tell)
    write_csv(folder / "roads.csv", planned)
    return rows


def _carried(settings, folder, size, processes, tell, variants):
    """Schedules found at size.steps in other runs. variants: {x: changes of Options}."""
    rows = []
    for style in TWO:
        schedules, _ = roads(settings, folder, size, style, processes, tell)
        for x, changes in variants.items():
            design = designed(settings, folder, size, style, **changes)
            if "steps" in changes:  # law flow as it is knows how long its run is
                own = designed_flow(design)
                schedules = {**schedules, "flow": own}
            about = {"x": x, "style": style}
            place = folder / f"{style}-{x}"
            rows += _judged(design, place, schedules, _seeds(size.few), about, processes, tell)
    return rows


def designed_flow(design, **constants):
    """(edges, weights) of law flow as it is, or with other constants, for a proxy."""
    steps = design.proxy.steps
    found = flow.planned(
        rates=np.array(design.proxy.recipe.rates),
        batches=np.full(steps, design.proxy.batch),
        budgets=design.proxy.budgets,
        weights=np.array(design.proxy.shares),
        target=np.array(design.target),
        low=np.array(design.low),
        high=np.array(design.high),
        **constants,
    )
    return found.edges / steps, found.weights


def _length(settings, folder, size, processes, tell):
    return _carried(settings, folder, size, processes, tell, {"4 x steps": {"steps": 4 * size.steps}})


def _size(settings, folder, size, processes, tell):
    larger = {"layers": 4, "hidden": 2 * size.hidden}
    return _carried(settings, folder, size, processes, tell, {"larger": larger})


def _rate(settings, folder, size, processes, tell):
    return _carried(settings, folder, size, processes, tell, {"a third of the rate": {"lr": 1e-3 / 3}})


def _memory(settings, folder, size, processes, tell):
    """What memory the influences of runs of other lengths, rates and sizes have."""
    asked = {f"{steps} steps": {"steps": steps} for steps in size.lengths}
    asked |= {"a third of the rate": {"lr": 1e-3 / 3}, "larger": {"layers": 4, "hidden": 2 * size.hidden}}
    rows = []
    for x, changes in asked.items():
        for style in TWO:
            design = designed(settings, folder, size, style, False, **changes)
            key, seed = f"recorded/{CHOOSING[0]}", CHOOSING[0]
            job = key, work.recorded, {"seed": seed}
            found = cells.fill(folder / f"{style}-memory-{x}", design, [job], processes, tell)
            rows.append({"x": x, "style": style, "seed": seed, **_fitted(design, found[key])})
    return rows


def _fitted(design, cell):
    memory, explained = criterion.fitted_memory(design, cell)
    return {"memory": memory, "explained": explained, "reached": cell["reached"]}


def _criterion(settings, folder, size, processes, tell):
    """What a probe sees along a run, its scores and its curvature, beside the influences."""
    rows, curvatures = [], []
    for style in STYLES:
        design = designed(settings, folder, size, style, False)
        place = folder / f"{style}-criterion"
        found = cells.fill(place, design, criterion.recorded_jobs(CHOOSING), processes, tell)
        for seed in CHOOSING:
            about = {"x": "main", "style": style, "seed": seed}
            recorded, measured = found[f"recorded/{seed}"], found[f"measured/{seed}"]
            rows += criterion.criterion_rows(design, measured, recorded, about)
            memory = criterion.fitted_memory(design, recorded)[0]
            curvatures += criterion.curvature_rows(design, measured, about, memory)
    tables.written(folder, "curvature", curvatures)
    return rows


def _averaging(settings, folder, size, processes, tell):
    """Rate schedules at their own best peak, last weights and the mean of the last tenth, constant
    mixture and law flow; against WSD with the constant mixture and its last weights.
    """
    found, best = {}, {}
    for style in STYLES:
        tried = {}
        for peak in PEAKS:
            design = designed(settings, folder, size, style, lr=peak)
            cell = _averaged(design, folder / f"{style}-{peak:g}", CHOOSING, ("constant",), processes, tell)
            both = [[one[read] for read in ("losses", "averaged")] for one in cell.values()]
            values = [[[losses[name] for name in design.names] for losses in one] for one in both]
            tried[peak] = float((np.array(values) @ design.proxy.shares).min(1).mean())
        best[style] = min(tried, key=tried.get)
        design = designed(settings, folder, size, style, lr=best[style])
        place = folder / f"{style}-{best[style]:g}"
        names = ("constant", "flow")
        found[style] = design, _averaged(design, place, _seeds(size.seeds), names, processes, tell)
    base = [found["WSD"][1]["constant", seed]["losses"] for seed in _seeds(size.seeds)]
    rows = []
    for style, (design, cell) in found.items():
        for name in ("constant", "flow"):
            for read in ("losses", "averaged"):
                ours = [cell[name, seed][read] for seed in _seeds(size.seeds)]
                about = {
                    "x": {"losses": "last", "averaged": "mean"}[read],
                    "style": style,
                    "peak": best[style],
                }
                rows += [{**about, "schedule": name, **row} for row in _changes(design, [ours, base])]
    return rows


def _averaged(design, folder, seeds, names, processes, tell):
    jobs = {}
    edges, weights = designed_flow(design)
    for seed in seeds:
        for name in names:
            own = {"edges": None, "weights": None}
            if name == "flow":
                own = {"edges": edges.tolist(), "weights": weights.tolist()}
            jobs[name, seed] = (
                f"averaged/{name}/{seed}",
                work.judged,
                {"seed": seed, **own, "averaged": AVERAGED},
            )
    found = cells.fill(folder, design, list(jobs.values()), processes, tell)
    return {place: found[job[0]] for place, job in jobs.items()}


def _folding(settings, folder, size, processes, tell):
    """How much influences change when rare tokens are one."""
    rows = []
    for style in TWO:
        values = {}
        for known in (settings.vocabulary + 1, settings.vocabulary // 2, settings.vocabulary // 8):
            design = designed(settings, folder, size, style, False, vocabulary=known)
            place = folder / f"{style}-vocabulary {known}"
            found = cells.fill(
                place, design, [("recorded/101", work.recorded, {"seed": 101})], processes, tell
            )
            cell, kept = found["recorded/101"], design.kept
            own = np.array(cell["influences"])[1]  # of Russian
            edges = plan.edges_of(size.steps, kept, plan.SEGMENTS)
            values[known] = plan.wish(own, np.array(design.proxy.shares), size.steps, edges, kept)
            whole = values[settings.vocabulary + 1]
            alike = float(np.corrcoef(whole[:, 1], values[known][:, 1])[0, 1])
            fit = _fitted(design, cell)
            rows.append({"x": known, "style": style, "correlation": alike, **fit})
    return rows


def _targets(settings, folder, size, processes, tell):
    """The memory of other targets."""
    made = functools.partial(designed, settings, folder, size), designed_flow, _judged
    return targets.part(*made, STYLES, folder, _seeds(size.seeds), processes, tell)


def _halves(settings, folder, size, processes, tell):
    """False alarms."""
    return halves.rows(settings, folder, size.short, size.designs, design_of, processes, tell)
