"""Checkpoints that are already there: the probe of a live run on each of them, and the same kind of
record.

One process holds the whole model in float32, whatever ranks saved it. For a checkpoint of a run
with the plug-in, and the same mixture file, the numbers are those of the live probe at its step. No
checkpoint is ever written to.
"""

import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import torch

from megatron_commute import reduce
from megatron_commute.adapters.one_process import one_process
from megatron_commute.checkpoints import analysis_record, results
from megatron_commute.checkpoints.checkpoint import architecture, learning_rate
from megatron_commute.checkpoints.files import CheckpointError, content, reading, series
from megatron_commute.checkpoints.model import LoadedModel
from megatron_commute.checkpoints.readers import read
from megatron_commute.checkpoints.setting import Asked, asked, extra_flags, setting
from megatron_commute.data.indexed import drawer
from megatron_commute.decide import controller
from megatron_commute.measure import probe
from megatron_commute.mixture import Mixture
from megatron_commute.record import lines as events
from megatron_commute.record import log as record
from megatron_commute.report import plots
from megatron_commute.settings import memory, rates
from megatron_commute.settings.probe_cost import sequences_drawn

__all__ = ["Asked", "CheckpointError", "analyze", "asked"]
NOTHING = controller.Decision(None, "analysed from a checkpoint: nothing was decided")
SAME = (
    "names",
    "budgets",
    "samples",
    "global_batch",
    "seq_length",
    "target",
    "probe",
    "config",
    "parameters",
)


def analyze(paths, data, out, wanted=None, say=print, bar=None):
    """Measure every checkpoint of `paths` that the record in folder `out` does not hold yet, and
    write record, report and tables there.

    paths: checkpoint folders or --save folders; data: the mixture file; say: prints a line; bar:
    (total, unit) -> a progress bar like tqdm's. Returns a dict: files, checkpoints (rows),
    left_out, notes, and the same as text. Raises CheckpointError and ConfigError, naming the cure;
    single checkpoints that cannot be read are left out and told, unless there is no other.
    """
    wanted, out = wanted or Asked(), Path(out)
    extra = extra_flags(wanted)
    todo = series(paths, extra.get("iteration", 0))
    for _, folder in todo:
        if folder.resolve() in (out.resolve(), *out.resolve().parents):
            raise CheckpointError(f"--out {out}: lies in a checkpoint; name another folder")
    out.mkdir(parents=True, exist_ok=True)
    log = record.Record(out / record.NAME)
    lines = analysis_record.reopen(log)
    left_out = []
    with one_process():
        first, asked_for, loaded = _first(todo, data, wanted, extra, left_out, say)
        work = _Work(checkpoint=first, loaded=loaded, setting=asked_for, log=log, say=say)
        lines = work.begin(lines)
        done = {line["step"]: line for line in lines if line["event"] == "probe"}
        for step, folder in todo:
            if step in done:
                _refuse_changed(done[step], folder)
        rest = [
            (step, folder) for step, folder in todo if step not in done and str(folder) not in dict(left_out)
        ]
        if done:
            say(f"{len(done)} checkpoints are in {log.path} already; {len(rest)} to go")
        left_out += work.measure(rest, extra, bar)
    if left_out and not any(line["event"] == "probe" for line in record.read(log.path)):
        raise CheckpointError(f"none of the checkpoints could be analysed: {left_out[0][1]}")
    return _finish(log, asked_for, left_out)


def _first(todo, data, wanted, extra, left_out, say):
    """(the first checkpoint that can be analysed, its Setting, its LoadedModel); those before it go
    to left_out.
    """
    for step, folder in todo:
        try:
            found = read(folder, extra)
            return found, setting(found, data, wanted), LoadedModel(found)
        except CheckpointError as fault:
            if len(todo) == 1:
                raise
            _leave(left_out, step, folder, fault, say)
    raise CheckpointError(f"none of the checkpoints could be read: {left_out[0][1]}")


def _leave(left_out, step, folder, fault, say):
    left_out.append((str(folder), str(fault)))
    say(f"LEFT OUT: {fault}")


class _Work:
    """The model that stands, and the record it is told to."""

    def __init__(self, *, checkpoint, loaded, setting, log, say):
        self.setting, self.log, self.say = setting, log, say
        config, plan, run = setting.config, setting.plan, setting.run
        self.architecture = architecture(checkpoint)
        size = checkpoint.bytes
        self.loaded = loaded
        self.groups = reduce.Groups()
        self.model = self.loaded.probe_model(run.micro_batch, config.probe.method)
        chosen = probe.choose_memory(self.model, self.groups, config.probe, len(plan.names))
        self.settings = dataclasses.replace(config.probe, memory=chosen.mode)
        self.team = reduce.team(self.groups, config.probe.splits)
        self.parameters = sum(p.numel() for p in self.loaded.module.parameters())
        self.draw = drawer(config, plan, run.seq_length, setting.vocabulary)
        self.memory, self.waiting = chosen, checkpoint
        say(memory_words(chosen, size, self.parameters))
        for note in setting.notes:
            say(f"note: {note}")

    def begin(self, lines):
        """Write the start line, or check that the one there is of the same analysis. Returns the
        lines.
        """
        setting = self.setting
        start = record._plain(
            {
                **events.start(setting.config, setting.plan, setting.run, self.parameters),
                "memory": {"mode": self.memory.mode, "bytes": self.memory.bytes},
                "sample": 0,
                "news": [],
                "analysis": {"notes": setting.notes},
            }
        )
        if not lines:
            self.log.append("start", **start)
            return [{"event": "start", **start}]
        for key in SAME:
            if json.loads(json.dumps(start[key])) != lines[0][key]:
                raise CheckpointError(
                    f"--out {self.log.path.parent}: holds an analysis with other settings ({key} was "
                    f"{lines[0][key]}, it is {start[key]}); name another folder"
                )
        return lines

    def measure(self, todo, extra, bar):
        """Probe what is to do; [(folder, why)] of what was left out."""
        left_out, one = [], self._sequences()
        shown = bar(len(todo) * one, "sequence") if bar is not None else None
        for number, (step, folder) in enumerate(todo):
            begun = time.monotonic()
            try:
                found = self._take(folder, extra)
                self._probe(step, folder, found, begun, shown)
            except (CheckpointError, probe.ProbeFailed) as fault:
                if len(todo) == 1 and isinstance(fault, CheckpointError):
                    raise
                _leave(left_out, step, folder, fault, self.say)
            if shown is not None:
                shown.update((number + 1) * one - shown.n)
        if shown is not None:
            shown.close()
        return left_out

    def _take(self, folder, extra):
        found, self.waiting = self.waiting, None
        if found is None or found.folder != str(folder):
            found = read(folder, extra)
        mine = architecture(found)
        for name, value in self.architecture.items():
            if mine[name] != value:
                raise CheckpointError(
                    f"{folder}: {name} is {mine[name]}, it was {value} in the series so far; analyse one "
                    "model"
                )
        self.loaded.load(found)
        if self.settings.metric == "adam" and self.loaded.moments is None:
            raise CheckpointError(
                f"{folder}: holds no second moments of Adam, or in an unknown order; write --metric "
                "identity, or copy the optimiser states too"
            )
        return self.loaded.checkpoint

    def _sequences(self):
        """Sequences that one checkpoint's probe draws, for the progress bar."""
        settings, targets = self.settings, self.setting.plan.targets
        twice = {"difference": 2}.get(settings.method, 1) * (2 if settings.memory == "scores" else 1)
        one = twice * settings.samples * targets.shape[1] * len(targets)
        direction = sequences_drawn(settings)["direction"]
        once = 1 + (
            4 * targets.size if settings.method == "difference" else 0
        )  # a look, and the check of eps
        return one + direction * int((targets > 0).sum()) + direction * targets.shape[1] + once

    def _probe(self, step, folder, found, begun, shown):
        setting, plan = self.setting, self.setting.plan
        sample = step * setting.run.global_batch
        with reading(folder):
            weights = self._weights(found, sample, folder)
            rate = learning_rate(found.arguments)
            decay = float(getattr(found.arguments, "weight_decay", 0.0) or 0.0)
            steps, times = windows(rate, step, setting.config.every, setting.run.train_iters)
        number = first_number(found.commute, step, setting.config.every)
        used = sequences_drawn(self.settings)

        def draw(part, domain, numbers):
            if shown is not None:
                shown.update(len(numbers))
            return self.draw(part, domain, number * used[part] + numbers)

        losses = self._losses(draw, used["direction"])
        measured = probe.measure(
            self.model,
            self.groups,
            self.team,
            draw,
            self.settings,
            targets=plan.targets,
            weights=weights,
            flow=(decay, times),
        )
        self.log.append("valid", step=step, sample=sample, valid=dict(zip(plan.names, losses, strict=True)))
        config = dataclasses.replace(setting.config, probe=self.settings)
        fields = events.probe(config, plan, measured, weights, NOTHING, None)
        fields = record._plain(fields) | {
            "windows": list(times),
            "window_steps": steps,
            "lr": None if rate is None else rate(step),
            "decay": decay,
            "first_number": number,
        }
        fields["improvable"] = results.improvable(
            fields, plan, self.settings.splits, setting.config.controller.confidence
        )
        spent = time.monotonic() - begun
        timing = {"probe_seconds": spent, "step_seconds": None, "overhead": None}
        where = {"checkpoint": {"folder": str(folder), "ranks": found.ranks, "files": content(folder)}}
        self.log.append("probe", step=step, sample=sample, **fields, **where, timing=timing)
        self.say(events.sentence(step, plan.names, measured, weights, NOTHING, None))

    def _losses(self, draw, count):
        """Mean held-out loss f64[K], nats per token, on the sequences of the direction."""
        means, chunk = [], self.model.micro_batch
        params = list(self.model.parameters())
        with torch.no_grad(), self.model.quiet("difference"):
            for k in range(len(self.setting.plan.names)):
                total = 0.0
                for first in range(0, count, chunk):
                    numbers = np.arange(first, min(count, first + chunk))
                    total += float(self.model.loss(params, draw("direction", k, numbers))) * len(numbers)
                means.append(total / count)
        return means

    def _weights(self, found, sample, folder):
        """Weights f64[K] in force after `sample` samples."""
        setting = self.setting
        if found.commute is not None:
            if list(found.commute["ledger"]["names"]) != list(setting.plan.names):
                raise CheckpointError(f"{folder}: its run has other domains; analyse one run at a time")
            weights = np.asarray(Mixture.from_state(found.commute["mixture"]).weights, dtype=np.float64)
            if not weights.sum() > 0:  # the run has ended, every budget is used up: those it was to end on
                weights = np.array(found.commute["mixture"]["wish"], dtype=np.float64)
                weights = weights / weights.sum()
            return weights
        if sample > setting.plan.samples:
            raise CheckpointError(
                f"{folder}: stands at sample {sample}, the run is said to end at {setting.plan.samples}; "
                "write --train-iters"
            )
        stream = setting.fresh.copy()
        stream.skip(min(sample, setting.plan.samples - 1) - stream.index)
        return np.asarray(stream.weights, dtype=np.float64)


def first_number(state, step, every):
    """Probes that a live run has done before the one at `step`: each goes on in the held-out
    sequences where the last one stopped. state: of the plug-in, or None for a run without it.
    """
    return state["probes"] if state is not None else max(0, -(-step // every) - 1)


def windows(rate, step, every, train_iters):
    """(steps, flow times) of the two windows that a decision at `step` weighs against each other;
    one step of flow time 1 each where nothing says the rate.
    """
    if rate is None:
        return 1, (1.0, 1.0)
    return rates.window_steps(step, every, train_iters), rates.flow_times(rate, step, every, train_iters)


def memory_words(held, checkpoint, parameters):
    """One line on the memory of an analysis; held: memory.Memory; checkpoint: bytes of one;
    parameters: their number.
    """
    whole = 4 * parameters + 2 * checkpoint + held.bytes
    model, merging = memory.in_units(4 * parameters), memory.in_units(2 * checkpoint)
    parts = f"model {model}, a checkpoint and its merging {merging}"
    return (
        f"memory: about {memory.in_units(whole)} beside the activations of one micro-batch ({parts}, "
        f"{held.words} of a probe {memory.in_units(held.bytes)}; {held.mode})"
    )


def _refuse_changed(line, folder):
    if line["checkpoint"]["files"] != content(folder):
        raise CheckpointError(
            f"{folder}: is not the checkpoint that was analysed at step {line['step']} before; name another "
            "--out"
        )


def _finish(log, setting, left_out):
    """Report and table from the record; the result of `analyze`."""
    analysis_record.sort(log)
    lines = record.read(log.path)
    names = setting.plan.names
    probes = [line for line in lines if line["event"] == "probe"]
    confidence = setting.config.controller.confidence
    out = log.path.parent
    files = [str(log.path), plots.report(log.path), results.write_table(out / "analysis.csv", probes, names)]
    rows = [results.summary(line, names, setting.config.probe.splits, confidence) for line in probes]
    found = {
        "files": [str(file) for file in files],
        "checkpoints": rows,
        "left_out": [{"checkpoint": folder, "reason": reason} for folder, reason in left_out],
        "notes": setting.notes,
    }
    shown = {"headers": results.headers(confidence), "rows": results.text_rows(rows)}
    return {**found, **shown, "text": [f"LEFT OUT: {reason}" for _, reason in left_out]}
