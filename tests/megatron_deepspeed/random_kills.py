"""Fifty random SIGKILLs of Megatron-DeepSpeed under law flow in mode act, ten in each of five layouts.

    MEGATRON_DEEPSPEED=PATH python tests/megatron_deepspeed/random_kills.py [FOLDER] [KILLS]

rewrites random_kills.csv, one row a layout; some five minutes on two idle cores. Everything lies in FOLDER, so that
the same command goes on where it was interrupted. A checkpoint is written every second step; one rank, drawn at random,
dies at a random moment of one of the next steps, checkpoints and probes included, and the job is started again with
--load. What the loaders brought, as far as it was trained on, the final model and the record are compared with a run
that nobody disturbed. A probe in which a rank died is skipped by the restart, on purpose, and after three in a row probing
is off: such steps are counted.
"""

import json
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "support"), str(HERE.parent.parent)]
import driver
import layouts
import matrix

LAYOUTS = ("zero1", "zero3", "tp2", "pp2", "fp16")
TRACKER = "latest_checkpointed_iteration.txt"
KILLS, SAVED = 50, 2
WITHIN, SOON = 0.2, 0.1  # seconds after the beginning of a step, of which one takes a tenth
STILL = ("--hidden-dropout", "0", "--attention-dropout", "0")
FLOW = "target: {russian: 1}\nprobe: {samples: 8, splits: 2}\ncontroller: {law: flow, rate: 0.2}\n"
BUDGETS = [96, 16, 48]


def mixture(data):
    text = (data / "act.yaml").read_text()
    file = data / "killed.yaml"
    file.write_text(text[: text.index("probe:")] + FLOW)
    return file


def job(name, folder, tree, data, out, fault=None):
    """One start of the run of layout `name`, whose checkpoints lie in folder/save."""
    save = Path(folder, "save")
    argv = layouts.flags(name, data, save, "--commute", mixture(data), *STILL, "--save-interval", SAVED)
    if (save / TRACKER).exists():
        argv += ["--load", str(save)]
    ranks, out = layouts.LAYOUTS[name].ranks, str(Path(folder, out))
    shutil.rmtree(out, ignore_errors=True)
    return {
        "script": f"{tree}/pretrain_gpt.py", "argv": argv, "ranks": ranks, "out": out, "fault": fault, "told": True,
    }  # fmt: skip


def saved_step(folder):
    """The step that the next start goes on with. DeepSpeed names a checkpoint in `latest` before all ranks have written
    theirs; where a rank died in between, `latest` is put back, as who runs the job would, to what Megatron's tracker names,
    which is written last.
    """
    latest, tracker = Path(folder, "save", "latest"), Path(folder, "save", TRACKER)
    if not tracker.exists():
        latest.unlink(missing_ok=True)
        return 0
    latest.write_text(f"global_step{tracker.read_text().strip()}")
    return int(tracker.read_text())


def lives(name, folder, tree, data, kills):
    """Start the run until it ends, killed `kills` times; [(step it began with, exit codes)] of every start, None for the
    codes of one that ended with this script."""
    file = Path(folder, "lives.json")
    done = json.loads(file.read_text()) if file.exists() else []
    while not done or done[-1][1] is None or any(done[-1][1]):
        number, begun = len(done), saved_step(folder)
        rng, fault = random.Random(f"{name} {number}"), None
        if number < kills:
            # the last life is to train some steps, and those before it to leave some to the next
            wide = layouts.ITERS - begun >= SAVED * (kills - number + 2 * (number > 0))
            step, within = begun + (rng.randint(0, 2 * SAVED - 1) if wide else 0), WITHIN if wide else SOON
            rank = rng.randrange(layouts.LAYOUTS[name].ranks)
            fault = {"rank": rank, "kind": "killed", "step": step, "seconds": rng.random() * within}
        file.write_text(json.dumps([*done, [begun, None]]))
        codes = driver.launch(tree, job(name, folder, tree, data, f"life{number}", fault))
        if fault is None and any(codes):
            raise RuntimeError(f"{folder}/life{number} ended with {codes}, though nobody killed it")
        done.append([begun, codes])
        file.write_text(json.dumps(done))
        print(f"{name}: life {number} began with step {begun}, {fault}, exit codes {codes}", flush=True)
    return done


def brought(folder, begins, ranks):
    """(domain, position) of every sample that was trained on, in order: of each life the steps that a checkpoint kept."""
    parts = [{"delivered": []} for _ in range(ranks)]
    for number, begun in enumerate(begins):
        end = begins[number + 1] if number + 1 < len(begins) else layouts.ITERS
        for rank in range(ranks):
            file = Path(folder, f"life{number}", f"delivered{rank}")
            for line in file.read_text().splitlines() if file.exists() else ():
                if line.endswith("]]]"):  # whole, not torn by the kill
                    step, keys = json.loads(line)
                    parts[rank]["delivered"] += keys if begun <= step < end else []
    return matrix.stream(parts)


def record(folder):
    """The lines of the record, and the steps of probes that were not measured."""
    lines = [json.loads(line) for line in Path(folder, "save", "commute.jsonl").read_text().splitlines()]
    measured = {line["step"] for line in lines if line["event"] == "probe"}
    skipped = {line["step"] for line in lines if line["event"] in ("skip", "decision")} - measured - {0}
    return [{key: value for key, value in line.items() if key != "timing"} for line in lines], skipped


def row(name, folder, tree, data, kills):
    """The row of one layout."""
    ranks, found = layouts.LAYOUTS[name].ranks, []
    for place, times in (("alone", 0), ("killed", kills)):
        here = Path(folder, name, place)
        here.mkdir(parents=True, exist_ok=True)
        done = lives(name, here, tree, data, times)
        last = [
            json.loads((here / f"life{len(done) - 1}" / f"rank{r}.json").read_text()) for r in range(ranks)
        ]
        models = [rank["model"] for rank in last]
        found.append((done, brought(here, [begun for begun, _ in done], ranks), models, *record(here)))
    (_, expected, model, whole, _), (done, drawn, models, lines, skipped) = found
    of_probes = ("probe", "skip", "decision")
    same = [
        [line for line in some if line["event"] not in of_probes or line["step"] not in skipped]
        for some in (whole, lines)
    ]
    return {
        "layout": name,
        "kills": sum(-9 in (codes or ()) for _, codes in done),
        "began_with_step": " ".join(str(begun) for begun, _ in done),
        "probes_skipped": len(skipped),
        "samples_as_undisturbed": drawn == expected and len(drawn) == sum(BUDGETS),
        "budgets_exact": list(lines[-1].get("served", {}).values()) == BUDGETS,
        "model_as_undisturbed": models == model,
        "record_as_undisturbed": same[0] == same[1],
    }


def main(folder, kills):
    _, tree = matrix.trees(folder)
    # in a process of its own, as it imports a megatron that is not the host's
    prepared = f"import sys; sys.path[:0] = {sys.path[:3]!r}; import matrix; matrix.prepare({str(folder)!r})"
    subprocess.run([sys.executable, "-c", prepared], check=True)
    data, found = Path(folder, "data"), []
    driver.preload(tree)
    for name in LAYOUTS:
        found.append(row(name, folder, tree, data, kills // len(LAYOUTS)))
        print(found[-1], flush=True)
        matrix.write(HERE / "random_kills.csv", found)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        place, kills = (*sys.argv[1:], *(scratch, KILLS)[len(sys.argv) - 1 :])[:2]
        main(place, int(kills))
