"""Every compiled kernel against its reference in float64, for all dtypes, odd sizes, machines and numbers of threads."""

import ctypes
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import cases, compiled, converted, distance, draw, errors, heads, results

from megatron_commute import ops
from megatron_commute.kernels import compiled as _kernels
from megatron_commute.kernels import reference

pytestmark = pytest.mark.skipif(
    _kernels._cpu is None, reason="the CPU kernels were not built: no C++ compiler"
)
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
SIZES = [(1, 1), (5, 6), (70, 100), (3, 1030), (33, 17)]
# b, a, g, s, c: one row, a tile less one, a full one, one more, odd columns, groups of queries, 128 columns
HEADS = [(1, 2, 1, 1, 16), (2, 2, 2, 63, 20), (1, 2, 1, 64, 32), (1, 4, 2, 65, 16), (1, 3, 1, 130, 64)]
HEADS += [(1, 1, 1, 97, 128)]
MACHINES = {"portable": 0, "avx2": 1, "newest": 2}


def check(name, function, arguments, dtype, run=compiled):
    for i, (error, limit) in enumerate(errors(function, arguments, dtype, run)):
        assert error <= limit, f"{name} result {i}: {error:.1e} of {limit:.1e}"


@pytest.fixture(params=MACHINES)
def machine(request):
    """The instructions of each machine; where they lack, those of the widest there is."""
    _kernels._cpu.limit_machine(MACHINES[request.param])
    yield request.param
    _kernels._cpu.limit_machine(MACHINES["newest"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_equal_their_references(dtype, machine):
    assert ops.compiled("cpu", dtype)
    large = [(256, 2048)] if (dtype, machine) == (torch.float32, "newest") else []
    for size in [*SIZES, *large]:
        for case in cases(*size):
            check(*case, dtype)
    for size in HEADS:
        for case in heads(*size):
            check(*case, dtype)


def test_results_do_not_depend_on_the_number_of_threads():
    before = torch.get_num_threads()
    try:
        for name, function, arguments in [*cases(300, 100), *heads()]:
            found = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                found.append(compiled(function, converted(arguments, torch.float32)))
            for other in found[1:]:
                assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True)), name
    finally:
        torch.set_num_threads(before)


def test_extreme_and_masked_numbers():
    x = torch.tensor([[-1e4, -90.0, -30.0, -9.0, 0.0, 9.0, 90.0, 1e4]])
    one = torch.ones_like(x)
    for kind in ("gelu_tanh", "gelu_erf"):
        y, dy = ops.activation_forward(x, one, None, None, kind)
        truth = reference.activation_forward(x.double(), one.double(), None, None, kind)
        assert torch.isfinite(y).all() and torch.isfinite(dy).all()
        assert torch.allclose(y.double(), truth[0], rtol=4e-6, atol=1e-12)
        assert torch.allclose(dy.double(), truth[1], rtol=4e-6, atol=4e-6)
    logits = torch.tensor([[-float("inf"), 3.0, 1e4, -1e4]])
    statistics = ops.cross_entropy_statistics(logits, torch.ones(1, 4), torch.tensor([2]), 0)
    assert statistics.tolist() == [[1e4, 1.0, 1.0, 1e4, 1.0]]
    g, dg = ops.cross_entropy_backward(logits, torch.ones(1, 4), torch.tensor([2]), 0, statistics, 1.0)
    assert g.tolist() == [[0.0] * 4] and dg.tolist() == [[0.0] * 4]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_in_its_row(dtype):
    for name, function, arguments in cases(3, 40):
        given = list(converted(arguments, dtype))
        place = next(i for i, t in enumerate(given) if isinstance(t, torch.Tensor) and t.dim() == 2)
        given[place] = given[place].clone()
        given[place][1, 2] = float("nan")
        rows = [t for t in results(getattr(ops, function)(*given)) if t.dim() == 2 and t.shape[0] == 3]
        assert any(t[1].isnan().any() for t in rows), name
        assert not any(t[[0, 2]].isnan().any() for t in rows), name


def test_nan_of_a_query_stays_in_its_row(machine):
    ((_, function, given), _) = heads(1, 1, 1, 100, 16)
    given = converted(given, torch.float32)
    clean, given[0][0, 0, 70, 3] = compiled(function, given), torch.nan
    rest = torch.arange(100) != 70
    for found, before in zip(compiled(function, given), clean, strict=True):
        assert torch.isnan(found[0, 0, 70]).all()
        assert torch.equal(found[0, 0, rest], before[0, 0, rest])


def test_large_scores_do_not_overflow(machine):
    """Scores of some hundreds, which exp cannot hold."""
    (_, _, (q, *inputs, scale)), (_, _, (go, dgo, *_)) = heads(1, 1, 1, 70, 32)
    inputs = 30 * q, *inputs
    check("forward", "attention_forward", (*inputs, scale), torch.float32)
    kept = reference.attention_forward(*inputs, scale)
    check("backward", "attention_backward", (go, dgo, *inputs, *kept, scale), torch.float32)


# 4096 x 4096 scores of one head take 64 MiB; the allowance beyond what is mapped already is 48 MiB.
LEAN = """
import contextlib, resource, sys, torch
from megatron_commute import ops
torch.set_num_threads(1)
x = [torch.randn(1, 1, 4096, 16) for _ in range(8)]
small = [t[:, :, :32].contiguous() for t in x]
def both(x):
    o, do, saved = ops.attention_forward(*x[:6], 0.25)
    return ops.attention_backward(*x[6:], *x[:6], o, do, saved, 0.25)
both(small)
with ops.references():
    both(small)
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (48 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
both(x)
print("tiled")
with ops.references():
    both(x)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is Linux's")
def test_memory_of_attention_is_linear_in_the_sequence():
    """The tiles pass where the reference, which materialises the scores, then runs out of memory."""
    done = subprocess.run([sys.executable, "-c", LEAN], capture_output=True, text=True, timeout=300)
    assert done.stdout == "tiled\n" and done.returncode == 1 and "memory" in done.stderr, done.stderr


HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not on PATH")


def compile_with(*arguments):
    done = subprocess.run(
        ["g++", "-std=c++17", *map(str, arguments)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def executor(tmp_path_factory):
    """The launchers of csrc/launch.cu compiled for tests/simt: every CUDA thread runs on the CPU."""
    library = tmp_path_factory.mktemp("simt") / "launch.so"
    simt = ROOT / "tests" / "simt"
    folders = [f"-I{simt}", f"-I{simt / 'headers'}", f"-I{ROOT / 'csrc'}"]
    flags = ["-O1", "-Wno-unknown-pragmas", "-DCOMMUTE_SIMT", "-fPIC", "-shared", "-x", "c++"]
    compile_with(*flags, *folders, ROOT / "csrc" / "launch.cu", simt / "simt.cpp", "-o", library)
    return ctypes.CDLL(str(library))


def on_executor(library, function, arguments):
    kernel = _kernels._KERNELS[function]
    found, numbers, pointers = kernel.prepare(arguments)
    scratch = torch.full((kernel.scratch(*arguments),), 255, dtype=torch.uint8)  # NaN
    _kernels._call(library, function, numbers, [*pointers, scratch.data_ptr()], 0)
    return found


on_x86 = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="the executor switches stacks in x86-64 assembly"
)


@needs_compiler
@on_x86
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(1, 1), (3, 6), (70, 24), (2, 1032), (66, 17)], ids=str)
def test_cuda_launchers_thread_by_thread(executor, size, dtype):
    def run(function, given):
        return [t for t in on_executor(executor, function, given) if t.numel()]

    for case in cases(*size):
        check(*case, dtype, run)


def gram_on_executor(library, x, y, metric, minus, eps):
    rows = [*x, *y, *([] if metric is None else [metric]), *(minus or [])]
    codes = [[_kernels._CODES[t.dtype] for t in row] for row in rows]
    addresses = torch.tensor([[t.data_ptr() for t in row] for row in rows])
    sizes, K, M = torch.tensor([t.numel() for t in x[0]]), len(x), len(y)
    dtypes = torch.tensor(codes, dtype=torch.int32)
    out = torch.full((K, M), torch.nan, dtype=torch.float64)
    scratch = torch.full((256, K, M), torch.nan, dtype=torch.float64)
    tables = [ctypes.c_void_p(t.data_ptr()) for t in (addresses, dtypes, sizes)]
    numbers = [ctypes.c_int64(i) for i in (len(x[0]), K, M, metric is not None)]
    ends = [ctypes.c_void_p(t.data_ptr()) for t in (out, scratch)]
    assert library.gram(*tables, *numbers, ctypes.c_double(eps or 0.0), *ends, ctypes.c_void_p(0)) == 0
    return out


@needs_compiler
@on_x86
@pytest.mark.parametrize("counts", [(1, 1), (3, 5), (8, 8), (33, 64)], ids=str)
def test_cuda_gram_thread_by_thread(executor, counts):
    shapes = [(67,), (3, 5), (0,), (256,)]
    x, y, minus = (
        [draw(*shapes, seed=50 * i + k, dtype=torch.float32) for k in range(n)]
        for i, n in enumerate((*counts, counts[0]))
    )
    y[0] = [t.bfloat16() for t in y[0]]
    metric = [t.abs() for t in draw(*shapes, seed=99, dtype=torch.float32)]
    for arguments in ((None, None, None), (metric, minus, 0.3)):
        found, truth = gram_on_executor(executor, x, y, *arguments), reference.gram(x, y, *arguments)
        assert distance(found, truth) < 32 * torch.finfo(torch.float32).eps  # blocks add up in float32


SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fopenmp"],
    # libgomp is not instrumented and raises false alarms: threads of the standard library take its place
    "thread": ["-fsanitize=thread", "-DCOMMUTE_STD_THREAD", "-pthread", "-fopenmp-simd"],
}


def run_driver(program, prefix=()):
    environment = {
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "halt_on_error=1",
        "PATH": "/usr/bin:/bin",
    }
    done = subprocess.run([*prefix, program], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


@needs_compiler
@pytest.mark.parametrize("kind", SANITIZERS)
def test_cpu_kernels_are_clean_under_sanitizers(tmp_path, kind):
    sources = [
        ROOT / "csrc" / f"{name}.cpp" for name in ("norm", "activation", "cross_entropy", "gram", "displace")
    ]
    flags = ["-O1", "-g1", "-Wno-psabi", "-DCOMMUTE_ONE_MACHINE", f"-I{ROOT / 'csrc'}"]
    compile_with(*SANITIZERS[kind], *flags, HERE / "kernels_driver.cpp", *sources, "-o", tmp_path / "driver")
    # the shadow of ThreadSanitizer does not fit beside a heap at a very random address
    fixed = ["setarch", platform.machine(), "-R"] if kind == "thread" and shutil.which("setarch") else []
    run_driver(tmp_path / "driver", fixed)


@needs_compiler
@on_x86
def test_cuda_launchers_are_clean_under_sanitizers(tmp_path):
    simt = ROOT / "tests" / "simt"
    folders = [f"-I{simt}", f"-I{simt / 'headers'}", f"-I{ROOT / 'csrc'}"]
    compile_with("-DSIMT_ASAN", "-O1", "-c", *folders, simt / "simt.cpp", "-o", tmp_path / "simt.o")
    flags = ["-O1", "-g1", "-Wno-unknown-pragmas", "-DCOMMUTE_SIMT", *SANITIZERS["address"][:2], *folders]
    compile_with(*flags, HERE / "kernels_driver.cpp", tmp_path / "simt.o", "-o", tmp_path / "driver")
    run_driver(tmp_path / "driver")
