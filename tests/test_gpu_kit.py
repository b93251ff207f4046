"""The GPU kit on the CPU: fast parts to their rows; a part that fails takes no other along."""

import json
import subprocess
import sys
from pathlib import Path

import gpu_kit
import gpu_parts
import pytest

from megatron_commute import ops

ROOT = Path(__file__).resolve().parents[1]


def test_parts_run_on_the_cpu_and_say_so(tmp_path):
    script = ROOT / "tests" / "bench" / "gpu_kit.py"
    command = [sys.executable, str(script), "--cpu", "--parts", "build,criterion"]
    command += ["--out", str(tmp_path / "made" / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads((tmp_path / "made" / "out.json").read_text(encoding="utf-8"))
    assert told["device"] == "cpu" and "gpus" not in told and set(told["seconds"]) == {"build", "criterion"}
    assert [row["part"] for row in told["rows"]] == ["build"] + 6 * ["criterion"]
    assert all(row["ok"] for row in told["rows"] if row["part"] == "criterion")
    assert len(done.stdout.splitlines()) == 3 + len(told["rows"]) and "GPU" not in done.stdout
    assert done.stdout.startswith("device: cpu\n")


def test_a_part_beyond_its_time_is_survived_and_fails_the_kit(tmp_path, monkeypatch, capsys):
    slow = gpu_kit.PARTS["operators"]._replace(tiny=0.01)
    monkeypatch.setitem(gpu_kit.PARTS, "operators", slow)
    out = tmp_path / "out.json"
    assert gpu_kit.main(["--cpu", "--parts", "operators,build", "--out", str(out)]) == 1
    first, second = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert (first["part"], first["ok"], first["what"]) == (
        "operators",
        False,
        "ended after 0.01 s, its limit",
    )
    assert second["part"] == "build"
    assert "operators  FAILED" in capsys.readouterr().out


def test_the_limits_of_all_parts_are_twenty_minutes():
    assert sum(part.seconds for part in gpu_kit.PARTS.values()) <= 1200


BROKEN = """
import pathlib
pathlib.Path({kept!r}).write_text('{{"part": "p", "what": "before", "value": 1, "limit": 2, "ok": true}}\\n')
raise ValueError("a fault of the device")
"""


def test_rows_before_a_fault_are_kept(tmp_path):
    kept = tmp_path / "rows.jsonl"
    command = [sys.executable, "-c", BROKEN.format(kept=str(kept))]
    (first, fault), _ = gpu_kit.survived("p", command, 60, kept)
    assert first["what"] == "before" and first["ok"] is True
    assert fault["ok"] is False and fault["what"] == "exit status 1: ValueError: a fault of the device"


def test_a_part_without_rows_has_failed(tmp_path):
    ((row,), _) = gpu_kit.survived("p", [sys.executable, "-c", ""], 60, tmp_path / "rows.jsonl")
    assert row["ok"] is False and row["what"] == "exit status 0: no output"


def test_what_is_impossible_here_does_not_fail_the_kit(tmp_path, monkeypatch):
    row = gpu_parts.impossible("build", "no nvcc")
    monkeypatch.setattr(gpu_kit, "survived", lambda *_: ([row], 0.0))
    assert gpu_kit.main(["--cpu", "--parts", "build", "--out", str(tmp_path / "out.json")]) == 0


def test_a_wrong_operator_is_found(monkeypatch):
    right = ops.displace
    monkeypatch.setattr(ops, "displace", lambda *given: [1.001 * t for t in right(*given)])
    monkeypatch.setitem(gpu_parts.SIZES["cpu"], "operators", ((3, 12),))
    rows = list(gpu_parts.operators("cpu"))
    wrong = {row["what"].split(",")[0] for row in rows if not row["ok"]}
    assert wrong == {"displace"} and len(rows) == 20


@pytest.mark.parametrize(
    ("value", "kept"), [(1.1, True), (1.11, False), (0.89, False), (float("nan"), False)]
)
def test_limits_of_a_row(value, kept):
    assert gpu_parts.row("memory", "peak", value, 1.1, least=0.9)["ok"] is kept


@pytest.mark.parametrize(
    ("words", "told"), [(["--cpu", "--parts", "warp"], "choose of build"), ([], "--cpu runs tiny sizes")]
)
def test_what_is_asked_wrongly_is_refused_in_one_line(words, told, capsys, monkeypatch):
    monkeypatch.setattr(gpu_kit.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu_kit.main(words)
    assert told in capsys.readouterr().err
