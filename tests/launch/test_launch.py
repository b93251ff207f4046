"""The trainer under the real deepspeed launcher: a run, the finished run started again, and a refusal."""

import os
import subprocess
import sys
from pathlib import Path

import jobs
import pytest
import ranks

from megatron_commute.record import log as record

TRAINER = Path(jobs.__file__).resolve().parents[2] / "launch" / "pretrain_gpt.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("launch")
    jobs.write_data(path)
    jobs.write_mixture(path, iters=20, extra="probe: {samples: 16, splits: 4}")
    return path


def launched(folder, mixture):
    """(exit status, all output) of a job of two ranks."""
    launcher = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "deepspeed.launcher.runner",
        "--num_gpus",
        "2",
        "--master_port",
    ]
    run = ["--commute", folder / mixture, "--save", folder / "run", "--load", folder / "run"]
    command = [*launcher, str(ranks.free_port()), str(TRAINER), *jobs.flags(folder, *run, iters=20)]
    surroundings = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def test_a_run_a_finished_run_and_a_refusal(folder):
    status, output = launched(folder, "mixture.yaml")
    assert status == 0, output
    lines = record.read(folder / "run")
    assert [line["event"] for line in lines].count("probe") == 2 and lines[-1]["event"] == "end"
    assert "ACTING ON AN UNCALIBRATED SIGNAL" in output and "report.html" in output
    assert (folder / "run" / "report.html").stat().st_size > 10_000
    before = (folder / "run" / record.NAME).read_bytes()

    status, output = launched(folder, "mixture.yaml")
    assert status == 0 and "report.html" in output, output
    assert (folder / "run" / record.NAME).read_bytes() == before

    text = (folder / "mixture.yaml").read_text()
    (folder / "broken.yaml").write_text(text.replace("every: 8", "every: 0"))
    status, output = launched(folder, "broken.yaml")
    assert status == 2, output
    assert output.count("error: ") == 1 and "broken.yaml:6: every" in output, output
