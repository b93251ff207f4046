"""The command line: parses, then calls one function. Bad input ends with exit status 2."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from megatron_commute import __version__
from megatron_commute.config import Config, ConfigError, Plan, Run, load, probe_cost, resolve
from megatron_commute.settings import memory
from megatron_commute.settings.schedule import drawing

PREFETCH_FACTOR = 2  # micro-batches that each worker of a torch DataLoader holds ready


class _Refusal(click.ClickException):
    """Bad input: one line on stderr, exit status 2."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once a node, as files may be missing on one of them
            click.echo(f"error: {self.message}", err=True)


as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def _table(rows: list[list[Any]], headers: list[str]) -> str:
    from tabulate import tabulate

    return tabulate(rows, headers=headers, disable_numparse=True)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="megatron-commute")
def main() -> None:
    """Decide when each data domain is used while a language model is pretrained."""


@main.command()
@click.argument("file", type=click.Path())
@click.option("--seq-length", type=int, required=True, help="Tokens in a sequence.")
@click.option("--global-batch-size", type=int, required=True, help="Sequences in a step.")
@click.option("--micro-batch-size", type=int, required=True, help="Sequences in one forward pass of a rank.")
@click.option("--train-iters", type=int, required=True, help="Steps of the run.")
@click.option("--world-size", type=int, default=1, show_default=True, help="Ranks.")
@click.option(
    "--tensor-model-parallel-size", type=int, default=1, show_default=True, help="Ranks of one model."
)
@click.option("--num-workers", type=int, default=2, show_default=True, help="Data loader workers of a rank.")
@click.option(
    "--parameters", type=click.IntRange(min=1), help="Parameters of the model, to show bytes of a probe."
)
@as_json
def plan(
    file: str,
    seq_length: int,
    global_batch_size: int,
    micro_batch_size: int,
    train_iters: int,
    world_size: int,
    tensor_model_parallel_size: int,
    num_workers: int,
    parameters: int | None,
    as_json: bool,
) -> None:
    """Check a mixture file against run and data; show what would happen. Nothing is written."""
    from megatron_commute.data.indexed import inspect_data
    from megatron_commute.decide import laws

    try:
        if world_size < 1 or tensor_model_parallel_size < 1 or world_size % tensor_model_parallel_size:
            raise ConfigError(
                f"--world-size: {world_size} ranks cannot hold models of {tensor_model_parallel_size} ranks; "
                "write a multiple of --tensor-model-parallel-size"
            )
        config = load(file)
        run = Run(
            seq_length=seq_length,
            global_batch=global_batch_size,
            micro_batch=micro_batch_size,
            data_parallel=world_size // tensor_model_parallel_size,
            train_iters=train_iters,
            prefetched=PREFETCH_FACTOR * max(0, num_workers),
        )
        planned = resolve(config, run, *inspect_data(config, seq_length))
        laws.check(config)
    except ConfigError as error:
        raise _Refusal(str(error)) from error
    cost = probe_cost(config, run)
    held = probe_memory(config, run, parameters and parameters / tensor_model_parallel_size)
    rows = plan_rows(planned)
    if as_json:
        _print_json(
            {
                "mode": config.mode,
                "samples": planned.samples,
                "lead": planned.lead,
                "domains": rows,
                "targets": planned.targets.tolist(),
                "schedule": [[at, weights.tolist()] for at, weights in planned.schedule],
                "probes": {**cost._asdict(), "measure_budget": config.measure_budget},
                "memory": {"wish": config.probe.memory, "modes": held},
                "warnings": list(planned.warnings),
            }
        )
        return
    _print_plan(config, run, planned, (cost, held, rows))


def _print_plan(config: Config, run: Run, planned: Plan, found: tuple) -> None:
    """What `plan` says in words. found: cost of probes, probe memory, rows of domains."""
    cost, held, rows = found
    click.echo(_table([[_shown(value) for value in row.values()] for row in rows], list(rows[0])))
    law = f", law {config.controller.law}" if config.mode == "act" else ""
    click.echo(f"\nmode: {config.mode}{law}; {planned.samples} samples in {run.train_iters} steps")
    if planned.schedule:
        click.echo("schedule:")
        for line in drawing(planned.names, planned.weights, planned.schedule, planned.samples):
            click.echo(f"  {line}")
    click.echo(f"lead: {planned.lead} samples from a decision to its effect")
    click.echo(
        f"probes: {cost.probes} of {cost.gradients:g} sequence-gradients each ({config.probe.method}, "
        f"{config.probe.samples} sequences per domain), {cost.share:.2%} of training; "
        f"measure_budget {config.measure_budget:.2%}"
    )
    click.echo(f"probe memory: {config.probe.memory}; {memory_words(held)}")
    for warning in planned.warnings:
        click.echo(f"warning: {warning}")


def probe_memory(config: Config, run: Run, parameters: float | None) -> dict[str, dict[str, Any]]:
    """By mode that probe.memory may mean here: `vectors` of model size on a rank, as a number and in `words`, and their
    `bytes` where the `parameters` of one rank are known. For parameters in float32; bf16 and fp16 add one vector.
    """
    probe, ranks = config.probe, run.data_parallel
    shape = (len(config.domains), probe.method, probe.metric, ranks, False)
    modes = memory.MODES if probe.memory == "auto" else (memory.choose(probe.memory, {}, 0, ranks),)
    found = {}
    for mode in modes:
        if mode == "sharded" and ranks == 1:
            continue  # nothing to share
        count = memory.vectors(mode, *shape)
        size = None if parameters is None else round(4 * parameters * count)
        found[mode] = {"vectors": count, "words": memory.formula(mode, *shape), "bytes": size}
    return found


def memory_words(held: dict[str, dict[str, Any]]) -> str:
    """Of `probe_memory`: one clause per mode."""
    clauses = []
    for mode, found in held.items():
        size = "" if found["bytes"] is None else f", {memory.in_units(found['bytes'])} a rank"
        count = f"{found['vectors']:.3g}"
        words = "" if found["words"] == count else f"{found['words']} = "
        clauses.append(f"{mode} holds {words}{count} vectors of model size{size}")
    return "; ".join(clauses)


def plan_rows(planned: Plan) -> list[dict[str, Any]]:
    """One row per domain. epochs: of the training sequences, when nothing moves; target: None for `each`."""
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


@main.command()
@click.argument("run", type=click.Path(exists=True))
@click.option("--out", type=click.Path(), help="The file to write; default report.html beside the record.")
@click.option(
    "--export",
    "export_dir",
    type=click.Path(file_okay=False),
    help="Also write every picture as PNG and SVG and every series as CSV into this folder.",
)
@as_json
def report(run: str, out: str | None, export_dir: str | None, as_json: bool) -> None:
    """Draw the report of a run from its record (a file or the folder that holds it)."""
    from megatron_commute.report import plots

    try:
        path = Path(plots.report(run, out))
        if export_dir:
            plots.export(run, export_dir)
    except (FileNotFoundError, ValueError) as error:
        raise _Refusal(str(error)) from error
    if as_json:
        _print_json({"report": str(path)})
    else:
        click.echo(str(path))


@main.command()
@click.argument("record", type=click.Path(exists=True))
@click.option("--law", help="The law that decides; default the one that ran.")
@click.option(
    "--guard",
    "guards",
    multiple=True,
    metavar="NAME=VALUE",
    help="Another guardrail, such as rate=0.1; repeat it.",
)
@click.option("--out", type=click.Path(dir_okay=False), help="Draw it beside what happened, as PNG or SVG.")
@as_json
def replay(record: str, law: str | None, guards: tuple[str, ...], out: str | None, as_json: bool) -> None:
    """What a law would have decided on the measurements of a record (a file or the folder that holds it)."""
    from megatron_commute.decide import replay as replays
    from megatron_commute.report import plots

    try:
        found = replays.told(record, law, guards)
        if out:
            plots.replayed(record, found, out)
    except (FileNotFoundError, ValueError) as error:
        raise _Refusal(str(error)) from error
    if as_json:
        _print_json(replays.as_dict(found))
    else:
        headers, rows = replays.rows(found.decisions, found.names)
        click.echo(f"law {found.law}; {replays.sentence(found)}\n")
        click.echo(_table(rows, headers))


@main.command()
@click.argument("out_dir", type=click.Path(file_okay=False))
@click.option("--seeds", type=click.IntRange(min=1), default=300, show_default=True, help="Random problems.")
@as_json
def quadratic(out_dir: str, seeds: int, as_json: bool) -> None:
    """Measure the criterion on random quadratic problems with exact flows; write tables to OUT_DIR."""
    from megatron_commute.experiments import quadratic as experiment

    found = experiment.study(out_dir, seeds)
    if as_json:
        _print_json(found)
    else:
        click.echo(found["text"])
        click.echo("\n".join(found["files"]))


@main.command()
@click.argument("out_dir", type=click.Path(file_okay=False))
@click.option("--data", required=True, help="Folder of launch/prepare_data.py --by-package --vocab-size 512.")
@click.option(
    "--study",
    type=click.Choice(["paper", "end-to-end", "flow"]),
    default="paper",
    show_default=True,
    help="Which one.",
)
@click.option("--quick", is_flag=True, help="A few steps of everything, to see it work.")
@click.option("--processes", type=click.IntRange(min=1), help="At a time; default CPU cores, 1 with a GPU.")
@click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="NAME=VALUE",
    help="Another model, text or optimiser (a field of bilingual_trainer.Settings, such as hidden=768) or another size "
    "of the study (a field of its Size, such as window=4000, starts=2000,8000 or parts=main,length); repeat it.",
)
@click.option("--estimate", is_flag=True, help="Only count steps, FLOPs, GPU hours, disk; reads no data.")
@click.option(
    "--tflops", default=150.0, show_default=True, help="Of one GPU in bfloat16, ASSUMED by --estimate."
)
@as_json
def bilingual(out_dir, data, study, quick, processes, changes, estimate, tflops, as_json) -> None:
    """Measure what the order of two languages does to a small GPT; resumes.

    On 8 GPUs: torchrun --nproc-per-node 8 -m megatron_commute bilingual OUT_DIR ...
    """
    from megatron_commute.experiments import bilingual as experiment

    try:
        settings, size = experiment.asked(study, data, changes, quick)
        if estimate:
            found = experiment.estimate(study, settings, out_dir, size, tflops)
        else:
            say = lambda line: click.echo(line, err=True)  # noqa: E731
            found = experiment.study(study, settings, out_dir, quick, processes, say, size)
    except ValueError as error:
        raise _Refusal(str(error)) from error
    if as_json and found:
        _print_json(found)
    elif found:  # only the first of several ranks has found anything
        spent = [f"{found['seconds']:.0f} s"] if "seconds" in found else []
        click.echo("\n".join([found["text"], *found["files"], *spent]))


@main.command()
@click.argument("checkpoints", nargs=-1, type=click.Path())
@click.option("--data", "data", required=True, type=click.Path(), help="The mixture file.")
@click.option(
    "--out", required=True, type=click.Path(file_okay=False), help="Folder for record, report and tables."
)
@click.option("--samples", type=int, help="Held-out sequences per domain and probe; default the file's.")
@click.option("--splits", type=int, help="Replicates that standard errors come from; default the file's.")
@click.option("--method", type=click.Choice(["difference", "exact", "fused"]), help="Default the file's.")
@click.option("--metric", type=click.Choice(["adam", "identity"]), help="Default the file's.")
@click.option("--target", help="`each`, or NAME=SHARE,NAME=SHARE; default the file's.")
@click.option("--tokens", type=click.IntRange(min=1), help="Length of the run; default the checkpoints' own.")
@click.option(
    "--train-iters", type=click.IntRange(min=1), help="Steps of the run; default the checkpoints' own."
)
@click.option("--micro-batch-size", "micro_batch", type=click.IntRange(min=1), help="Sequences at once.")
@click.option("--arguments", type=click.Path(), help="JSON flags for checkpoints that keep none.")
@as_json
def analyze(checkpoints, data, out, as_json, **asked) -> None:
    """Measure the criterion along checkpoints (global_stepN, checkpoint-N, or a folder of many); resumes."""
    from tqdm import tqdm

    from megatron_commute.checkpoints import analysis as analysis

    def bar(total, unit):
        return tqdm(total=total, unit=unit, dynamic_ncols=True, disable=as_json)

    def say(line):
        tqdm.write(line, file=sys.stderr)

    try:
        found = analysis.analyze(checkpoints, data, out, analysis.asked(**asked), say, bar)
    except ValueError as error:
        raise _Refusal(str(error)) from error
    if as_json:
        _print_json(found)
    else:
        click.echo(_table(found["rows"], found["headers"]))
        click.echo("\n" + "\n".join([*found["text"], *found["files"]]))


@main.command()
@as_json
def doctor(as_json: bool) -> None:
    """Show what is installed and what works here. Exit status 1 when something indispensable is missing."""
    from megatron_commute.doctor import examine, works

    findings = examine()
    if as_json:
        _print_json({"works": works(findings), "findings": [finding._asdict() for finding in findings]})
    else:
        click.echo(_table([list(finding) for finding in findings], ["what", "state", "found", "cure"]))
        click.echo("\nready" if works(findings) else "\nnot ready: install what is missing")
    if not works(findings):
        raise SystemExit(1)


@main.command()
@click.argument("path", type=click.Path())
@click.option("--apply", "do", flag_value="apply", default="apply", help="Put the diffs on (default).")
@click.option("--check", "do", flag_value="check", help="Only look; exit status 1 when something is missing.")
@click.option("--revert", "do", flag_value="revert", help="Take the diffs off.")
@click.option("--only", type=click.Choice(["hook", "modern-stack"]), help="One of the two diffs.")
@as_json
def patch(path: str, do: str, only: str | None, as_json: bool) -> None:
    """Put our diffs on the tree of Megatron-DeepSpeed at PATH: hook, and what a modern stack needs."""
    from megatron_commute import patch as diffs

    try:
        rows = diffs.patch(path, do, (only,) if only else diffs.NAMES)
    except diffs.PatchError as error:
        raise _Refusal(str(error)) from error
    if as_json:
        _print_json(rows)
    else:
        click.echo("\n".join(diffs.sentences(rows)))
    if do == "check" and any(row["state"] == "absent" for row in rows):
        raise SystemExit(1)
