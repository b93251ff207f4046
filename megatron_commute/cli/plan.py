"""Before a run: `plan` checks a mixture file and shows what would happen."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import click
import numpy as np

from megatron_commute.cli import plan_table
from megatron_commute.cli.words import Refusal, as_json, print_json, table
from megatron_commute.config import Config, ConfigError, Plan, Run, load, probe_cost, resolve
from megatron_commute.settings import memory, rates, schedule

PREFETCH_FACTOR = 2  # micro-batches that each worker of a torch DataLoader holds ready
SIZE = (
    click.option("--seq-length", type=int, required=True, help="Tokens in a sequence."),
    click.option("--global-batch-size", type=int, required=True, help="Sequences in a step."),
    click.option(
        "--micro-batch-size", type=int, required=True, help="Sequences in one forward pass of a rank."
    ),
    click.option("--train-iters", type=int, required=True, help="Steps of the run."),
    click.option("--world-size", type=int, default=1, show_default=True, help="Ranks."),
    click.option(
        "--tensor-model-parallel-size", type=int, default=1, show_default=True, help="Ranks of one model."
    ),
    click.option(
        "--num-workers", type=int, default=2, show_default=True, help="Data loader workers of a rank."
    ),
)


def of_a_run(command: Callable) -> Callable:
    """Adds the flags of a run: its size, and its learning rates with Megatron's names."""
    for flag in reversed(rates.FLAGS):
        kind = click.Choice(flag.choices) if flag.choices else flag.kind
        told = f"{flag.help[0].upper()}{flag.help[1:]}."
        command = click.option(f"--{flag.name}", type=kind, help=told)(command)
    for option in reversed(SIZE):
        command = option(command)
    return command


class Asked(NamedTuple):
    """A mixture file and a run, checked against each other and the data."""

    config: Config
    run: Run
    plan: Plan
    """with the schedule of law flow where that plans it"""
    rates: np.ndarray | None
    """learning rate f64[T] of every step; None where no flag tells them"""
    flow: dict[str, Any] | None
    """what the start line of a run will say of law flow's plan, as JSON values"""


def checked(file: str, flags: dict[str, Any], **other: Any) -> Asked:
    """What the flags `of_a_run` ask. other: settings of the controller in place of the file's own,
    in mode fixed. Raises Refusal.
    """
    from megatron_commute.data.indexed import inspect_data
    from megatron_commute.decide import flow_run, laws
    from megatron_commute.record import log

    try:
        config, run = load(file), _run(flags)
        if other:
            chosen = dataclasses.replace(config.controller, compare=(), **other)
            config = dataclasses.replace(config, mode="fixed", schedule=None, controller=chosen)
        found = resolve(config, run, *inspect_data(config, run.seq_length))
        laws.check(config)
        told = _rates(flags, flow_run.follows(config))
        if not flow_run.follows(config):
            return Asked(config, run, found, told, None)
        told = flow_run.rates_of(config, told.__getitem__, run.train_iters)
        flow = flow_run.planned(config=config, plan=found, run=run, rates=told)
    except ConfigError as error:
        raise Refusal(str(error)) from error
    warnings = (*found.warnings, *flow.schedule.notes)
    found = dataclasses.replace(found, schedule=flow.schedule.changes, warnings=warnings)
    line = log.line("start", {"flow": flow_run.told(flow, run.batches)})
    return Asked(config, run, found, told, line["flow"])


def _run(flags: dict[str, Any]) -> Run:
    ranks, of_one = flags["world_size"], flags["tensor_model_parallel_size"]
    if ranks < 1 or of_one < 1 or ranks % of_one:
        raise ConfigError(
            f"--world-size: {ranks} ranks cannot hold models of {of_one} ranks; "
            "write a multiple of --tensor-model-parallel-size"
        )
    return Run(
        seq_length=flags["seq_length"],
        global_batch=flags["global_batch_size"],
        micro_batch=flags["micro_batch_size"],
        data_parallel=ranks // of_one,
        train_iters=flags["train_iters"],
        prefetched=PREFETCH_FACTOR * max(0, flags["num_workers"]),
    )


def _rates(flags: dict[str, Any], needed: bool) -> np.ndarray | None:
    """Learning rates of every step, None where no flag speaks of them and nothing needs them."""
    if not needed and all(flags[flag.field] is None for flag in rates.FLAGS):
        return None
    try:
        return rates.rates(rates.from_flags(flags))
    except ValueError as error:
        raise ConfigError(str(error)) from error


@click.command()
@click.argument("file", type=click.Path())
@of_a_run
@click.option(
    "--parameters", type=click.IntRange(min=1), help="Parameters of the model, to show bytes of a probe."
)
@click.option(
    "--largest-layer",
    type=click.IntRange(min=1),
    help="Parameters of its largest tensor; default: as in a dense GPT of this size.",
)
@click.option(
    "--out", type=click.Path(file_okay=False), help="Folder for a picture of law flow's schedule, flow.png."
)
@click.option(
    "--table",
    "sizes",
    is_flag=True,
    help="Instead: what a probe holds, sends and would take at 1, 7, 13 and 70 billion parameters.",
)
@as_json
def plan(
    file: str,
    parameters: int | None,
    largest_layer: int | None,
    out: str | None,
    sizes: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Check a mixture file against run and data; show what would happen. Without --out nothing is
    written.
    """
    asked = checked(file, flags)
    config, run, planned = asked.config, asked.run, asked.plan
    if sizes:
        return print_sizes(config, run, len(planned.targets), as_json)
    if out and asked.flow is None:
        raise Refusal(
            f"--out {out}: only law flow's schedule is drawn; write law: flow and mode: fixed or act"
        )
    cost = probe_cost(config, run)
    of_rank = rank_sizes(parameters, largest_layer, flags["tensor_model_parallel_size"])
    held = probe_memory(config, run, *of_rank)
    large = memory.warning({mode: found["bytes"] for mode, found in held.items()}) if parameters else None
    if large:
        planned = dataclasses.replace(planned, warnings=(*planned.warnings, large))
        asked = asked._replace(plan=planned)
    rows = plan_rows(planned)
    files = drawn(asked, out) if out else []
    if as_json:
        print_json(
            {
                "mode": config.mode,
                "samples": planned.samples,
                "lead": planned.lead,
                "domains": rows,
                "targets": planned.targets.tolist(),
                "schedule": [[at, weights.tolist()] for at, weights in planned.schedule],
                "flow": asked.flow,
                "probes": {**cost._asdict(), "measure_budget": config.measure_budget},
                "memory": {"wish": config.probe.memory, "modes": held},
                "warnings": list(planned.warnings),
                "files": files,
            }
        )
        return
    _print_plan(asked, (cost, held, rows))
    click.echo("".join(f"{path}\n" for path in files), nl=False)


def print_sizes(config: Config, run: Run, targets: int, as_json: bool) -> None:
    """The table of large models, in words or as JSON."""
    rows, notes = list(plan_table.rows(config, run, targets)), plan_table.notes(config, run)
    if as_json:
        print_json({"hardware": plan_table.Hardware()._asdict(), "notes": notes, "rows": rows})
        return
    click.echo(table([plan_table.cells(row) for row in rows], plan_table.HEADERS))
    click.echo("".join(f"\n{note}" for note in notes))


def drawn(asked: Asked, out: str, with_page: bool = False) -> list[str]:
    """Draw law flow's plan into the folder `out`; the files written."""
    from megatron_commute.record import lines
    from megatron_commute.report import plots

    start = lines.start(asked.config, asked.plan, asked.run, None) | {"flow": asked.flow}
    return [str(path) for path in plots.planned(start, out, with_page)]


def _print_plan(asked: Asked, found: tuple) -> None:
    """What `plan` says in words. found: cost of probes, probe memory, rows of domains."""
    config, run, planned = asked.config, asked.run, asked.plan
    cost, held, rows = found
    click.echo(table([[_shown(value) for value in row.values()] for row in rows], list(rows[0])))
    law = f", law {config.controller.law}" if config.mode == "act" or asked.flow else ""
    click.echo(f"\nmode: {config.mode}{law}; {planned.samples} samples in {run.train_iters} steps")
    if planned.schedule:
        click.echo("schedule:")
        drawn = planned.names, planned.weights, planned.schedule, planned.samples
        for line in schedule.drawing(*drawn, rates=asked.rates):
            click.echo(f"  {line}")
    if asked.flow:
        ranges = zip(planned.names, asked.flow["ranges"], strict=True)
        click.echo(
            f"flow: ranges {', '.join(f'{name} {reach:+.3g}' for name, reach in ranges)}; memory "
            f"{asked.flow['memory']:g}; the first {asked.flow['kept']} steps at the planned mixture"
        )
    click.echo(f"lead: {planned.lead} samples from a decision to its effect")
    click.echo(
        f"probes: {cost.probes} of {cost.gradients:g} sequence-gradients each ({config.probe.method}, "
        f"{config.probe.samples} sequences per domain), {cost.share:.2%} of training; "
        f"measure_budget {config.measure_budget:.2%}"
    )
    click.echo(f"probe memory: {config.probe.memory}; {memory_words(held)}")
    for warning in planned.warnings:
        click.echo(f"warning: {warning}")


def rank_sizes(parameters: int | None, largest: int | None, ranks: int) -> tuple[float | None, ...]:
    """Parameters of one rank and of its largest layer, of a model on `ranks` ranks; largest: of the
    whole model, None: as in a dense GPT.
    """
    if parameters is None:
        return None, None
    return parameters / ranks, (largest or min(memory.dense_gpt(parameters)[1], parameters)) / ranks


def probe_memory(
    config: Config, run: Run, parameters: float | None, largest: float | None
) -> dict[str, dict[str, Any]]:
    """By mode that probe.memory may mean here: `vectors` of model size on a rank, as a number and
    in `words`, `layers` beside them, and `bytes`, also those in the host's memory, where the
    `parameters` of one rank and of its `largest` layer are known. For parameters in float32; bf16
    and fp16 add one vector.
    """
    probe, ranks = config.probe, run.data_parallel
    demand = memory.Demand(
        domains=len(config.domains),
        method=probe.method,
        metric=probe.metric,
        ranks=ranks,
        low_precision=False,
        offload=probe.offload,
    )
    possible = memory.possible(probe.method, ranks, only_shards=False, any_shards=True)
    if probe.memory != "auto":
        possible = (memory.choose(probe.memory, dict.fromkeys(possible, 0.0)),)
    found = {}
    for mode in possible:
        bytes_of = [None, None]
        if parameters is not None:
            whole, layer = 4 * parameters, 4 * largest
            known = memory.size(mode, demand, whole=whole, largest=layer)
            bytes_of = [round(known), round(memory.host_size(mode, demand, whole))]
        found[mode] = {
            "vectors": memory.vectors(mode, demand),
            "words": memory.formula(mode, demand),
            "layers": memory.layers(mode, demand),
            "bytes": bytes_of[0],
            "host_bytes": bytes_of[1],
        }
    return found


def memory_words(held: dict[str, dict[str, Any]]) -> str:
    """Of `probe_memory`: one clause per mode."""
    clauses = []
    for mode, found in held.items():
        size = "" if found["bytes"] is None else f", {memory.in_units(found['bytes'])} a rank"
        count = f"{found['vectors']:.3g}"
        words = "" if found["words"] == count else f"{found['words']} = "
        layers, host = memory.beside(found["layers"]), memory.offloaded(found["host_bytes"])
        clauses.append(f"{mode} holds {words}{count} vectors of model size{layers}{size}{host}")
    return "; ".join(clauses)


def plan_rows(planned: Plan) -> list[dict[str, Any]]:
    """One row per domain. epochs: of the training sequences, when nothing moves; target: None for
    `each`.
    """
    alone = len(planned.targets) == 1
    return [
        {
            "domain": name,
            "weight": float(planned.weights[k]),
            "budget": planned.budgets[k],
            "sequences": planned.sizes[k],
            "epochs": float(planned.shares[k] * planned.samples / planned.sizes[k]),
            "holdout": planned.holdouts[k],
            "min": float(planned.minimum[k]),
            "max": float(planned.maximum[k]),
            "target": float(planned.targets[0, k]) if alone else None,
        }
        for k, name in enumerate(planned.names)
    ]


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
