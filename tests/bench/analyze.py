"""What `megatron-commute analyze` costs beside the gradients that it counts: `python tests/bench/analyze.py [32] [600]`.

Writes analyze.csv beside itself, the rows of the numbers of samples named (default: all).

Twelve checkpoints of the quickstart's model (4 layers, width 128, sequence 256, vocabulary 4096) over three domains of
made-up text, analysed in one process. A gradient of one micro-batch is timed between the checkpoints, in the same process;
ratio = time of the whole analysis / (counted gradients x median time of a gradient). Memory: highest resident set of a
process of its own, above what it holds after a first use of everything, for training three steps of the same model under
AdamW and for analysing one checkpoint.
"""

import csv
import gc
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / part) for part in ("tests/support", "")]

import jobs
import ranks

from megatron_commute import config, hvp
from megatron_commute.adapters import megatron_core
from megatron_commute.adapters.one_process import one_process
from megatron_commute.checkpoints import analysis as checkpoints
from megatron_commute.checkpoints.model import LoadedModel
from megatron_commute.checkpoints.readers import read

CHECKPOINTS, EVERY, BATCH, MICRO, SEQUENCE = 12, 2, 8, 4, 256
METHODS = ("difference", "exact", "fused")
DOCUMENTS = {32: 1500, 600: 11000}  # so many that a fifth of them is twice the samples
COLUMNS = ("what", "method", "samples", "checkpoints", "counted", "seconds", "a_gradient", "ratio", "busy",
           "training_mb", "analysis_mb")  # fmt: skip
MODEL = f"""--num-layers 4 --hidden-size 128 --num-attention-heads 4 --seq-length {SEQUENCE} --vocab-size 4096
    --micro-batch-size {MICRO} --hidden-dropout 0 --attention-dropout 0"""


def run(folder, samples):
    """A short run with its checkpoints in folder/run; the mixture file asks for `samples` of a domain."""
    jobs.write_data(folder, DOCUMENTS[samples])
    (folder / "zero1.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    iters = CHECKPOINTS * EVERY if samples == 32 else EVERY
    asked = f"probe: {{samples: {samples}, splits: 4, metric: adam}}"
    path = Path(jobs.write_mixture(folder, mode="fixed", iters=iters, extra=asked))
    text = path.read_text().replace("every: 8", f"every: {iters}")  # no probe while it trains
    path.write_text(text.replace("_train, ", f"_train, holdout: {2 * samples}, "))
    saved = ["--save", folder / "run", "--save-interval", EVERY, "--deepspeed_config", folder / "zero1.json"]
    argv = jobs.flags(folder, *saved, *MODEL.split(), "--commute", path, iters=iters, batch=BATCH)
    ranks.run(jobs.train, 1, [argv], timeout=600)


def timed(folder, samples, method):
    """One row: the whole analysis against its counted gradients."""
    spent, own = [], []
    found = read(sorted((folder / "run").glob("global_step*"))[0])
    with one_process():
        model = LoadedModel(found).probe_model(MICRO, "difference")
        tokens = torch.randint(256, (MICRO, SEQUENCE + 1), generator=torch.Generator().manual_seed(0))
        params = [p.detach() for p in model.parameters()]

    def gradient(times=6):
        with model.quiet("difference"):
            for _ in range(times):
                begun = time.perf_counter()
                hvp.gradient(lambda q: model.loss(q, tokens), params)
                spent.append((time.perf_counter() - begun) / MICRO)

    def say(_):  # between the checkpoints
        begun = time.perf_counter()
        gradient()
        own.append(time.perf_counter() - begun)

    out = folder / f"out_{method}"
    begun = time.perf_counter()
    checkpoints.analyze([folder / "run"], folder / "mixture.yaml", out, checkpoints.Asked(method=method), say)
    whole = time.perf_counter() - begun - sum(own)
    number = len(list((folder / "run").glob("global_step*")))
    counted = number * gradients(folder, method)
    one = statistics.median(spent)
    row = {"what": "time", "method": method, "samples": samples, "checkpoints": number, "counted": counted}
    return {**row, "seconds": whole, "a_gradient": one, "ratio": whole / (counted * one), "busy": busy(spent)}


def busy(spent):
    """Quartile range of a gradient's time over its median: how quiet the machine was."""
    low, middle, high = np.quantile(spent, [0.25, 0.5, 0.75])
    return (high - low) / middle


def gradients(folder, method):
    """Counted gradients of one checkpoint's probe."""
    found = config.load(folder / "mixture.yaml")
    import dataclasses

    found = dataclasses.replace(found, probe=dataclasses.replace(found.probe, method=method))
    return config.probe_cost(found, config.Run(SEQUENCE, BATCH, MICRO, 1, CHECKPOINTS * EVERY)).gradients


def training(folder, told):
    """Bytes at the peak of training, beyond what a process holds that has trained and forgotten a model."""
    first, resident = prepared(folder)
    with one_process():
        loaded = LoadedModel(read(first))
        optimizer = torch.optim.AdamW(loaded.module.parameters(), lr=1e-4)
        tokens = torch.randint(256, (MICRO, SEQUENCE + 1))
        for _ in range(3):
            for _ in range(BATCH // MICRO):
                megatron_core.mean_loss(loaded.module, tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
    told.send(status("VmHWM") - resident)


def analysing(folder, told):
    """Bytes at the peak of analysing one checkpoint, beyond the same."""
    first, resident = prepared(folder)
    wanted = checkpoints.Asked(method="fused")
    checkpoints.analyze([first], folder / "mixture.yaml", folder / "out_memory", wanted, lambda _: None)
    told.send(status("VmHWM") - resident)


def prepared(folder):
    """(the first checkpoint, bytes resident) after everything that loads at its first use was used on two tokens."""
    torch.set_num_threads(1)
    first = min((folder / "run").glob("global_step*"))
    with one_process():
        module = LoadedModel(read(first)).module
        megatron_core.mean_loss(module, torch.randint(256, (1, 3))).backward()
    del module
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    return first, status("VmRSS")


def status(name):
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def in_a_process(work, folder):
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=work, args=(folder, theirs))
    process.start()
    found = mine.recv()
    process.join()
    return found


def measured(samples):
    """The rows of one number of samples, printed as they come."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(folder, samples)
        for method in METHODS if samples == 32 else ("fused",):
            yield timed(folder, samples, method)
        if samples == 32:
            sizes = [in_a_process(work, folder) for work in (training, analysing)]
            row = {"what": "memory", "method": "fused", "samples": samples, "checkpoints": 1}
            row |= {"training_mb": sizes[0] / 1e6, "analysis_mb": sizes[1] / 1e6}
            yield {**row, "ratio": sizes[1] / sizes[0]}


def main(asked):
    """asked: numbers of samples; rows of the others stay in the file."""
    torch.set_num_threads(1)
    path, kept = Path(__file__).with_suffix(".csv"), []
    if path.exists():
        with path.open(encoding="utf-8") as file:
            kept = [row for row in csv.DictReader(file) if int(row["samples"]) not in asked]
    for samples in asked:
        for row in measured(samples):
            kept.append({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})
            print(kept[-1], flush=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]] or list(DOCUMENTS))
