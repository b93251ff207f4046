"""The CUDA kernels, executed thread by thread on the CPU: tests/simt is our executor, this runs it.

Each case compares a kernel with sums in double over odd sizes, in several orders of threads, under AddressSanitizer with
UBSan and under ThreadSanitizer; planted faults show that the executor and the sanitizers notice. Neither a GPU nor nvcc nor
CUDA's headers are needed. What it cannot see is listed in tests/simt/simt.h.
"""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parents[1] / "simt"
FLAGS = ["-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
FLAGS += [f"-I{HERE}", f"-I{HERE / 'headers'}", f"-I{HERE.parent.parent / 'csrc'}"]
KINDS = {
    "plain": [],
    "asan": [
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-fsanitize-sections=simt_shared",
    ],
    "tsan": ["-fsanitize=thread"],
}
CASES = ["bfloat16", "attention_float", "attention_bf16", "attention_columns", "norm_float", "norm_bf16"]
CASES += ["activation_float", "activation_bf16", "cross_entropy_float", "cross_entropy_bf16", "gram"]
UNORDERED = ["+attention_blocks", "+elementwise_blocks", "+gram_blocks"]  # for races between blocks

pytestmark = [
    pytest.mark.skipif(
        platform.machine() != "x86_64", reason="the executor switches stacks in x86-64 assembly"
    ),
    pytest.mark.skipif(
        not shutil.which("g++"), reason="the executor is built with g++, which is not on PATH"
    ),
]


def compile_with(*arguments):
    done = subprocess.run(["g++", *FLAGS, *map(str, arguments)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(kind, order, *names) -> (exit status, stdout + stderr); each kind is built at its first use."""
    folder = tmp_path_factory.mktemp("simt")

    def build(kind):
        # The scheduler is never instrumented itself: it tells the sanitizer of its switches of stacks.
        compile_with(f"-DSIMT_{kind.upper()}", "-c", HERE / "simt.cpp", "-o", folder / f"{kind}.o")
        compile_with(*KINDS[kind], HERE / "main.cpp", folder / f"{kind}.o", "-o", folder / kind)

    def run(kind, order, *names):
        if not (folder / kind).exists():
            build(kind)
        command = [folder / kind, order, "7", *names]
        if kind == "tsan":  # its shadow does not fit beside a heap at a very random address
            command = fixed_addresses() + command
        options = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ | options)
        return done.returncode, done.stdout + done.stderr

    return run


def fixed_addresses():
    prefix = ["setarch", platform.machine(), "-R"]
    if shutil.which("setarch") and subprocess.run([*prefix, "true"], capture_output=True).returncode == 0:
        return prefix
    return []


@pytest.mark.parametrize("order", ["random", "ascending", "descending"])
def test_kernels_agree_with_sums_in_double(run, order):
    status, text = run("plain", order, *CASES)
    assert status == 0 and "ok" in text and "FAIL" not in text, text


@pytest.mark.parametrize("kind, names", [("asan", CASES), ("tsan", CASES), ("tsan", UNORDERED)])
def test_kernels_are_clean_under_sanitizers(run, kind, names):
    status, text = run(kind, "random", *names)
    assert status == 0 and "FAIL" not in text, text


@pytest.mark.parametrize(
    "kind, fault, message",
    [
        ("tsan", "barrier", "data race"),
        ("tsan", "loop_barrier", "data race"),
        ("tsan", "syncwarp", "data race"),
        ("tsan", "blocks", "data race"),
        ("asan", "past_global", "heap-buffer-overflow"),
        ("asan", "past_static", "index 64 out of bounds"),
        ("asan", "past_dynamic", "heap-buffer-overflow"),
        ("asan", "misaligned", "misaligned address"),
        ("plain", "some_arrive", "deadlock: 24 of 64 threads have ended"),
        ("plain", "two_barriers", "divergent barrier"),
        ("plain", "half_mask", "a lane is outside its own mask"),
        ("plain", "outside_mask", "a shuffle reads lane 16 outside its mask"),
    ],
)
def test_planted_faults_are_noticed(run, kind, fault, message):
    status, text = run(kind, "random", "!" + fault)
    assert status != 0 and message in text, text


def test_the_same_kernels_without_the_fault_are_clean(run):
    healthy = ["!barrier_ok", "!loop_barrier_ok", "!syncwarp_ok", "!blocks_ok", "!shared_blocks_ok"]
    for kind in KINDS:
        status, text = run(kind, "random", *healthy)
        assert status == 0 and text.count("result") == len(healthy), text


def test_kernels_touch_the_bytes_counted_on_paper(tmp_path):
    """Every operand is read or written, nothing else is; repeated reads stay within what each kernel states."""
    compile_with("-fsanitize=thread", "-c", HERE / "traffic.cpp", "-o", tmp_path / "traffic.o")
    parts = [tmp_path / "traffic.o", HERE / "traffic_hooks.cpp", HERE / "simt.cpp"]  # without ThreadSanitizer
    compile_with(*parts, "-o", tmp_path / "traffic")
    done = subprocess.run([tmp_path / "traffic"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.count("ok ") == 19, done.stdout + done.stderr
