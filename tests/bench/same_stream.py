"""Does a change of the package change a number? Records of the same jobs before and after it.

    python tests/bench/same_stream.py [--before COMMIT] [--after FOLDER] [--jobs NAME ...]

Exports COMMIT (default: the last one of 0.1.0) and the working tree of FOLDER (default: this
repository, as it lies there), compiles both, and lets launch/pretrain_gpt.py of each train the jobs
below: a GPT of the quickstart's size, three domains of Markov chains, two gloo ranks on CPU. What
both records have must be the same to the last bit, and what EVERY_LINE names must be there; times
and digests are left out, keys that only one side has are listed. Status 1 where anything differs;
the table goes to same_stream.csv. Nothing here imports either package. Eight minutes of CPU time.
"""

import argparse
import csv
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
DOMAINS = {"english": 0.6, "russian": 0.1, "code": 0.3}
VOCABULARY, SEQUENCE, ITERS, BATCH, EVERY = 512, 128, 40, 8, 10

# what every line of an event must have, whole and not null, on both sides
EVERY_LINE = {
    "start": "names weights budgets sizes holdouts samples global_batch seq_length train_iters "
    "mode every lead seed target",
    "loss": "step sample lr train served weights fingerprint",
    "probe": "step sample lr windows M P P_se s s_se u_g h_theta score score_se gap_se weights weights_next "
    "effective_sample target samples method metric",
    "end": "step sample served",
}
LEFT_OUT = {"timing", "config"}  # times and the digest of the mixture file's keys
HEAD = ["job", "mode", "method", "law", "probes", "lines_compared", "numbers_compared", "differences"]
HEAD += ["keys_gone", "keys_new"]

TARGET = {"english": 0.3, "russian": 0.3, "code": 0.4}
LAW = {"law": "tilt", "confidence": 0.5, "cooldown": 0, "rate": 0.1}  # weak evidence moves weights too
GUARDED = {"rate": 0.2, "strength": 2, "freeze": 0.95, "floors": 0.02, "caps": {"english": 0.8}}
GUARDED["compare"] = ["hold", "proportional", "tau-tail", "odm"]
BUDGETS = {
    "english": {"budget": 180},
    "russian": {"budget": 44, "min": 0.05, "holdout": "apart"},
    "code": {"budget": 96, "max": 0.5},
}


def job(mode, method, metric="adam", law=None, **more):
    """Keys of a mixture file; law: of the controller, beside LAW."""
    probe = {"samples": 16, "splits": 4, "method": method, "metric": metric}
    shared = {"every": EVERY, "measure_budget": 1.0, "controller": LAW | (law or {})}
    return {"mode": mode, "probe": probe, **shared, **more}


JOBS = {
    "shadow": job("shadow", "difference"),
    "each": job("shadow", "fused", target="each"),
    "fixed": job("fixed", "exact", "identity", {"law": "schedule"}, schedule="schedule.csv"),
    "act": job("act", "fused"),
    "budgets": job("act", "difference", "adam", GUARDED, domains=BUDGETS, target=TARGET),
}
FLAGS = {"shadow": "--hidden-dropout 0.1", "each": "--tensor-model-parallel-size 2"}  # of the trainer
SCHEDULE = "at,then,english,russian,code\n0,linear,0.8,0.1,0.1\n50%,hold,0.4,0.3,0.3\n75%,hold,0.2,0.2,0.6\n"
CONTROL = {"budgets": "weights: {english: 0.5, russian: 0.2, code: 0.3}\nfrom: 260\ncaps: {code: 0.45}\n"}


def write_domain(prefix, seed, sequences):
    """A .bin/.idx pair in megatron-core's layout: texts of a Markov chain of its own."""
    rng = np.random.default_rng(seed)
    successor, length, documents = rng.permutation(VOCABULARY), 200, sequences * SEQUENCE // 200 + 2
    text = rng.integers(VOCABULARY, size=(documents, length))
    follows = rng.random((documents, length)) < 0.5 + 0.1 * (seed % 4)
    for i in range(1, length):
        text[:, i] = np.where(follows[:, i], successor[text[:, i - 1]], text[:, i])
    Path(f"{prefix}.bin").write_bytes(text.astype("<u2").tobytes())
    head = b"MMIDIDX\x00\x00" + np.array([1], "<u8").tobytes() + b"\x08"  # version 1, tokens of two bytes
    counts, lengths = np.array([documents, documents + 1], "<u8"), np.full(documents, length, "<i4")
    numbers = np.arange(documents + 1, dtype="<i8")
    parts = (counts, lengths, 2 * length * numbers[:-1], numbers)
    Path(f"{prefix}.idx").write_bytes(head + b"".join(part.tobytes() for part in parts))


def write_data(folder):
    """Data and mixture files of all jobs."""
    folder.mkdir()
    for seed, name in enumerate(DOMAINS):
        write_domain(folder / f"{name}_train", seed, 600)
        write_domain(folder / f"{name}_valid", seed + 4, 40)
    write_domain(folder / "apart", 9, 80)
    (folder / "schedule.csv").write_text(SCHEDULE)
    for name, keys in JOBS.items():
        further, domains = keys.get("domains", {}), {}
        for domain, share in DOMAINS.items():
            plain = {"path": f"{domain}_train", "weight": share, "holdout": 80}
            domains[domain] = plain | further.get(domain, {})
        (folder / f"{name}.yaml").write_text(json.dumps({**keys, "domains": domains}))  # JSON is YAML


def command(*words, **how):
    """Output of a command; one that fails ends the comparison with the end of what it said."""
    done = subprocess.run([str(w) for w in words], capture_output=True, **how)
    if done.returncode:
        said = (done.stdout + done.stderr).decode(errors="replace")[-3000:]
        raise SystemExit(f"{said}\nerror: `{' '.join(map(str, words[:6]))} ...` ended with {done.returncode}")
    return done.stdout


def export(commit, folder, before, after):
    """The tree of a commit, and the working tree of a folder as it lies there, without what git ignores."""
    packed = command("git", "-C", ROOT, "archive", commit)
    with tarfile.open(fileobj=io.BytesIO(packed)) as files:
        files.extractall(before, filter="data")
    listed = command("git", "-C", folder, "ls-files", "-co", "--exclude-standard", "-z").decode()
    for name in filter(None, listed.split("\0")):
        if (folder / name).is_file():
            (after / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(folder / name, after / name)


def surroundings(tree):
    fixed = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **fixed, "MEGATRON_COMMUTE_CUDA": "0", "PYTHONPATH": str(tree)}


def build(tree):
    """Compile the tree's libraries; returns their names. Fails where another package would be imported."""
    env = surroundings(tree)
    command(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=tree, env=env)
    code = "import megatron_commute as m; print(m.__file__, end='')"
    found = command(sys.executable, "-c", code, cwd=tree.parent, env=env).decode()
    if not Path(found).resolve().is_relative_to(tree.resolve()):
        raise SystemExit(f"error: {found} is imported instead of {tree}; unset what puts it first")
    return sorted(path.name for path in (tree / "megatron_commute").rglob("*.so"))


def train(tree, name):
    """Train a job with the tree's trainer, beside data/; returns the lines of its record."""
    place, run = tree.parent, f"runs/{tree.name}/{name}"
    (place / run).mkdir(parents=True)
    if name in CONTROL:
        (place / run / "commute.control.yaml").write_text(CONTROL[name])
    flags = f"""
        --num-layers 4 --hidden-size 128 --num-attention-heads 4 --seq-length {SEQUENCE}
        --vocab-size {VOCABULARY} --micro-batch-size 2 --global-batch-size {BATCH} --train-iters {ITERS}
        --lr 1e-3 --min-lr 1e-4 --lr-warmup-iters 0 --weight-decay 0.01 --num-workers 1
        --log-interval 5 --eval-interval 20 --eval-iters 1 --hidden-dropout 0 --attention-dropout 0
        {FLAGS.get(name, "")} --commute data/{name}.yaml --save {run} --data-cache-path {run}/cache"""
    for split in ("train", "valid"):
        blend = [f"{share} data/{domain}_{split}" for domain, share in DOMAINS.items()]
        flags += f" --{split}-data-path {' '.join(blend)}"
    launcher = "-m torch.distributed.run --standalone --local_addr 127.0.0.1 --nproc_per_node 2"
    words = [*launcher.split(), tree / "launch" / "pretrain_gpt.py", *flags.split()]
    command(sys.executable, *words, cwd=place, env=surroundings(tree))
    return [json.loads(line) for line in (place / run / "commute.jsonl").read_text().splitlines()]


def compared(before, after, place, whole=False):
    """Yields (number, word, different, gone or new; place) of every value. whole: no key may go."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys(key for key in (*before, *after) if key not in LEFT_OUT):
            inner, needed = f"{place}.{key}", EVERY_LINE.get(place, "").split()
            if key in before and key in after:
                yield from compared(before[key], after[key], inner, whole or key in needed)
            else:
                side = "gone" if key in before else "new"
                yield ("different", f"{inner}: {side}") if whole else (side, inner)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for number, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from compared(one, other, f"{place}[{number}]", whole)
    elif repr(before) == repr(after):  # one text for each float
        yield ("number" if type(before) in (int, float) else "word"), place
    else:
        yield "different", f"{place}: {str(before)[:60]} became {str(after)[:60]}"


def faults(lines):
    """What a record lacks that the comparison rests on."""
    for number, line in enumerate(lines, 1):
        needed = EVERY_LINE.get(line["event"], "").split()
        if line["event"] == "probe" and line.get("target") != "each":
            needed += ["situation", "laws"]
        for key in needed:
            if key not in line or (line[key] is None and key != "effective_sample"):
                yield f"line {number}, {line['event']}.{key}: missing"
    probes = [line for line in lines if line["event"] == "probe"]
    expected = (ITERS - 1) // EVERY
    if len(probes) != expected or lines[-1]["event"] != "end":
        yield f"{len(probes)} probes, expected {expected} and an end"
    elif lines[0]["mode"] == "act" and all(line.get("effective_sample") is None for line in probes):
        yield "the law moved no weights"


def compare(name, before, after):
    """A row of the table from two records of one job; prints what differs."""
    found = defaultdict(list)
    for side, lines in (("before", before), ("after", after)):
        found["different"] += [f"{side}: {fault}" for fault in faults(lines)]
    if len(before) != len(after):
        found["different"].append(f"{len(before)} lines became {len(after)}")
    for number, (one, other) in enumerate(zip(before, after, strict=False), 1):
        for what, place in compared(one, other, one["event"]):
            found[what].append(f"line {number}, {place}" if what == "different" else place)
    keys, numbers, wrong = JOBS[name], found["number"], found["different"]
    probes = sum(line["event"] == "probe" for line in before)
    row = [
        name,
        keys["mode"],
        keys["probe"]["method"],
        keys["controller"]["law"],
        probes,
        min(len(before), len(after)),
    ]
    row += [len(numbers), len(wrong), *(" ".join(dict.fromkeys(found[side])) for side in ("gone", "new"))]
    told = ", ".join(f"{key} {value}" for key, value in zip(HEAD, row, strict=True) if value != "")
    print("\n    ".join([told, *wrong[:20]]), flush=True)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--before", default="c4cb75c", help="a commit")
    parser.add_argument("--after", default=ROOT, type=Path, help="a working tree")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--out", default=Path(__file__).with_suffix(".csv"), type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        trees = Path(place, "before"), Path(place, "after")
        export(args.before, args.after.resolve(), *trees)
        before, after = (build(tree) for tree in trees)
        if before != after:
            raise SystemExit(f"error: {after} are compiled after, {before} before; repair setup.py")
        print("compiled:", *before or ["nothing"], flush=True)
        write_data(Path(place, "data"))
        rows = [compare(name, *(train(tree, name) for tree in trees)) for name in args.jobs]
    with args.out.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([HEAD, *rows])
    return int(any(row[HEAD.index("differences")] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
