"""What a design leaves behind: its record, a table, and a schedule of the run where something is to
gain.
"""

import csv
import dataclasses
import io
import os
from pathlib import Path

import numpy as np

from megatron_commute import reduce
from megatron_commute.decide import flow
from megatron_commute.design import plan, verify
from megatron_commute.design import run as work
from megatron_commute.record.log import line
from megatron_commute.settings import schedule
from megatron_commute.settings.text_files import replace

RECORD, TABLE, SCHEDULE, REPORT = "design.jsonl", "design.csv", "schedule.csv", "report.html"
SENTENCES = {
    verify.GAIN: "the schedule gains; schedule.csv is written",
    verify.NOTHING: "NOTHING TO GAIN HERE: the target's interval holds zero; no schedule is written",
    verify.HARM: "NOTHING TO GAIN HERE within the harm allowed: every strength tried took more from a domain "
    "than --harm allows; no schedule is written",
    "short": "THE PROXY IS TOO SHORT TO DECIDE; no schedule is written: give it more steps (--proxy "
    "steps=...), or plan by the law alone (--law flow)",
}


def cells(design):
    """Units of work of a design that gains at its first look."""
    return 1 + 2 * len(plan.RANGES) + 2 * design.looks[0] + work.COMPARED * (1 + len(work.MORE_DATA))


def written(design, run, cost, out, processes, say):
    """Carry the design out and write what it finds into the folder `out`; {"outcome", "text",
    "files", "changes"}, or None on all ranks but the first.

    run: config.Run of the run itself. Cells lie in out/work, so that a killed design goes on.
    ValueError where `out` holds a design of something else.
    """
    folder, first, lines = Path(out), reduce.rank() == 0, []
    about = _about(design, run, cost)
    with reduce.agreed(reduce.everyone()):
        if first:
            _claim(folder, about)
    lines.append(line("design", about))

    def tell(event, found):
        lines.extend(_lines(event, found, design))

    found = work.carried_out(design, folder / "work", processes, say, tell)
    if not first:
        return None
    changes = found["proofs"][-1]["looks"][-1]["changes"] if found["proofs"] else []
    segments = _of_the_run(design, run, found) if found["outcome"] == verify.GAIN else None
    lines.append(line("outcome", {"outcome": found["outcome"], "schedule": segments}))
    text = "".join(f"{_json(each)}\n" for each in lines)
    replace(folder / RECORD, text)
    replace(folder / TABLE, _table(found))
    files = [folder / RECORD, folder / TABLE]
    path = folder / SCHEDULE
    if segments is not None:
        replace(path, schedule.written(design.names, segments))
        files.insert(0, path)
    elif path.exists():
        os.replace(path, path.with_suffix(".csv.old"))  # of an earlier design of this folder
    rows = [dataclasses.asdict(change) for change in changes]
    words = "\n".join([*_words(changes), SENTENCES[found["outcome"]]])
    return {"outcome": found["outcome"], "text": words, "files": [str(f) for f in files], "changes": rows}


def _json(value):
    import json

    return json.dumps(value, allow_nan=False)


def _about(design, run, cost):
    """What was asked, as the record says it."""
    proxy, shape = design.proxy, design.proxy.shape
    steps = np.unique(np.linspace(0, len(design.run_rates) - 1, 200).round().astype(int))
    return {
        "names": design.names,
        "losses": design.source.names,
        "shares": proxy.shares,
        "target": design.target,
        "harm": design.harm,
        "samples": run.train_iters * run.global_batch,
        "global_batch": run.global_batch,
        "train_iters": run.train_iters,
        "rates": {"at": steps / len(design.run_rates), "rate": np.array(design.run_rates)[steps]},
        "proxy": {
            **dataclasses.asdict(shape),
            "parameters": cost["parameters"],
            "steps": proxy.steps,
            "batch": proxy.batch,
            "lr": max(proxy.recipe.rates),
            "weight_decay": proxy.recipe.weight_decay,
            "clip": proxy.recipe.clip,
            "epochs": proxy.epochs,
            "folded": bool(proxy.kept),
            "tokens_a_parameter": work.tokens_a_parameter(design),
        },
        "bounds": [design.low, design.high],
        "looks": design.looks,
        "timing": {"cost": cost},
    }


def _claim(folder, about):
    """A folder's cells belong to one design."""
    path = folder / "work" / "asked.json"
    asked = line("asked", {key: value for key, value in about.items() if key != "timing"})
    if path.exists():
        import json

        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            before = None
        if before != asked:
            raise ValueError(f"--out {folder}: holds a design of something else; give another folder")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, _json(asked))


def _lines(event, found, design):
    """Lines of the record about one result."""
    if event == "planned":
        base, shares = found["recorded"], np.array(design.proxy.shares)
        values = np.array(base["influences"])
        of_target = np.tensordot(np.array(design.target), values[: len(shares)], 1)
        yield line(
            "influences",
            {
                "values": values,
                "reached": base["reached"],
                "losses": base["losses"],
                "marginal": [plan.marginal(each, shares) * design.proxy.steps for each in values],
                "marginal_target": plan.marginal(of_target, shares) * design.proxy.steps,
            },
        )
        for i, entry in enumerate(found["roads"]):
            road = dataclasses.asdict(entry["road"])
            yield line("road", {**entry, "road": road, "chosen": i == found["chosen"]})
    elif event == "proof":
        looks = [{**look, "changes": [_change(c) for c in look["changes"]]} for look in found["looks"]]
        yield line("proof", {**found, "looks": looks})
    else:
        yield line(event, found)


def _change(change):
    return {
        **dataclasses.asdict(change),
        "percent": change.percent,
        "percent_interval": change.percent_interval,
    }


def _of_the_run(design, run, found):
    """Changes [(sample, weights)] of the run itself, budgets and bounds exact."""
    proof, entry = found["proofs"][-1], found["planned"]["roads"][found["planned"]["chosen"]]
    samples, owner = run.train_iters * run.global_batch, design.source.plan
    low, high = np.array(design.low), np.array(design.high)
    if entry["road"].name == "flow":
        last = np.argmax(np.abs(entry["road"].pattern).max(1))
        p = flow.profile(
            np.array(design.proxy.recipe.rates),
            entry["road"].memory,
            flow.scale_of(np.array(design.proxy.recipe.rates), entry["road"].memory, design.kept),
        )
        edges = np.round(entry["road"].edges * design.proxy.steps).astype(int)
        mean = p[edges[last] : edges[last + 1]].mean()
        planned = flow.planned(
            rates=np.array(design.run_rates),
            batches=np.full(run.train_iters, run.global_batch),
            budgets=owner.budgets,
            weights=owner.weights,
            target=np.array(design.target),
            low=low,
            high=high,
            memory=entry["road"].memory,
            reach=proof["strength"] * entry["road"].pattern[last] / mean,
        )
        return [(at, weights) for at, weights in planned.changes]
    return plan.by_sample(entry["road"].edges, proof["weights"], samples, run.global_batch)


def _words(changes):
    from tabulate import tabulate

    if not changes:
        return ["no step along either road helps the target on the proxy"]
    rows = [
        [
            c.name,
            f"{c.constant:.4f}",
            f"{c.change:+.4f} ± {c.interval:.4f}",
            f"{c.percent:+.2f} ± {c.percent_interval:.2f}",
        ]
        for c in changes
    ]
    headers = ["loss", "constant mixture (nats)", "change (nats)", "change (%)"]
    return [tabulate(rows, headers=headers, disable_numparse=True), ""]


def _table(found):
    """CSV text: every look's changes."""
    text = io.StringIO()
    fields = [field.name for field in dataclasses.fields(verify.Change)]
    table = csv.writer(text)
    table.writerow(["attempt", "strength", "seeds", "verdict", *fields, "percent", "percent_interval"])
    for proof in found["proofs"]:
        for look in proof["looks"]:
            for change in look["changes"]:
                about = [proof["attempt"], proof["strength"], look["seeds"], look["verdict"]]
                own = [getattr(change, name) for name in fields]
                table.writerow([*about, *own, change.percent, change.percent_interval])
    return text.getvalue()
