"""The parts of gpu_kit.py: functions (device) -> rows, the device "cuda", or "cpu" at tiny sizes."""

import contextlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT / "tests" / "support"), str(ROOT)]

import hvp_methods
import jobs
import kernel_cases
import oracles
import overhead
import rop_cases

from megatron_commute import ops, reduce
from megatron_commute.adapters import torch_loop
from megatron_commute.kernels import compiled, reference
from megatron_commute.measure import probe, rop
from megatron_commute.measure.model import Model
from megatron_commute.settings.values import Probe

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZES = {
    "cuda": {
        "operators": ((1, 1), (70, 100), (3, 1032), (512, 1024)),
        "criterion": {"vocabulary": 1024, "width": 128, "heads": 4, "length": 64, "blocks": 4, "inner": 512},
        # vocabulary, width, heads, blocks, length, samples
        "products": {
            "125 million": (50304, 768, 12, 12, 1024, 4),
            "1 billion": (50304, 2048, 16, 18, 1024, 1),
        },
        "rounds": 5,
        # width, heads, blocks
        "model": (1024, 16, 8),
        "proxy": "",
    },
    "cpu": {
        "operators": ((1, 1), (33, 18)),
        "criterion": {"vocabulary": 32, "width": 16, "heads": 4, "length": 8, "blocks": 1, "inner": 24},
        "products": {"41 thousand": (256, 32, 4, 2, 16, 2)},
        "rounds": 3,
        "model": (128, 2, 2),
        "proxy": "hidden=8,steps=20,sequence=8",
    },
}
LIMITS = {"difference": 1e-3, "exact": 1e-4, "fused": 1e-4}  # of P, over max|M|
# names of hvp_methods, with what is counted in gradients
COUNTED = {"central difference": 2, "double backward": 4, "R operator, loss, g and H u": 3}
TINY_MIXTURE = "domains:\n  even: {path: data/even_train, weight: 0.75, budget: 48, holdout: 16}\n" + (
    "  odd: {path: data/odd_train, weight: 0.25, budget: 16, holdout: 16}\n"
    "target: {odd: 1}\nmode: fixed\nevery: 2\nseed: 1234\nmeasure_budget: 0.9\n"
    "probe: {samples: 4, splits: 2, method: fused}\ncontroller: {law: flow}\n"
)


def row(part, what, value, limit=None, least=None):
    """A result: within its limits, or finite where it has none."""
    kept = math.isfinite(value) and (limit is None or value <= limit) and (least is None or value >= least)
    return {"part": part, "what": what, "value": float(value), "limit": limit, "ok": bool(kept)}


def impossible(part, why):
    return {"part": part, "what": why, "value": None, "limit": None, "ok": None}


def limit_of_time(device, counted):
    """Twice what is counted; none on a CPU, whose small sizes are mostly overhead."""
    return 2.0 * counted if device == "cuda" else None


def seconds(device, function):
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    begun = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - begun


def on(device, values):
    """The values with their tensors on the device, those of lists among them too."""
    moved = [on(device, v) if isinstance(v, list) else v for v in values]
    return [v.to(device) if isinstance(v, torch.Tensor) else v for v in moved]


def ended(*command, **environment):
    """What a command of the project prints; RuntimeError with its last line where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)
    if done.returncode:
        raise RuntimeError(f"exit status {done.returncode}: {last_line(done.stdout + done.stderr)}")
    return done.stdout


def last_line(text):
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][-200:] if lines else "no output"


def build(device):
    """Compile the CUDA kernels; on the CPU only say whether its own are there."""
    if device == "cpu":
        there = compiled._cpu is not None
        yield row("build", "CPU kernels" if there else "no CPU kernels, plain torch is measured", there)
        return
    if shutil.which("nvcc") is None:
        yield impossible("build", "nvcc is not on PATH: plain torch takes the place of CUDA kernels")
        return
    install = [sys.executable, "-m", "pip", "install", "-v", "--no-deps", "-e", str(ROOT)]
    told = ended(*install, MEGATRON_COMMUTE_CUDA="1")
    refused = [line.strip() for line in told.splitlines() if "_cuda not compiled" in line]
    files = list((ROOT / "megatron_commute" / "kernels").glob("_cuda*.so"))
    yield row("build", refused[0] if refused else "CUDA kernels", bool(files) and not refused, least=1)


def operators(device):
    """Every operator on the device against its reference in float64."""

    def run(function, given):
        return [t.cpu() for t in kernel_cases.compiled(function, on(device, given))]

    cases = [case for size in SIZES[device]["operators"] for case in kernel_cases.cases(*size)]
    cases += [*kernel_cases.heads(2, 4, 2, 65, 16), *kernel_cases.heads(1, 2, 1, 130, 64)]
    for name, dtype in DTYPES.items():
        worst = dict(vectors(device, dtype))
        for _, function, arguments in cases:
            for error, limit in kernel_cases.errors(function, arguments, dtype, run):
                worst[function] = max(worst.get(function, 0.0), error / limit)
        how = "compiled" if ops.compiled(device, dtype) else "plain torch"
        for function, ratio in worst.items():
            yield row("operators", f"{function}, {name}, {how}: error over its limit", ratio, 1.0)


def vectors(device, dtype):
    """(operator on vectors of model size, error over its limit)."""
    shapes = [(67,), (3, 5), (256,)]
    drawn = [kernel_cases.draw(*shapes, seed=seed, dtype=dtype) for seed in range(10)]
    x, y, minus, metric = drawn[:3], drawn[3:6], drawn[6:9], [t.abs() for t in drawn[9]]
    found = ops.gram(*(on(device, v) for v in (x, y, metric, minus)), 0.3).cpu()
    exact = [[[t.double() for t in vector] for vector in v] for v in (x, y, [metric], minus)]
    truth = reference.gram(exact[0], exact[1], exact[2][0], exact[3], 0.3)
    yield "gram", kernel_cases.distance(found, truth) / (32 * torch.finfo(torch.float32).eps)
    found = ops.displace(on(device, x[0]), on(device, y[0]), 0.01)
    truth = [a + 0.01 * b for a, b in zip(exact[0][0], exact[1][0], strict=True)]
    off = max(kernel_cases.distance(f.cpu(), t) for f, t in zip(found, truth, strict=True))
    yield "displace", off / (2 * torch.finfo(dtype).eps)


def criterion(device):
    """P by every method, at weights of both precisions, against float64 on the CPU."""
    size = SIZES[device]["criterion"]
    stack, shapes = rop_cases.build(rop_cases.GPT2 | {"groups": size["heads"]}, **size)
    for name, dtype in DTYPES.items():
        params = [p.to(dtype) for p in rop_cases.random_vector(stack, shapes, 1, torch.float32, 0.1)]
        truth = of_stack(stack, [p.double() for p in params], "exact", size)
        for method, limit in LIMITS.items():
            found = of_stack(stack, [p.float().to(device) for p in params], method, size)
            off = np.abs(found.P - truth.P).max() / np.abs(truth.M).max()
            yield row("criterion", f"P by {method}, weights {name}: error over max|M|", off, limit)


def of_stack(stack, params, method, size):
    """A probe of a stack of rop_cases, on the device of its parameters."""
    place = params[0].device

    def draw(part, domain, numbers):
        return oracles.sequences(part, domain, numbers, size["vocabulary"], size["length"])

    model = Model(
        parameters=lambda: params,
        loss=lambda at, tokens: rop_cases.loss(stack, tokens.to(place))(at),
        owned=(True,) * len(params),
        decayed=tuple(p.dim() > 1 for p in params),
        metric=lambda name: None,
        quiet=lambda method: contextlib.nullcontext(),
        micro_batch=4,
        fused=lambda at, u, tokens: rop.gradient_and_product(stack, at, u, tokens.to(place)),
    )
    return probed(model, draw, method, "full", 12, 4)


def probed(model, draw, method, memory, samples, splits):
    how = {"samples": samples, "splits": splits, "method": method, "metric": "identity", "memory": memory}
    groups, even = reduce.Groups(), np.full(3, 1 / 3)
    team = reduce.team(groups, splits)
    kind = Probe(**how)
    return probe.measure(model, groups, team, draw, kind, even[None], even, (0.0, (1.0, 1.0)))


def products(device):
    """H u in units of a gradient of the same batch."""
    for name, size in SIZES[device]["products"].items():
        parameters = 12 * size[3] * size[1] ** 2 + size[0] * size[1]
        if device == "cuda":
            torch.cuda.empty_cache()
        if device == "cuda" and torch.cuda.mem_get_info()[0] < 40 * parameters:
            yield impossible("products", f"{name}: less than {40 * parameters / 1e9:.0f} GB are free")
            continue
        case = hvp_methods.Case(*size)
        case.params, case.u, case.tokens = on(device, [case.params, case.u, case.tokens])
        case.inputs, case.labels = case.tokens[:, :-1], case.tokens[:, 1:]
        every = hvp_methods.methods(case)
        functions = {method: every[method] for method in COUNTED}
        functions["R operator, products in bf16"] = lambda case=case: rop.gradient_and_product(
            case.stack, case.params, case.u, case.tokens, dtype=torch.bfloat16
        )
        for method, function in functions.items():
            limit = limit_of_time(device, COUNTED[method]) if method in COUNTED else None
            try:
                found = in_gradients(device, case, function)
            except torch.OutOfMemoryError:
                yield impossible("products", f"{name}, {method}: out of memory")
            else:
                yield row("products", f"{name}, {method}: over a gradient's time", found, limit)


def in_gradients(device, case, function):
    """Median of the time of a call over that of a gradient; both have been run before."""

    def gradient():
        return plain_gradient(case)

    ratios = []
    for turn in range(1 + SIZES[device]["rounds"]):
        ratio = seconds(device, function) / seconds(device, gradient)
        ratios += [ratio] if turn else []
    return statistics.median(ratios)


def plain_gradient(case):
    leaves = [p.detach().requires_grad_(True) for p in case.params]
    return torch.autograd.grad(case.loss(leaves), leaves)


def probe_cost(device):
    """A probe in steps of training, over the count of overhead.py."""
    torch.manual_seed(0)
    module = oracles.GPT(overhead.VOCABULARY, *SIZES[device]["model"], overhead.LENGTH).to(device)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
    samples = 8 if device == "cpu" else 64
    took = {"step": [], "probe": []}
    for turn in range(1 + SIZES[device]["rounds"]):
        step = seconds(device, lambda turn=turn: overhead.step(module, optimizer, turn))
        work = seconds(device, lambda: overhead.measure(module, 2, samples))
        if turn:  # the first prepares kernels and text
            took["step"].append(step)
            took["probe"].append(work)
    counted = overhead.counted(2, samples) / overhead.BATCH
    ratio = statistics.median(took["probe"]) / statistics.median(took["step"]) / counted
    yield row("overhead", "time of a probe over steps counted for it", ratio, limit_of_time(device, 1))


def peak_memory(device):
    """Peak of a probe beside the parameters, over what `plan` states."""
    torch.manual_seed(0)
    module = oracles.GPT(64, *SIZES[device]["model"], 4).to(device)

    def draw(part, domain, numbers):
        return oracles.sequences(part, domain, numbers, 64, 4).to(device)

    parameters = sum(p.numel() for p in module.parameters())
    with tempfile.TemporaryDirectory() as folder:
        told = command_on_data(folder, "plan", "--parameters", str(parameters), "--json")
    stated = {mode: found["bytes"] for mode, found in json.loads(told)["memory"]["modes"].items()}
    for mode, expected in stated.items():
        model = torch_loop.probe_model(module, overhead.loss, 1)

        def work(model=model, mode=mode):
            probed(model, draw, "difference", mode, 2, 2)

        held = peak(device, work, 4 * parameters)
        what = f"peak of a probe, {mode}: over what plan states"
        yield row("memory", what, held / expected, 1.1, least=0.9)


def peak(device, work, parameters):
    """Bytes that a call holds at most beside the parameters."""
    if device == "cpu":
        return hvp_methods.peak(work) - parameters  # which are seen too, under names of their own
    work()  # what libraries keep for good
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - before


def command_on_data(folder, command, *more):
    """A command of megatron-commute on made-up text and a run of 40 steps."""
    jobs.write_data(folder, 600)
    extra = "probe: {memory: auto, method: difference, metric: identity}"
    mixture = jobs.write_mixture(folder, mode="shadow", extra=extra)
    size = "--seq-length 32 --global-batch-size 8 --micro-batch-size 2 --train-iters 40 --lr 1e-3"
    return ended(sys.executable, "-m", "megatron_commute", command, mixture, *size.split(), *more)


def quickstart(device):
    """The quickstart's job to its end, on one GPU and two; its text is Python's own library."""
    cards = torch.cuda.device_count() if device == "cuda" else 0
    for count in (1, 2) if cards else (0,):
        where = f"{count} GPU{'s' * (count > 1)}" if count else "2 CPU ranks"
        if count > cards:
            yield impossible("quickstart", f"{where}: this machine has {cards}")
            continue
        named = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")[:count]
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(named)}
        with tempfile.TemporaryDirectory() as folder:
            events = quickstart_job(Path(folder), visible if count else {"CXX": "none"}, 100 if count else 4)
        yield row(
            "quickstart",
            f"{where}: probes measured before the end line",
            measured_to_the_end(events),
            least=1,
        )


def measured_to_the_end(events):
    """Probes of a record; 0 where it has no end line."""
    return events.count("probe") if events[-1] == "end" else 0


def quickstart_job(folder, environment, steps):
    """The events of the record of a quickstart in a folder, in order."""
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    tiny, words = "CXX" in environment, []
    for name, part in (("even", sources[::2]), ("odd", sources[1::2])):
        text = "\n\n".join(p.read_text(encoding="utf-8", errors="replace") for p in part)
        (folder / f"{name}.txt").write_text(text[: 300_000 if tiny else 1_500_000], encoding="utf-8")
        words += ["--text", f"{name}={folder / name}.txt"]
    place = folder / "job"
    if tiny:
        place.mkdir()
        (place / "mixture.yaml").write_text(TINY_MIXTURE, encoding="utf-8")
    own = {"QUICKSTART_DIR": str(place), "QUICKSTART_ITERS": str(steps)}
    ended("bash", str(ROOT / "launch" / "quickstart.sh"), *words, **own, **environment)
    record = (place / "run" / "commute.jsonl").read_text(encoding="utf-8")
    return [json.loads(line)["event"] for line in record.splitlines()]


def design(device):
    """`design --quick` to its report."""
    with tempfile.TemporaryDirectory() as folder:
        proxy = SIZES[device]["proxy"]
        more = [
            "--quick",
            "--processes",
            "1",
            "--out",
            f"{folder}/out",
            *(["--proxy", proxy] if proxy else []),
        ]
        took = seconds("cpu", lambda: command_on_data(folder, "design", *more))
        there = (Path(folder) / "out" / "report.html").is_file()
    yield row("design", "design --quick wrote its report", there, least=1)
    yield row("design", "design --quick, seconds", took)
