"""Run Megatron-DeepSpeed itself in every layout, with and without the plug-in, and print one row for each.

    MEGATRON_DEEPSPEED=PATH python tests/megatron_deepspeed/matrix.py [LAYOUT ...]

PATH is a checkout of the pinned commit; it is copied, never changed. All layouts together take a quarter of an hour on two
idle cores and rewrite matrix.csv; some of them print only. With agreement.csv it is rewritten by one run of the tests:

    REWRITE_TABLES=1 MEGATRON_DEEPSPEED=PATH python -m pytest tests/megatron_deepspeed/test_mds_layouts.py
"""

import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "support"), str(HERE.parent.parent)]
import jobs
import layouts
import numpy as np

COLUMNS = ("layout", "ranks", "flags", "off_identical", "shadow_identical", "fixed_stream_is_stock", "act_draws_as_logged",
           "resumed_identical", "resumed_log_identical", "exception_survived", "nan_survived", "probes")  # fmt: skip
EXTRA = "probe: {samples: 8, splits: 2}\ncontroller: {law: tilt, confidence: 0.5}"


def trees(folder):
    """(tree with the modern-stack fixes alone, tree with the hook as well), copied from MEGATRON_DEEPSPEED and patched."""
    source = os.environ["MEGATRON_DEEPSPEED"]
    both = []
    for name, patches in (("stock", ["modern-stack"]), ("hooked", ["modern-stack", "hook"])):
        tree = Path(folder, name)
        if not tree.exists():
            shutil.copytree(source, tree, ignore=shutil.ignore_patterns(".git"))
            patch(tree, patches)
        both.append(tree)
    return both


def patch(tree, names):
    """`megatron-commute patch TREE`, for each of the diffs `names`."""
    for name in names:
        command = [sys.executable, "-m", "megatron_commute", "patch", str(tree), "--apply", "--only", name]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def prepare(folder):
    """Data of three domains and a mixture file for each mode; the folder of the data."""
    data = Path(folder, "data")
    if not data.exists():
        data.mkdir(parents=True)
        jobs.write_data(str(data), 600)
    for mode in ("shadow", "fixed", "act"):
        jobs.write_mixture(
            str(data), f"{mode}.yaml", mode=mode, iters=layouts.ITERS, batch=layouts.BATCH, extra=EXTRA
        )
        path = data / f"{mode}.yaml"
        path.write_text(path.read_text().replace("every: 8", "every: 4"))
    return data


def plan(name, folder, stock, hooked, data):
    """The runs of one layout, in order: {name of the run: job of driver.py}."""
    # on CPU a loader made on resume draws from torch's state
    still = ("--hidden-dropout", "0", "--attention-dropout", "0")
    runs = {
        "stock": (stock, ()),
        "off": (hooked, ()),
        "shadow": (hooked, ("--commute", data / "shadow.yaml")),
        "fixed": (hooked, ("--commute", data / "fixed.yaml")),
        "act": (hooked, ("--commute", data / "act.yaml", *still)),
        "cut": (hooked, ("--commute", data / "act.yaml", *still, "--exit-interval", layouts.SAVED)),
        "exception": (hooked, ("--commute", data / "shadow.yaml")),
        "nan": (hooked, ("--commute", data / "shadow.yaml")),
    }
    planned = {}
    for run, (tree, more) in runs.items():
        out = Path(folder, "runs", name, run)
        shutil.rmtree(out, ignore_errors=True)
        argv = layouts.flags(name, data, out / "save", *more)
        ranks = layouts.LAYOUTS[name].ranks
        planned[run] = {"script": f"{tree}/pretrain_gpt.py", "argv": argv, "ranks": ranks, "out": str(out)}
        if run in ("exception", "nan"):
            planned[run]["fault"] = {"rank": ranks - 1, "kind": run, "probe": 2}
    cut = planned["cut"]
    argv = layouts.flags(name, data, f"{cut['out']}/save", "--commute", data / "act.yaml", *still)
    resumed = {**cut, "argv": [*argv, "--load", f"{cut['out']}/save"], "out": cut["out"] + "-resumed"}
    planned["resumed"] = resumed
    return planned


def run(folder, planned):
    """Run jobs in one driver; {run: [what each rank saw]}."""
    Path(folder, "jobs.json").write_text(json.dumps(list(planned.values())))
    tree = Path(next(iter(planned.values()))["script"]).parent
    command = [sys.executable, str(HERE / "driver.py"), str(tree), str(Path(folder, "jobs.json"))]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent.parent), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment)
    seen = {}
    for name, job in planned.items():
        files = [Path(job["out"], f"rank{r}.json") for r in range(job["ranks"])]
        seen[name] = [json.loads(file.read_text()) if file.exists() else None for file in files]
    return seen


def record(job):
    """The decision log of a job, without what may differ between equal runs."""
    file = Path(job["argv"][job["argv"].index("--save") + 1], "commute.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [{key: value for key, value in line.items() if key != "timing"} for line in lines]


def stream(ranks, micro_batch=2):
    """(domain, position) of every sample in the global order, from what the loaders of all ranks brought."""
    loaders = [rank["delivered"] for rank in ranks if rank and rank["delivered"]]
    if len(loaders) > 1 and loaders[0] == loaders[1]:
        loaders = loaders[:1]  # the first and the last stage of a pipeline
    parts = [np.array(one).reshape(-1, micro_batch, 2) for one in loaders]
    return np.stack(parts, axis=1).reshape(-1, 2).tolist() if parts else None


def draws_as_logged(lines, drawn):
    """Whether (domain, position) of every sample follows from the weights in the log: the domain furthest behind its
    integrated weight is served next (to 1e-9: between equals any may be), one that has served its budget leaves."""
    budgets = [96, 16, 48]  # of jobs.write_mixture for 160 samples
    changes = {0: list(jobs.DOMAINS.values())}
    for line in lines:
        if line["event"] == "probe" and line["effective_sample"] is not None:
            changes[line["effective_sample"]] = line["weights_next"]
        if line["event"] == "projection":
            changes[line["sample"]] = line["used"]
    due, served = np.zeros(len(budgets)), np.zeros(len(budgets), dtype=int)
    weights = None
    for i, (domain, position) in enumerate(drawn):
        weights = np.array(changes[i], dtype=float) if i in changes else weights
        weights = np.where(served < budgets, weights, 0.0)
        weights = weights / weights.sum()
        owed = np.where(weights > 0, due + (weights if i == 0 else 0) - served, -np.inf)
        if owed[domain] < owed.max() - 1e-9 or position != served[domain]:
            return False
        served[domain] += 1
        due += weights
    return served.tolist() == budgets


def same(a, b, keys=("losses", "grad_norms", "valid", "model")):
    """Whether every rank of two runs saw the same numbers, to the last bit."""
    return all(
        x is not None and y is not None and all(k in x and x[k] == y.get(k) for k in keys)
        for x, y in zip(a, b, strict=True)
    )


def survived(planned, seen, kind):
    """Whether a fault in one rank's probe was skipped by all, and training saw nothing of it."""
    skips = [[line["event"] for line in record(planned[run])].count("skip") for run in ("shadow", kind)]
    # in fp16 the first probe comes before any step that did not overflow
    return same(seen[kind], seen["stock"]) and skips[1] == skips[0] + 1


def judge(name, planned, seen):
    """The row of one layout."""
    layout, act = layouts.LAYOUTS[name], record(planned["act"])
    half = {key: [rank.get(key) for rank in seen["resumed"] if rank] for key in ("losses", "model")}
    whole = [rank for rank in seen["act"] if rank]
    return {
        "layout": name,
        "ranks": layout.ranks,
        "flags": " ".join(
            [f"zero_stage={layout.stage}", layout.extra.replace(layouts.PLAIN, "").strip()]
        ).strip(),
        "off_identical": same(seen["off"], seen["stock"]),
        "shadow_identical": same(seen["shadow"], seen["stock"]),
        "fixed_stream_is_stock": bool(seen["fixed"][0])
        and stream(seen["fixed"], layout.micro_batch) == stream(seen["stock"], layout.micro_batch),
        "act_draws_as_logged": bool(act)
        and bool(seen["act"][0])
        and draws_as_logged(act, stream(seen["act"], layout.micro_batch)),
        "resumed_identical": bool(whole)
        and half["losses"] == [rank["losses"][layouts.SAVED :] for rank in whole]
        and half["model"] == [rank["model"] for rank in whole],
        "resumed_log_identical": bool(act) and record(planned["resumed"]) == act,
        "exception_survived": survived(planned, seen, "exception"),
        "nan_survived": survived(planned, seen, "nan"),
        "probes": [line["event"] for line in act].count("probe"),
    }


def rows(folder, names):
    """Run and judge layouts in `folder`, one row after the other."""
    stock, hooked = trees(folder)
    data = prepare(folder)
    for name in names:
        planned = plan(name, folder, stock, hooked, data)
        yield judge(name, planned, run(folder, planned))


def main(names):
    with tempfile.TemporaryDirectory() as scratch:
        folder = os.environ.get("MATRIX_FOLDER", scratch)
        found = []
        for row in rows(folder, names or layouts.MATRIX):
            found.append(row)
            print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    if not names:
        write(HERE / "matrix.csv", found)


def write(path, found):
    """A table of rows, dicts with the same keys."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)


if __name__ == "__main__":
    main(sys.argv[1:])
