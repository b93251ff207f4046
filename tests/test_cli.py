"""The command line: what it prints, in words and in JSON, and how it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import indexed_files
import numpy as np
import pytest
import records
from commands import invoke

from megatron_commute import __version__, config, doctor
from megatron_commute.cli import main as cli

RUN = "--seq-length 8 --global-batch-size 4 --micro-batch-size 2 --train-iters 100 --world-size 2 --num-workers 1"
MIXTURE = """domains:
  en: {path: en, budget: 300, min: 0.2}
  ru: {path: ru, budget: 100, holdout: held}
mode: act
every: 25
probe: {samples: 16}
controller: {law: tilt}
measure_budget: 0.4
"""


@pytest.fixture
def mixture(tmp_path):
    """A mixture file beside its data: en 2000, ru 80 and held 64 sequences of 8 tokens."""
    for name, sequences in (("en", 2000), ("ru", 80), ("held", 64)):
        indexed_files.write(tmp_path / name, np.arange(8 * sequences + 1))
    path = tmp_path / "mixture.yaml"
    path.write_text(MIXTURE)
    return path


def test_plan_in_json(mixture):
    done = invoke("plan", mixture, *RUN.split(), "--json")
    assert done.exit_code == 0, done.output
    shown = json.loads(done.output)
    en, ru = shown["domains"]
    shown_as = {"domain": "en", "weight": 0.75, "budget": 300, "sequences": 1744, "epochs": 300 / 1744}
    assert en == shown_as | {"holdout": 256, "min": 0.2, "max": 1.0, "target": 0.75}
    assert (ru["sequences"], ru["epochs"], ru["holdout"]) == (80, 1.25, 64)
    assert (shown["samples"], shown["lead"], shown["mode"]) == (400, 16, "act")
    # 2 domains x (2 x 16 + 8) gradients, 3 probes after steps 25, 50, 75, of 400 gradients of training
    assert shown["probes"] == {"probes": 3, "gradients": 88, "share": 0.66, "measure_budget": 0.4}
    assert shown["warnings"] == [
        "domains.ru: its 80 sequences are used 1.25 times",
        "measure_budget: probes cost 66.00% of training, over 40.00%",
    ]


def test_plan_warns_of_probes_that_no_gpu_has_room_for(mixture):
    """7 billion parameters a rank: 2K+4 = 8 vectors, 8/2 and 6/2 of 28 GB each, and three times words of 0.85 GB."""
    words = (*RUN.split(), "--parameters", "7000000000")
    done = invoke("plan", mixture, *words)
    assert "warning: probe.memory: scores needs 86.5 GB a rank, and a GPU of 80 GB has 40 GB" in done.output
    done = invoke("plan", mixture, *words, "--json")
    assert json.loads(done.output)["warnings"][-1].startswith("probe.memory: scores needs 86.5 GB a rank")
    many = RUN.replace("-size 4", "-size 128").replace("world-size 2", "world-size 64").split()
    mixture.write_text(MIXTURE.replace("300", "12700"))
    done = invoke("plan", mixture, *many, "--parameters", "7000000000")
    assert "sharded holds (2K+4)/64 = 0.125 vectors" in done.output and "probe.memory" not in done.output
    assert "3 of the largest layer, 6.05 GB a rank" in done.output
    done = invoke("plan", mixture, *many, "--parameters", "7000000000", "--largest-layer", "1000000000")
    assert "3 of the largest layer, 15.5 GB a rank" in done.output
    mixture.write_text(MIXTURE)
    done = invoke("plan", mixture, *RUN.split(), "--parameters", "7000000")
    assert "warning: probe.memory" not in done.output
    mixture.write_text(MIXTURE.replace("{samples: 16}", "{samples: 16, memory: full}"))
    done = invoke("plan", mixture, *words)
    assert (
        "full needs 224 GB a rank" in done.output and "; write memory: auto, or share it among" in done.output
    )


def test_plan_in_words(mixture):
    before = sorted(mixture.parent.iterdir())
    done = invoke("plan", mixture, *RUN.split())
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0].split() == [
        "domain",
        "weight",
        "budget",
        "sequences",
        "epochs",
        "holdout",
        "min",
        "max",
        "target",
    ]
    assert lines[3].split() == ["ru", "0.25", "100", "80", "1.25", "64", "0", "1", "0.25"]
    assert "mode: act, law tilt; 400 samples in 100 steps" in lines
    assert lines[-1] == "warning: measure_budget: probes cost 66.00% of training, over 40.00%"
    assert sorted(mixture.parent.iterdir()) == before, "plan writes nothing"


def test_plan_with_a_schedule(mixture):
    (mixture.parent / "s.csv").write_text("at,en,ru\n0,1,0\n50%,0.5,0.5\n")
    mixture.write_text(MIXTURE.replace("mode: act", "mode: fixed\nschedule: s.csv").replace(", min: 0.2", ""))
    assert json.loads(invoke("plan", mixture, *RUN.split(), "--json").output)["schedule"] == [
        [0, [1, 0]],
        [200, [0.5, 0.5]],
    ]
    lines = invoke("plan", mixture, *RUN.split()).output.splitlines()
    drawn = lines[lines.index("schedule:") + 1]
    assert drawn.startswith("  en |█") and drawn.endswith("| 300 samples")


@pytest.mark.parametrize(
    ("written", "instead", "run", "message"),
    [
        ("every: 25", "every: 0", "", "mixture.yaml:5: every: got 0; write a positive number of training steps"),
        ("path: ru", "path: rus", "", "mixture.yaml:3: domains.ru.path: FOLDER/rus.idx is missing; prepare the data"),
        ("", "", "--world-size 3 --tensor-model-parallel-size 2", "--world-size: 3 ranks cannot hold models of 2"),
        ("", "", "--train-iters 90", "mixture.yaml:2: domains.en.budget: the budgets sum to 400 sequences, the run"),
    ],
)  # fmt: skip
def test_bad_input_ends_with_status_2_and_one_line(mixture, written, instead, run, message):
    mixture.write_text(MIXTURE.replace(written, instead))
    before = sorted(mixture.parent.iterdir())
    done = invoke("plan", mixture, *RUN.split(), *run.split())
    assert done.exit_code == 2 and done.stdout == ""
    folder = f"{mixture.parent}/"
    assert (
        done.stderr.replace(f"{folder}mixture", "mixture")
        .replace(folder, "FOLDER/")
        .startswith(f"error: {message}")
    )
    assert done.stderr.count("\n") == 1 and sorted(mixture.parent.iterdir()) == before


def test_report(tmp_path):
    records.write(tmp_path, records.lines(K=2, steps=100))
    done = invoke("report", tmp_path, "--json")
    assert done.exit_code == 0, done.output
    path = Path(json.loads(done.output)["report"])
    assert path == tmp_path / "report.html" and path.stat().st_size > 10_000
    done = invoke("report", tmp_path, "--out", tmp_path / "own.html")
    assert done.output == f"{tmp_path}/own.html\n" and (tmp_path / "own.html").is_file()


def test_report_of_nothing(tmp_path):
    done = invoke("report", tmp_path)
    assert done.exit_code == 2 and done.stderr.startswith("error: ") and not list(tmp_path.iterdir())
    assert invoke("report", tmp_path / "none").exit_code == 2


def test_quadratic(tmp_path, monkeypatch):
    from megatron_commute.experiments import quadratic

    asked = []

    def study(out_dir, seeds):
        asked.append((out_dir, seeds))
        return {"text": "a table", "files": [f"{out_dir}/table1.csv"], "table1": [{"ratio": 1.0}]}

    monkeypatch.setattr(quadratic, "study", study)
    assert invoke("quadratic", tmp_path).output == f"a table\n{tmp_path}/table1.csv\n"
    assert json.loads(invoke("quadratic", tmp_path, "--seeds", 7, "--json").output)["table1"] == [
        {"ratio": 1.0}
    ]
    assert asked == [(str(tmp_path), 300), (str(tmp_path), 7)]
    assert invoke("quadratic", tmp_path, "--seeds", 0).exit_code == 2


def test_doctor():
    done = invoke("doctor", "--json")
    shown = json.loads(done.output)
    found = {line["name"]: line for line in shown["findings"]}
    assert shown["works"] and done.exit_code == 0
    assert found["python"]["found"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torch", "accelerator", "compiler", "nvcc", "deepspeed", "deepspeed CPU op"} <= set(found)
    assert {"megatron-core", "Megatron-DeepSpeed", "compiled part", "processor", "ninja"} <= set(found)
    assert all(line["cure"] for line in shown["findings"] if line["state"] != "ok"), (
        "what is amiss has a cure"
    )
    done = invoke("doctor")
    assert done.exit_code == 0 and done.output.rstrip().endswith("ready")


def test_doctor_on_a_poor_machine(monkeypatch, tmp_path):
    def nowhere(name):
        raise doctor.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", nowhere)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("MEGATRON_DEEPSPEED", str(tmp_path))
    operator = tmp_path / "deepspeed_shm_comm" / "deepspeed_shm_comm.so"
    states = {finding.name: finding.state for finding in doctor.examine()}
    assert states["deepspeed"] == states["megatron-core"] == "missing"
    for name in ("compiler", "ninja", "nvcc", "deepspeed CPU op", "Megatron-DeepSpeed", "tokenizers"):
        assert states[name] == "absent", name
    operator.parent.mkdir()
    operator.touch()
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron/training.py").touch()
    states = {finding.name: finding.state for finding in doctor.examine()}
    assert states["deepspeed CPU op"] == states["Megatron-DeepSpeed"] == "ok"
    done = invoke("doctor")
    assert done.exit_code == 1 and done.output.rstrip().endswith("not ready: install what is missing")


@pytest.mark.parametrize("command", sorted(cli.main.commands))
def test_every_command_has_json_and_help(command):
    options = {name for parameter in cli.main.commands[command].params for name in parameter.opts}
    assert "--json" in options
    done = invoke(command, "--help")
    assert done.exit_code == 0 and f"{command} [OPTIONS]" in done.output
    assert all(
        parameter.help for parameter in cli.main.commands[command].params if parameter.opts[0][:2] == "--"
    )


def test_as_a_module():
    command = [sys.executable, "-W", "error", "-m", "megatron_commute", "plan", "none.yaml", *RUN.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(cli.__file__).parents[2])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: none.yaml: cannot be read: No such file or directory; name a mixture file\n"


def test_the_version_is_that_of_the_package():
    assert config.ConfigError.__module__ == "megatron_commute.settings.yaml_checks"
    assert invoke("--version").output.endswith(f"{__version__}\n")
