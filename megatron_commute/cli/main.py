"""The command line: parses, then calls one function. Bad input ends with exit status 2."""

import sys
from pathlib import Path

import click

from megatron_commute import __version__
from megatron_commute.cli.average import average
from megatron_commute.cli.design import design
from megatron_commute.cli.plan import plan
from megatron_commute.cli.words import Refusal, as_json, of_checkpoints, print_json, table, told


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="megatron-commute")
def main() -> None:
    """Decide when each data domain is used while a language model is pretrained."""


main.add_command(plan)
main.add_command(design)
main.add_command(average)


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
    except (OSError, ValueError) as error:
        raise Refusal(told(error)) from error
    if as_json:
        print_json({"report": str(path)})
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
    """What a law would have decided on the measurements of a record (a file or the folder that
    holds it).
    """
    from megatron_commute.decide import replay as replays
    from megatron_commute.report import plots

    try:
        found = replays.told(record, law, guards)
        if out:
            plots.replayed(record, found, out)
    except (OSError, ValueError) as error:
        raise Refusal(told(error)) from error
    if as_json:
        print_json(replays.as_dict(found))
    else:
        headers, rows = replays.rows(found.decisions, found.names)
        click.echo(f"law {found.law}; {replays.sentence(found)}\n")
        click.echo(table(rows, headers))


@main.command()
@click.argument("out_dir", type=click.Path(file_okay=False))
@click.option("--seeds", type=click.IntRange(min=1), default=300, show_default=True, help="Random problems.")
@as_json
def quadratic(out_dir: str, seeds: int, as_json: bool) -> None:
    """Measure the criterion on random quadratic problems with exact flows; tables go to OUT_DIR."""
    from megatron_commute.experiments import quadratic as experiment

    found = experiment.study(out_dir, seeds)
    if as_json:
        print_json(found)
    else:
        click.echo(found["text"])
        click.echo("\n".join(found["files"]))


@main.command()
@click.argument("out_dir", type=click.Path(file_okay=False))
@click.option("--data", required=True, help="Folder of launch/prepare_data.py --by-package --vocab-size 512.")
@click.option(
    "--study",
    type=click.Choice(["paper", "end-to-end", "flow", "design", "online"]),
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
    help="Another model, text or optimiser (a field of bilingual_trainer.Settings, such as hidden=768) or "
    "another size of the study (a field of its Size, such as window=4000, starts=2000,8000 or "
    "parts=main,length); repeat it.",
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
        raise Refusal(str(error)) from error
    if as_json and found:
        print_json(found)
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
@of_checkpoints
@as_json
def analyze(checkpoints, data, out, as_json, **asked) -> None:
    """Measure the criterion along checkpoints (global_stepN, checkpoint-N, or a folder of many);
    resumes.
    """
    from tqdm import tqdm

    from megatron_commute.checkpoints import analysis as analysis

    def bar(total, unit):
        return tqdm(total=total, unit=unit, dynamic_ncols=True, disable=as_json)

    def say(line):
        tqdm.write(line, file=sys.stderr)

    try:
        found = analysis.analyze(checkpoints, data, out, analysis.asked(**asked), say, bar)
    except ValueError as error:
        raise Refusal(str(error)) from error
    if as_json:
        print_json(found)
    else:
        click.echo(table(found["rows"], found["headers"]))
        click.echo("\n" + "\n".join([*found["text"], *found["files"]]))


@main.command()
@as_json
def doctor(as_json: bool) -> None:
    """Show what is installed and what works here. Exit status 1 when something indispensable is
    missing.
    """
    from megatron_commute.doctor import examine, works

    findings = examine()
    if as_json:
        print_json({"works": works(findings), "findings": [finding._asdict() for finding in findings]})
    else:
        click.echo(table([list(finding) for finding in findings], ["what", "state", "found", "cure"]))
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
    """Put our diffs on the Megatron-DeepSpeed at PATH: hook, and what a modern stack needs."""
    from megatron_commute import patch as diffs

    try:
        rows = diffs.patch(path, do, (only,) if only else diffs.NAMES)
    except diffs.PatchError as error:
        raise Refusal(str(error)) from error
    if as_json:
        print_json(rows)
    else:
        click.echo("\n".join(diffs.sentences(rows)))
    if do == "check" and any(row["state"] == "absent" for row in rows):
        raise SystemExit(1)
