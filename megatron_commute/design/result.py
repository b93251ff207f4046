"""What a design leaves behind: its record, a table, and a schedule of the run where something is to
gain.
"""

import csv
import dataclasses
import io
import json
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

RECORD, TABLE, SCHEDULE = "design.jsonl", "design.csv", "schedule.csv"
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
    return 1 + work.LINE_SEARCH + 2 * design.looks[0] + work.COMPARED * (1 + len(work.MORE_DATA))


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
            _claim(folder, about, _texts(design.source))
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
    rows = [change.as_dict() for change in changes]
    words = "\n".join([*_words(changes), SENTENCES[found["outcome"]]])
    return {"outcome": found["outcome"], "text": words, "files": [str(f) for f in files], "changes": rows}


def _json(value):
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


def _texts(source):
    """Where every text lies."""
    domains = [[*domain.path, domain.holdout] for domain in source.config.domains]
    return [*domains, *source.untrained]


def _claim(folder, about, texts):
    """A folder's cells belong to one design of the same texts."""
    path = folder / "work" / "asked.json"
    asked = line("asked", {key: value for key, value in about.items() if key != "timing"} | {"texts": texts})
    if path.exists():
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
        values, steps = np.array(base["influences"]), design.proxy.steps
        yield line(
            "influences",
            {
                "values": values,
                "reached": base["reached"],
                "losses": base["losses"],
                "marginal": [plan.marginal(each, shares, steps) for each in values],
                "marginal_target": plan.marginal(plan.of_target(values, design.target), shares, steps),
            },
        )
        for i, entry in enumerate(found["roads"]):
            road = dataclasses.asdict(entry["road"])
            yield line("road", {**entry, "road": road, "chosen": i == found["chosen"]})
    elif event == "proof":
        looks = [{**look, "changes": [c.as_dict() for c in look["changes"]]} for look in found["looks"]]
        yield line("proof", {**found, "looks": looks})
    else:
        yield line(event, found)


def _of_the_run(design, run, found):
    """Changes [(sample, weights)] of the run itself, budgets and bounds exact."""
    proof, road = found["proofs"][-1], found["planned"]["roads"][found["planned"]["chosen"]]["road"]
    owner, batch = design.source.plan, run.global_batch
    low, high = np.array(design.low), np.array(design.high)
    if road.name == "flow":
        return flow.planned(
            rates=np.array(design.run_rates),
            batches=np.full(run.train_iters, batch),
            budgets=owner.budgets,
            weights=owner.weights,
            target=np.array(design.target),
            low=low,
            high=high,
            memory=road.memory,
            reach=proof["strength"] * road.ranges,
        ).changes
    edges = np.unique(np.round(road.edges * run.train_iters))
    if len(edges) < len(road.edges):
        raise ValueError(f"--train-iters {run.train_iters}: too few steps for {len(road.edges) - 1} segments")
    road = dataclasses.replace(road, edges=edges / run.train_iters)
    weights = plan.weights(road, proof["strength"], owner.shares, low, high)
    return plan.by_sample(road.edges, weights, run.train_iters * batch, batch)


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
    rows = [
        {**{key: proof[key] for key in ("attempt", "strength")}, "seeds": look["seeds"], **change.as_dict()}
        for proof in found["proofs"]
        for look in proof["looks"]
        for change in look["changes"]
    ]
    text = io.StringIO()
    if rows:
        table = csv.DictWriter(text, rows[0])
        table.writeheader()
        table.writerows(rows)
    return text.getvalue()
