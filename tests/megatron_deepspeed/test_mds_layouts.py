"""Megatron-DeepSpeed itself with the plug-in, layout by layout, against itself without it."""

import os
import subprocess
import sys

import agreement
import layouts
import matrix
import pytest

CLAIMS = [name for name in matrix.COLUMNS if name not in ("layout", "ranks", "flags", "probes")]


@pytest.mark.parametrize("name", layouts.MATRIX)
def test_the_plug_in_watches_feeds_and_resumes(scratch, name):
    row = next(iter(matrix.rows(scratch, [name])))
    assert {claim: row[claim] for claim in CLAIMS} == dict.fromkeys(CLAIMS, True)
    assert row["probes"] == 4


def test_all_layouts_measure_the_same_criterion(scratch):
    wrong = [row for row in agreement.rows(scratch) if not row["within"]]
    assert not wrong


def test_the_launcher_starts_it_and_a_refusal_ends_it_with_status_2(scratch):
    """The deepspeed launcher instead of the driver: one refusal, before a model is built."""
    _, tree = matrix.trees(scratch)
    data = matrix.prepare(scratch)
    argv = layouts.flags(
        "zero1", data, scratch / "refused", "--commute", data / "fixed.yaml", "--train-iters", "21"
    )
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(matrix.HERE.parent.parent)}
    command = [
        os.path.join(os.path.dirname(sys.executable), "deepspeed"),
        "--num_gpus",
        "2",
        f"{tree}/pretrain_gpt.py",
    ]
    done = subprocess.run(
        [*command, *argv], cwd=tree, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode != 0
    assert done.stderr.count("error: ") >= 1 and "budget" in done.stderr
    assert "building GPT model" not in done.stdout
