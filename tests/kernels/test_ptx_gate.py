"""The gate on compiled CUDA kernels, for the oldest architecture; tests/bench/ptx_gate.py checks all three."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

GATE = Path(__file__).resolve().parents[1] / "bench" / "ptx_gate.py"


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not on PATH: the CUDA kernels are not compiled")
def test_kernels_fit_without_spills_and_read_16_bytes_at_once():
    done = subprocess.run([sys.executable, GATE, "--arch", "80"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "attention_keys_kernel" in done.stdout and "gram_kernel" in done.stdout


def test_the_gate_says_what_it_went_without(tmp_path):
    done = subprocess.run(
        [sys.executable, GATE], capture_output=True, text=True, timeout=60, env={"PATH": str(tmp_path)}
    )
    assert done.returncode == 0 and "nvcc is not on PATH" in done.stdout
