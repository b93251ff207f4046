"""Part `record` of study `online`: the whole record and the report of one run whose target changes
half-way, with probes, the losses of training and of held-out text.
"""

import json
import shutil
import tempfile
from pathlib import Path

import torch

from megatron_commute import reduce
from megatron_commute.adapters import torch_loop
from megatron_commute.config import Run
from megatron_commute.decide import control_file
from megatron_commute.experiments.bilingual_trainer import mean_loss, sequence_losses
from megatron_commute.record import log
from megatron_commute.report import plots
from megatron_commute.settings import text_files

LOGGED = 50  # lines of losses of a run
SHOWN = ("flow", "weights")  # pictures kept beside the record


def recorded(run, folder, first, then):
    """Train `run`, an OnlineRun at its beginning, for target `first` and from half of it on for
    `then`; the paths of its record, its report and the pictures, all in `folder`.
    """
    place, batch, steps = Path(folder, "record"), run.settings.batch, run.steps
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    told = run.mixture({first: 1}) | {"probe": {"samples": 64, "splits": 4}, "measure_budget": 1}
    told["controller"] = {"compare": ["hold", "tilt"]}
    text_files.replace(place / "mixture.yaml", json.dumps(told))
    change = {"target": {then: 1}, "from": steps // 2 * batch}
    text_files.replace(place / control_file.NAME, json.dumps(change))
    a_run = Run(run.settings.sequence, batch, batch, 1, steps)
    plugin = torch_loop.Plugin(str(place / "mixture.yaml"), a_run)
    trainer = run.trainer
    parameters = list(trainer.model.parameters())
    moments = lambda: torch_loop.second_moments(trainer.optimizer, parameters)  # noqa: E731
    model = torch_loop.probe_model(trainer.model, mean_loss, batch, moments)
    rate = lambda step: float(run.rates[min(step, steps - 1)])  # noqa: E731
    hook = plugin.attach(
        model, reduce.Groups(), place, rate, run.settings.weight_decay, say=lambda line: None
    )
    every = max(1, steps // LOGGED)
    for step in range(steps):
        hook.begin(step)
        losses, tokens = _step(trainer, hook, rate(step))
        hook.end(losses, tokens)
        if (step + 1) % every == 0:
            read = trainer.losses() if (step + 1) % (5 * every) == 0 else {}
            held = {name: loss for name, loss in read.items() if name in told["domains"]}
            hook.log_losses(step + 1, held or None)
    hook.finish(steps)
    with tempfile.TemporaryDirectory() as pictures:
        plots.export(place, pictures)
        shown = [place / f"{name}.png" for name in SHOWN]
        for path in shown:
            shutil.copy(Path(pictures, path.name), path)
    return [str(path) for path in (place / log.NAME, plots.report(place), *shown)]


def _step(trainer, hook, rate):
    """One step on the samples that the hook has drawn: losses f32[n] and tokens of its sequences in
    their order.
    """
    rows = [
        trainer.text.batch(int(domain), [int(position)], trainer.seed)
        for domain, position in zip(hook.domains, hook.positions, strict=True)
    ]
    tokens = torch.cat(rows)
    for group in trainer.optimizer.param_groups:
        group["lr"] = rate
    trainer.optimizer.zero_grad()
    losses = sequence_losses(trainer.model, tokens.to(trainer.device))
    losses.mean().backward()
    trainer.optimizer.step()
    return losses.detach().cpu().numpy(), tokens.numpy()
