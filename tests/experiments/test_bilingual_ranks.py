"""The language-model studies on several ranks, in bfloat16, at other sizes, and what they would cost."""

import collections
import csv
import dataclasses
import itertools
import os
import shutil
import subprocess
from pathlib import Path

import jobs
import numpy as np
import pytest
import ranks
import torch

from megatron_commute.design import cells
from megatron_commute.experiments import bilingual, bilingual_cells, bilingual_cost, bilingual_paper
from megatron_commute.experiments.bilingual_trainer import Settings, Text, Trainer, team

ROOT = Path(jobs.__file__).resolve().parents[2]
SMALL = {
    "domains": ("english", "russian"),
    "others": ("code",),
    "layers": 1,
    "hidden": 8,
    "heads": 2,
    "sequence": 16,
    "vocabulary": jobs.VOCABULARY,
    "batch": 10,  # five of each domain: odd for two ranks
    "micro": 4,
    "held": 31,
    "probe": 16,
    "warmup": 2,
}
SIZE = bilingual_paper.Size(starts=(2,), window=2, tail=2, seeds=1, checkpoints=())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    jobs.write_data(folder, documents=40)
    return str(folder)


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """Study paper in one process: (its folder, what it has done)."""
    out, done = tmp_path_factory.mktemp("alone"), collections.Counter()

    def counted(what, function, amount=lambda *args: 1):
        def wrapper(*args):
            done[what] += amount(*args)
            return function(*args)

        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", counted("steps", Trainer.step))
        patch.setattr(Trainer, "losses", counted("readings", Trainer.losses))
        patch.setattr(torch, "save", counted("states", torch.save))
        mean_loss = counted("gradients", bilingual_cells.mean_loss, lambda model, tokens: len(tokens))
        patch.setattr(bilingual_cells, "mean_loss", mean_loss)
        assert bilingual.study("paper", Settings(data=data, **SMALL), out, processes=1, say=print, size=SIZE)
    return out, dict(done)


def cells_of(out):
    """Cells by key, and how many lines hold them."""
    lines = (out / "paper" / "cells.jsonl").read_text().splitlines()
    return cells.read(out / "paper"), len(lines)


def numbers(value):
    """All numbers of a cell in order."""
    if isinstance(value, dict):
        return [x for key in sorted(value) if key != "timing" for x in numbers(value[key])]
    if isinstance(value, list):
        return [x for item in value for x in numbers(item)]
    return [value] if isinstance(value, (int, float)) else []


def changes(size):
    """SMALL and a size as flags of the command line."""
    fields = {**SMALL, **vars(size)}
    words = {k: ",".join(map(str, v)) if isinstance(v, tuple) else v for k, v in fields.items()}
    return [word for name, value in words.items() for word in ("--set", f"{name}={value}")]


def test_two_ranks_fill_what_is_missing_with_the_numbers_of_one(data, alone, tmp_path):
    """Under torchrun, through the script that runs the paper's size: the run `even` is there already, but for two cells."""
    out, whole = tmp_path / "out", alone[0]
    shutil.copytree(whole, out)
    path = out / "paper" / "cells.jsonl"
    kept = [line for line in path.read_text().splitlines() if '"even/' in line]
    path.write_text("\n".join(kept[:-2]) + "\n" + kept[-2][:20])  # killed while it wrote
    for state in (out / "paper" / "states").glob("skewed*"):
        state.unlink()
    launch = (
        f"torchrun --nnodes 1 --nproc-per-node 2 --master-addr 127.0.0.1 --master-port {ranks.free_port()}"
    )
    command = ["bash", ROOT / "launch" / "paper" / "study.sh", "paper", out, "--data", data]
    surroundings = {**os.environ, "LAUNCH": launch, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*command, *changes(SIZE), "--set", "lr=1e-3", "--set", "dtype=float32"],
        env={**surroundings, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (ours, lines), (theirs, _) = cells_of(out), cells_of(whole)
    assert ours.keys() == theirs.keys() and lines == len(ours) + 1  # the torn line
    assert done.stderr.count("skewed/base") == 1
    assert (out / "paper" / "beside_the_paper.csv").stat().st_size
    assert done.stdout.count("excess_losses.csv") == 1
    for key, cell in ours.items():
        found, expected = numbers(cell), numbers(theirs[key])
        # weights of float32 differ by what Adam makes of the order of sums, losses by hundredths if a sample does
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max(), err_msg=key)


def refused(rank, data, out, there):
    """What two ranks are told, each a message or None, and whether a team is made once."""
    settings = Settings(data=data, **SMALL)
    asked = [
        ("end-to-end", settings, None),
        ("paper", settings, 2),
        ("paper", dataclasses.replace(settings, batch=3), None),
        ("paper", dataclasses.replace(settings, lr=1.0), None),
    ]
    told = []
    for name, own, processes in asked:
        with pytest.raises(ValueError) as error:
            bilingual.study(name, own, there if own.lr == 1.0 else out, processes=processes, size=SIZE)
        told.append(str(error.value))
    return told, team(1) is team(1), team(1)[1].size, os.path.exists(out)


def test_what_ranks_cannot_share_is_refused_on_all_of_them(data, alone, tmp_path):
    one, two = ranks.run(refused, 2, data, str(tmp_path / "new"), str(alone[0]))
    assert one == two
    told, once, size, written = one
    assert told[0] == "--study end-to-end: runs in one process; start it without a launcher"
    assert told[1] == "--processes 2: 2 ranks work on every cell together; leave --processes out"
    assert told[2] == (
        "--set batch=3: 1 sequences of a domain for 2 ranks; write at least 4, or start fewer ranks"
    )
    assert "other settings (lr)" in told[3]
    assert (once, size, written) == (True, 2, False)


def test_bfloat16_trains_and_touches_training_alone(data):
    settings = Settings(data=data, **{**SMALL, "layers": 2, "hidden": 16, "lr": 1e-2})
    text = Text(settings)
    plain, half = (Trainer(dataclasses.replace(settings, dtype=d), text) for d in ("float32", "bfloat16"))
    before = plain.losses()
    assert half.losses() == before  # readings are float32
    plain.run([0.5, 0.5], 40)
    half.run([0.5, 0.5], 40)
    after, rounded = plain.losses(), half.losses()
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    for name in settings.domains:
        assert after[name] < before[name] - 0.3
        assert 0 < abs(rounded[name] - after[name]) < 0.1
    with pytest.raises(ValueError, match="dtype=float16: write float32 or bfloat16"):
        Settings(data=data, dtype="float16")


def test_the_estimate_counts_what_a_study_does(data, alone):
    settings = Settings(data=data, **SMALL)
    found = [
        bilingual_cost.work(own, [base, *jobs]) for own, base, jobs in bilingual_paper.parts(settings, SIZE)
    ]
    total = {
        name: sum(getattr(work, name) for work in found)
        for name in ("steps", "readings", "gradients", "states")
    }
    assert total == alone[1]


def test_the_estimate_of_quick_by_hand(tmp_path):
    """A base run of 30 steps; 2 states x 2 seeds x 7 orders of 2 x 5 + 5 steps; 3 states x 2 metrics of 6 targets: 4 splits
    of 16 sequences of 5 domains at two sides, four gradients of one sequence a domain for the error, directions of 8."""
    settings, size = bilingual.asked("paper", "d", ["dtype=bfloat16"], quick=True)
    found = bilingual.estimate("paper", settings, tmp_path, size, tflops=2.0)
    even, skewed, whole = found["rows"]
    assert (even["steps"], even["tokens"]) == (450, 450 * 32 * 32)
    assert even["probe_gradients"] == 6 * (6 * 5 * (2 * 64 + 4) + 4 * 8 * (5 + 2))
    N = 512 * 48 + 32 * 48 + 2 * (12 * 48**2 + 13 * 48) + 2 * 48
    token = 6 * N + 12 * 2 * 48 * 32
    readings = 31 + 2 * 2 * 7 * 2
    assert even["training_flops"] == 450 * 32 * 32 * token
    assert even["reading_flops"] == pytest.approx(readings * 5 * 256 * 32 * token / 3)
    slow = 10 * (even["probe_flops"] + even["reading_flops"])
    assert even["gpu_hours"] == pytest.approx((even["training_flops"] + slow) / 2e12 / 3600)
    assert even["state_gigabytes"] == pytest.approx(4 * 12 * N / 1e9)  # steps 10, 15, 20 and 30
    assert {**even, "run": "skewed"} == skewed and whole["gpu_hours"] == 2 * even["gpu_hours"]
    assert (tmp_path / "paper" / "estimate.csv").read_text().startswith("study,run,cells,steps,tokens,")
    assert "N = 82752 parameters" in found["text"] and "not a measurement" in found["text"]


def test_the_table_of_the_paper_size_is_what_the_command_counts():
    folder = ROOT / "launch" / "paper"
    with open(folder / "estimate.csv", encoding="utf-8") as file:
        kept = [row for row in csv.DictReader(file) if row["run"] == "all"]
    lines = (folder / "README.md").read_text(encoding="utf-8").splitlines()
    flags = [("paper", "seeds=1", "tail=0"), ("paper",)]
    for (name, *more), row in zip(flags, kept, strict=True):
        command = ["bash", folder / "study.sh", name, "out", *(word for m in more for word in ("--set", m))]
        said = subprocess.run(
            command, env={**os.environ, "LAUNCH": "echo"}, capture_output=True, text=True, check=True
        )
        words = said.stdout.split()
        settings, size = bilingual.asked(name, "d", [b for a, b in itertools.pairwise(words) if a == "--set"])
        assert (settings.layers, settings.hidden, settings.batch, settings.sequence) == (12, 768, 512, 1024)
        whole = bilingual_cost.rows(
            bilingual.MODULES[name].parts(settings, size), float(row["assumed_tflops"])
        )[-1]
        assert {key: str(value) for key, value in whole.items()} == {key: row[key] for key in whole}, (
            "the job lists have changed: run launch/paper/estimate.sh and correct the table in launch/paper/README.md"
        )
        stated = next(line for line in lines if f"`{' --set '.join([f'{name} OUT', *more])}`" in line)
        cells = [cell.strip() for cell in stated.split("|")]
        numbers = [f"{whole['steps']:,}".replace(",", " "), f"{whole['tokens']:.1e}".replace("e+", "e")]
        numbers += [f"{whole['training_flops']:.1e}".replace("e+", "e"), f"{whole['gpu_hours']:.0f}"]
        assert cells[3:-1] == [*numbers, f"{whole['longest_cell']:.1f}", f"{whole['state_gigabytes']:.0f} GB"]
