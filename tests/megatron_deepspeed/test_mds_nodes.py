"""Megatron-DeepSpeed on two nodes of two ranks, each with a launcher of its own: train, lose a node, start again."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import layouts
import matrix
import pytest
import ranks

STILL = ("--hidden-dropout", "0", "--attention-dropout", "0")
DIES = 13  # checkpoints are written every 5 steps


def surroundings(tree, dies=""):
    path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
    return {
        **os.environ, "PATH": path, "PYTHONPATH": str(matrix.HERE.parent.parent), "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TREE": str(tree), "DIES": dies,
    }  # fmt: skip


def nodes(folder, tree, argv, dies=""):
    (folder / "hosts").write_text("node-0 slots=2\nnode-1 slots=2\n")
    port, words = ranks.free_port(), [matrix.HERE / "launched.py", *argv]
    try:
        return ranks.two_nodes(folder, words, surroundings(tree, dies), port, 300)
    finally:
        for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
            left.unlink()


@pytest.mark.parametrize("name", ["pp2-dp2", "tp2-dp2"])
def test_a_node_dies_and_the_restart_loses_no_sample_and_repeats_none(scratch, tmp_path, name):
    """The uninterrupted run has one rank: the stream is the same in every layout."""
    _, tree = matrix.trees(scratch)
    data = matrix.prepare(scratch)
    shared = ("--commute", data / "fixed.yaml", *STILL)
    save = tmp_path / "save"
    argv = layouts.flags(name, data, save, *shared, "--load", save, "--save-interval", "5")
    (survivor, told), (dead, _) = nodes(tmp_path, tree, argv, dies=f"1 {DIES}")
    assert dead == -signal.SIGKILL and survivor not in (0, None)
    assert "has lost the others (" in told and "a rank or node has ended" in told, told[-6000:]
    assert "resumes from global_step10" in told and "error: the job ended here with status" in told
    job = {"argv": argv}
    assert [line["step"] for line in matrix.record(job) if line["event"] == "probe"] == [4, 8, 12]

    again = nodes(tmp_path, tree, argv)
    assert [status for status, _ in again] == [0, 0], again[0][1][-6000:]
    argv = layouts.flags("single", data, tmp_path / "whole", *shared)
    whole = {"script": f"{tree}/pretrain_gpt.py", "argv": argv, "ranks": 1, "out": str(tmp_path / "out")}
    matrix.run(tmp_path, {"whole": whole})
    both = matrix.record(job), matrix.record(whole)
    for line, expected in zip(*both, strict=True):
        for key in {"event", "step", "sample", "fingerprint", "served", "weights", "lr"} & expected.keys():
            assert line[key] == expected[key], key
    assert both[0][-1]["event"] == "end" and any("fingerprint" in line for line in both[0])


def test_the_launcher_starts_it_and_a_refusal_ends_it(scratch):
    """The deepspeed launcher instead of the driver: one refusal, before a model is built."""
    _, tree = matrix.trees(scratch)
    data = matrix.prepare(scratch)
    argv = layouts.flags("zero1", data, scratch / "refused", "--commute", data / "fixed.yaml", iters=21)
    port = str(ranks.free_port())
    command = [os.path.join(os.path.dirname(sys.executable), "deepspeed"), "--num_gpus", "2"]
    command += ["--master_port", port, str(matrix.HERE / "launched.py"), *argv]
    done = subprocess.run(
        command, cwd=tree, env=surroundings(tree), capture_output=True, text=True, timeout=300
    )
    told = done.stdout + done.stderr
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "budget" in lines[0], told[-6000:]
    assert "building GPT model" not in told
