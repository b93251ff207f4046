"""Two nodes of two ranks on one machine, each with a launcher of its own: train, lose a node, start again."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jobs
import numpy as np
import pytest
import ranks

from megatron_commute.record import log as record

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "launch"))
import hostfile

SCRIPT = ROOT / "launch" / "multi_node.sh"
ITERS, DIES = 20, 13  # the second node dies before this step; checkpoints are written every 5 steps

# the trainer, and on the second node's first life a death of all its processes at once, as of a machine that loses power
TRAINER = f"""
import os, signal, sys
sys.path[:0] = [{str(ROOT / "tests" / "support")!r}, {str(ROOT)!r}]
import jobs
trainer = jobs.trainer()
step_of = trainer.train_step
def train_step(engine, batches, args, step, rank):
    if step == {DIES} and os.environ.get("DIES") == os.environ["CROSS_RANK"]:
        os.killpg(0, signal.SIGKILL)
    return step_of(engine, batches, args, step, rank)
trainer.train_step = train_step
trainer.main()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("two nodes")
    data = tmp_path_factory.mktemp("data")
    jobs.write_data(data)
    mixture = jobs.write_mixture(data, mode="fixed", iters=ITERS, extra="probe: {samples: 16, splits: 4}")
    (path / "trainer.py").write_text(TRAINER)
    (path / "hosts").write_text("# one machine, two names\nnode-0 slots=2\r\nnode-1 slots=2")
    return path, data, mixture


def flags(data, mixture, run, *more):
    fixed = ["--commute", mixture, "--save", run, "--load", run, "--save-interval", 5]
    return jobs.flags(data, *fixed, "--hidden-dropout", 0, "--attention-dropout", 0, *more, iters=ITERS)


def nodes(path, argv, dies=""):
    return ranks.two_nodes(
        path, [path / "trainer.py", *argv], {**os.environ, "DIES": dies}, ranks.free_port(), 400
    )


def test_a_node_dies_and_the_restart_loses_no_sample_and_repeats_none(folder):
    """TP 2 x DP 2. The uninterrupted run has one rank: the stream is the same in every layout."""
    path, data, mixture = folder
    run = path / "run with spaces"
    argv = flags(data, mixture, run, "--tensor-model-parallel-size", 2, "--distributed-timeout-minutes", 5)
    (survivor, told), (dead, _) = nodes(path, argv, dies="1")
    assert dead == -signal.SIGKILL and survivor not in (0, None)
    assert "has lost the others (" in told and "a rank or node has ended" in told, told
    assert "resumes from global_step10" in told and "error: the job ended here with status" in told
    before = record.read(run)
    assert max(line.get("step", 0) for line in before) == 10 and "probe" in [line["event"] for line in before]

    again = nodes(path, argv)
    assert [status for status, _ in again] == [0, 0], again
    whole = path / "whole"
    ranks.run(jobs.train, 1, [flags(data, mixture, whole)], timeout=120)
    for line, expected in zip(record.read(run), record.read(whole), strict=True):
        assert line["event"] == expected["event"]
        for key in {"step", "sample", "fingerprint", "served", "weights", "lr"} & expected.keys():
            assert line[key] == expected[key], key
        for key in {"train", "valid"} & expected.keys():
            same(line[key], expected[key])


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, loss in expected.items():
        assert (found[name] is None) == (loss is None)
        if loss is not None:
            np.testing.assert_allclose(found[name], loss, rtol=1e-4)


REFUSALS = {
    "hostfile is missing": (["--hostfile", "nowhere"], "hostfile.example"),
    "node rank too high": (["--hostfile", "hosts", "--node-rank", "2", "--", "trainer.py"], "write 0 to 1"),
    "a value is missing": (["--hostfile"], "write a value after it"),
    "no script": (["--hostfile", "hosts", "--"], "launch/pretrain_gpt.py"),
    "script is missing": (["--hostfile", "hosts", "--", "nowhere.py"], "no such training script"),
    "bad line": (["--hostfile", "bad", "--", "trainer.py"], "bad:2: 'b 4': write NAME slots=RANKS"),
    "slots that are none": (
        ["--hostfile", "none", "--", "trainer.py"],
        "none:1: 'a slots=0': write NAME slots=RANKS",
    ),
    "an option for ssh": (
        ["--hostfile", "option", "--", "trainer.py"],
        "option:1: '-oProxyCommand=x slots=2': write",
    ),
    "a folder": (["--hostfile", ".", "--", "trainer.py"], "is a folder; name a hostfile"),
    "another encoding": (
        ["--hostfile", "latin", "--", "trainer.py"],
        "latin:1: is not UTF-8 text; save it as UTF-8",
    ),
    "node twice": (["--hostfile", "twice", "--", "trainer.py"], "twice:2: a a second time"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_start_is_refused_with_the_cure(folder, case):
    words, cure = REFUSALS[case]
    (folder[0] / "bad").write_text("a slots=4\nb 4\n")
    (folder[0] / "none").write_text("a slots=0\n")
    (folder[0] / "option").write_text("-oProxyCommand=x slots=2\n")
    (folder[0] / "latin").write_bytes(b"\xe9 slots=2\n")
    (folder[0] / "twice").write_text("a slots=4\na slots=2\n")
    done = subprocess.run(["bash", SCRIPT, *words], cwd=folder[0], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and cure in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_over_ssh_the_variables_travel_in_a_file(folder, tmp_path):
    if shutil.which("deepspeed") is None:
        pytest.skip("the deepspeed command is not on PATH")
    (tmp_path / ".deepspeed_env").write_text("# mine\nNCCL_DEBUG=WARN\n")
    command = ["bash", SCRIPT, "--hostfile", folder[0] / "hosts", "--env", "MINE", "--dry-run", "--"]
    command += [folder[0] / "trainer.py", "--words", "a b"]
    outside = {
        **os.environ, "HOME": str(tmp_path), "MINE": "a b", "NCCL_DEBUG": "INFO", "GLOO_SOCKET_IFNAME": "eth0",
        "DS_ACCELERATOR": "cpu", "SECRET": "stays",
    }  # fmt: skip
    done = subprocess.run(command, env=outside, cwd=tmp_path, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert "--launcher pdsh" in done.stdout and "--words a\\ b" in done.stdout
    assert {"MINE=a b", "GLOO_SOCKET_IFNAME=eth0", "DS_ACCELERATOR=cpu"} <= set(lines)
    assert [line for line in lines if "NCCL_DEBUG" in line][-1] == "NCCL_DEBUG=WARN"  # the user's file wins
    assert "SECRET" not in done.stdout
    outside["MINE"] = "$(boom)"
    done = subprocess.run(command, env=outside, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "does not survive ssh" in done.stderr


def test_shell_scripts_parse_and_the_configurations_name_their_stage():
    for script in (SCRIPT, ROOT / "launch" / "slurm.sbatch"):
        subprocess.run(["bash", "-n", script], check=True)
    for stage in range(4):
        text = (ROOT / "launch" / f"ds_zero{stage}.json").read_text()
        assert f'"stage": {stage}' in text


HOSTFILES = {
    "plain": "node-0 slots=4\nnode-1 slots=2\n",
    "with users": "user@10.0.0.10 slots=2\nuser@10.0.0.11 slots=2\n",
    "comments and blanks": "# nodes\n\n  node-0\tslots=4\n   # end\nnode-1   slots=02\n",
    "behind the slots": "node-0 slots=4 # eight are broken\nnode-1 slots=4 max_slots=8\n",
    "addresses": "fe80::1 slots=1\n[fe80::2] slots=1\nnode.example.org slots=1\n",
    "one without a line end": "node-0 slots=8",
}
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-32")


@pytest.mark.parametrize("name", HOSTFILES)
def test_a_hostfile_is_read_as_deepspeed_reads_it_in_every_encoding(name, tmp_path):
    """Oracle: the parser of DeepSpeed's own launcher, on the text in its own encoding."""
    runner = pytest.importorskip("deepspeed.launcher.runner")
    hosts = runner._parse_hostfile(HOSTFILES[name].splitlines(keepends=True))
    (tmp_path / "trainer.py").write_text("")
    for encoding in ENCODINGS:
        for end in ("\n", "\r\n", "\r"):
            (tmp_path / "hosts").write_bytes(HOSTFILES[name].replace("\n", end).encode(encoding))
            assert list(hostfile.nodes(tmp_path / "hosts").items()) == list(hosts.items()), (encoding, end)
    if shutil.which("deepspeed") is None:
        return
    command = ["bash", SCRIPT, "--hostfile", "hosts", "--dry-run", "--", "trainer.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    first = next(iter(hosts)).rpartition("@")[2]
    assert f"--master_addr {first} " in done.stdout.replace("\\", ""), done.stdout


def test_names_of_variables_are_names_and_run_nothing(folder, tmp_path):
    for name in ("a[$(touch ran)]", "x; touch ran", "9", "A-B", "A=B"):
        command = ["bash", SCRIPT, "--hostfile", folder[0] / "hosts", "--env", name, "--dry-run", "--"]
        command += [folder[0] / "trainer.py"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2 and "is no name of a variable; write" in done.stderr
    (tmp_path / ".deepspeed_env").write_text("a[$(touch ran)]=1\n")
    command[command.index("--env") : command.index("--env") + 2] = []
    if shutil.which("deepspeed") is not None:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2 and "write NAME=VALUE" in done.stderr
    assert not (tmp_path / "ran").exists()
