"""Every compiled kernel against its reference in float64, for all dtypes, odd sizes, machines and numbers of threads."""

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from megatron_commute import ops
from megatron_commute.kernels import compiled as _kernels
from megatron_commute.kernels import reference

pytestmark = pytest.mark.skipif(
    _kernels._cpu is None, reason="the CPU kernels were not built: no C++ compiler"
)
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
SIZES = [(1, 1), (5, 6), (70, 100), (3, 1030), (33, 17)]
MACHINES = {"portable": 0, "avx2": 1, "newest": 2}


def draw(*shapes, seed=0, dtype=torch.float64):
    """Normal numbers that float32 and bfloat16 hold exactly."""
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randn(s, generator=generator, dtype=torch.float32).bfloat16().to(dtype) for s in shapes]
    return found if len(found) > 1 else found[0]


def cases(n, h):
    """name, function, arguments in float64 for every kernel at n rows of h columns."""
    x, dx, gy, dgy = draw((n, h), (n, h), (n, h), (n, h))
    w, dw, b, db = draw((h,), (h,), (h,), (h,), seed=1)
    for kind in ("layer", "rms"):
        bias = (b, db) if kind == "layer" else (None, None)
        yield f"norm_forward {kind}", "norm_forward", (x, dx, w, dw, *bias, 1e-5, kind)
        saved = reference.norm_forward(x, dx, w, dw, *bias, 1e-5, kind)[2]
        yield f"norm_backward {kind}", "norm_backward", (gy, dgy, x, dx, saved, w, dw, kind)
    for kind in ("gelu_tanh", "gelu_erf", "swiglu"):
        wide = h // 2 if kind == "swiglu" else h
        if wide == 0 or (kind == "swiglu" and h % 2):
            continue
        for bias in ((b, db), (None, None)):
            arguments = (3 * x, dx, *bias, kind)
            yield f"activation_forward {kind}", "activation_forward", arguments
            yield (
                f"activation_backward {kind}",
                "activation_backward",
                (gy[:, :wide], dgy[:, :wide], *arguments),
            )
    labels = torch.arange(n) * 7 % (2 * h) + 5
    yield "cross_entropy_statistics", "cross_entropy_statistics", (5 * x, dx, labels, 5)
    statistics = reference.cross_entropy_statistics(5 * x, dx, labels, 5)
    yield "cross_entropy_backward", "cross_entropy_backward", (5 * x, dx, labels, 5, statistics, 1 / n)


def heads(seed=0, b=2, a=4, g=2, s=37, c=24):
    q, dq, go, dgo = draw(*[(b, a, s, c)] * 4, seed=seed)
    k, dk, v, dv = draw(*[(b, g, s, c)] * 4, seed=seed + 1)
    inputs, scale = (q, dq, k, dk, v, dv), c**-0.5
    yield "attention_forward", "attention_forward", (*inputs, scale)
    kept = reference.attention_forward(*inputs, scale)
    yield "attention_backward", "attention_backward", (go, dgo, *inputs, *kept, scale)


def converted(arguments, dtype):
    """Arguments in dtype; saved and statistics in the dtype of the sums."""
    wide = torch.float64 if dtype is torch.float64 else torch.float32

    def one(t):
        if not isinstance(t, torch.Tensor) or t.dtype is torch.int64:
            return t
        kept = (t.dim() == 2 and t.shape[1] in (4, 5)) or (t.dim() == 4 and t.shape[3] == 2)
        return t.to(wide if kept else dtype).contiguous()

    return tuple(one(t) for t in arguments)


def results(found):
    return [t for t in (found if isinstance(found, tuple) else (found,)) if t is not None]


def distance(found, truth):
    """|found - truth| over |truth|, or over 0.1 an element where truth is small."""
    size = max(truth.double().norm().item(), 0.1 * truth.numel() ** 0.5)
    return (found.double() - truth.double()).norm().item() / size if truth.numel() else 0.0


def check(name, function, arguments, dtype):
    given = converted(arguments, dtype)
    exact = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in given]
    truth = results(getattr(reference, function)(*exact))
    plain = results(getattr(reference, function)(*given))
    found = results(getattr(ops, function)(*given))
    assert len(found) == len(truth)
    for i, (f, p, t) in enumerate(zip(found, plain, truth, strict=True)):
        assert f.dtype is p.dtype and f.shape == t.shape, f"{name} result {i}"
        # what plain PyTorch makes in this dtype, twice; float32 sums do not suffer from the dtype of the rows
        rounding = {torch.float64: 1e-13, torch.float32: 5e-7}[
            torch.float32 if f.dtype is torch.bfloat16 else f.dtype
        ]
        limit = 2 * distance(p, t) + rounding
        assert distance(f, t) <= limit, f"{name} result {i}: {distance(f, t):.1e} of {limit:.1e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("machine", MACHINES)
def test_kernels_equal_their_references(dtype, machine):
    assert ops.compiled("cpu", dtype)
    _kernels._cpu.limit_machine(MACHINES[machine])
    try:
        for n, h in SIZES:
            for case in cases(n, h):
                check(*case, dtype)
        for case in heads():
            check(*case, dtype)
    finally:
        _kernels._cpu.limit_machine(MACHINES["newest"])


def test_float32_errors_at_the_sizes_of_a_model():
    for name, function, arguments in cases(256, 2048):
        given = converted(arguments, torch.float32)
        exact = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in given]
        found, truth = (results(getattr(m, function)(*a)) for m, a in ((ops, given), (reference, exact)))
        worst = max(distance(f, t) for f, t in zip(found, truth, strict=True))
        assert worst < 3e-7, f"{name}: {worst:.1e}"


def test_results_do_not_depend_on_the_number_of_threads():
    before = torch.get_num_threads()
    try:
        for name, function, arguments in [*cases(300, 100), *heads()]:
            found = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                found.append(results(getattr(ops, function)(*converted(arguments, torch.float32))))
            for other in found[1:]:
                assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True)), name
    finally:
        torch.set_num_threads(before)


def dual_by_autograd(function, inputs, tangents, along):
    """Outputs, tangents, gradients and their tangents of function along `tangents`, by autograd in float64."""
    step = torch.zeros((), dtype=torch.float64, requires_grad=True)
    at = [x + step * dx for x, dx in zip(inputs, tangents, strict=True)]
    y = function(*at)
    gradients = torch.autograd.grad((y * along).sum(), at, create_graph=True)
    moving = [t + 0 * step for t in (y, *gradients)]
    ones = [torch.ones_like(t, requires_grad=True) for t in (y, *gradients)]
    (rates,) = torch.autograd.grad(moving, step, ones, create_graph=True)
    return y, gradients, torch.autograd.grad(rates, ones)


@pytest.mark.parametrize("kind", ["gelu_tanh", "gelu_erf", "swiglu"])
def test_activations_against_autograd(kind):
    x, dx, gy = draw((6, 8), (6, 8), (6, 4 if kind == "swiglu" else 8))
    approximate = "tanh" if kind == "gelu_tanh" else "none"

    def plain(x):
        if kind == "swiglu":
            return torch.nn.functional.silu(x[:, :4]) * x[:, 4:]
        return torch.nn.functional.gelu(x, approximate=approximate)

    y, (gx,), (dy, dgx) = dual_by_autograd(plain, [x], [dx], gy)
    zero = torch.zeros_like(gy)
    found = (
        *ops.activation_forward(x, dx, None, None, kind),
        *ops.activation_backward(gy, zero, x, dx, None, None, kind),
    )
    for f, t in zip(found[:4], (y, dy, gx, dgx), strict=True):
        assert distance(f, t.detach()) < 1e-13


def test_layer_norm_against_autograd():
    x, dx, gy, w, dw, b, db = draw((6, 8), (6, 8), (6, 8), (8,), (8,), (8,), (8,))

    # written out: jvp of torch's own layer_norm is wrong at second order
    def plain(x, w, b):
        c = x - x.mean(1, True)
        return c * (c.square().mean(1, True) + 1e-5).rsqrt() * w + b

    y, (gx, gw, gb), (dy, dgx, dgw, dgb) = dual_by_autograd(plain, [x, w, b], [dx, dw, db], gy)
    found_y, found_dy, saved = ops.norm_forward(x, dx, w, dw, b, db, 1e-5, "layer")
    back = ops.norm_backward(gy, torch.zeros_like(gy), x, dx, saved, w, dw, "layer")
    for f, t in zip((found_y, found_dy, *back), (y, dy, gx, dgx, gw, dgw, gb, dgb), strict=True):
        assert distance(f, t.detach()) < 1e-13


def test_cross_entropy_against_autograd_over_two_shards():
    logits, dlogits = draw((6, 9), (6, 9))
    labels = torch.tensor([0, 8, 3, 4, 5, 1])

    def plain(logits):
        return torch.nn.functional.cross_entropy(logits, labels)[None]

    y, (g,), (dy, dg) = dual_by_autograd(plain, [logits], [dlogits], torch.ones(1, dtype=torch.float64))
    parts = [
        (t[0].contiguous(), t[1].contiguous())
        for t in ((logits[:, :4], dlogits[:, :4]), (logits[:, 4:], dlogits[:, 4:]))
    ]
    shards = [
        ops.cross_entropy_statistics(*part, labels, first) for part, first in zip(parts, (0, 4), strict=True)
    ]
    statistics = ops.combine_statistics(shards)
    loss, dloss = ops.cross_entropy_loss(statistics, 1 / 6)
    assert distance(loss, y[0].detach()) < 1e-13 and distance(dloss, dy[0].detach()) < 1e-13
    found = [
        ops.cross_entropy_backward(*p, labels, first, statistics, 1 / 6)
        for p, first in zip(parts, (0, 4), strict=True)
    ]
    assert distance(torch.cat([f[0] for f in found], 1), g.detach()) < 1e-13
    assert distance(torch.cat([f[1] for f in found], 1), dg.detach()) < 1e-13


def test_extreme_and_masked_numbers():
    x = torch.tensor([[-1e4, -90.0, -30.0, -9.0, 0.0, 9.0, 90.0, 1e4]])
    one = torch.ones_like(x)
    for kind in ("gelu_tanh", "gelu_erf"):
        y, dy = ops.activation_forward(x, one, None, None, kind)
        truth = reference.activation_forward(x.double(), one.double(), None, None, kind)
        assert torch.isfinite(y).all() and torch.isfinite(dy).all()
        assert torch.allclose(y.double(), truth[0], rtol=1e-6, atol=1e-12)
        assert torch.allclose(dy.double(), truth[1], rtol=1e-6, atol=1e-6)
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


ROOT = Path(__file__).resolve().parents[2]
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
    for name, function, arguments in cases(*size):
        given = converted(arguments, dtype)
        found = [t for t in on_executor(executor, function, given) if t.numel()]
        plain = results(getattr(ops, function)(*given))
        for i, (f, p) in enumerate(zip(found, plain, strict=True)):
            limit = 1e-2 if f.dtype is torch.bfloat16 else 2e-6
            assert distance(f, p.double()) <= limit, f"{name} result {i}: {distance(f, p):.1e}"


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
        assert distance(found, truth) < 1e-6


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
    compile_with(
        *SANITIZERS[kind], *flags, ROOT / "tests" / "kernels_driver.cpp", *sources, "-o", tmp_path / "driver"
    )
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
    compile_with(
        *flags, ROOT / "tests" / "kernels_driver.cpp", tmp_path / "simt.o", "-o", tmp_path / "driver"
    )
    run_driver(tmp_path / "driver")
