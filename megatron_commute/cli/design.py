"""Before a run: `design` writes a schedule, by law flow alone or proven on proxies of the run."""

import os
from pathlib import Path
from typing import Any

import click

from megatron_commute.cli.plan import checked, drawn, of_a_run
from megatron_commute.cli.words import Refusal, as_json, print_json, table
from megatron_commute.config import ConfigError
from megatron_commute.settings import schedule, text_files
from megatron_commute.settings.memory import in_units


def _arguments(context: click.Context, _: Any, path: str | None) -> None:
    """A host's flags as JSON stand for flags that are not given."""
    if path is None:
        return
    try:
        found = text_files.read_object(path, "a JSON object of flags, such as arguments.json")
    except text_files.TextFileError as error:
        raise Refusal(f"--arguments {error}") from error
    known = {option.name for option in context.command.params}
    given = {name.lstrip("-").replace("-", "_"): value for name, value in found.items()}
    if given.get("finetune"):
        given["begun"] = f"{path} with finetune"
    context.default_map = {
        name: given[name] for name in sorted(known & set(given)) if given[name] is not None
    }


def _refuse_continued(context: click.Context, _: Any, given: str | None) -> None:
    """A run that begins from trained weights has no proxy yet."""
    if given is not None and context.params.get("law") is None:
        raise Refusal(
            f"{given}: proxies begin from new weights, and none with the checkpoint's own can be built: that "
            "takes its model at the proxy's size; plan by the law alone (--law flow)"
        )


@click.command()
@click.argument("file", type=click.Path())
@click.option(
    "--arguments",
    type=click.Path(),
    is_eager=True,
    expose_value=False,
    callback=_arguments,
    help="JSON file with the flags of a host, for those that are not given here.",
)
@click.option(
    "--law", is_eager=True, type=click.Choice(["flow"]), help="Plan by this law alone, without a proxy."
)
@of_a_run
@click.option(
    "--harm",
    type=float,
    help="Part of its loss that a domain may lose: by default 0.005 on a proxy; with --law flow no limit.",
)
@click.option("--proxy", help="The proxy: layers=2,hidden=48,heads=2,sequence=32,steps=500,... .")
@click.option(
    "--minutes", type=click.FloatRange(min=0, min_open=True), help="Choose the proxy's steps to fit."
)
@click.option("--quick", is_flag=True, help="A tiny proxy and two pairs of seeds, to see it work.")
@click.option(
    "--untrained", multiple=True, metavar="NAME=PREFIX", help="A text that nobody trains on, judged beside."
)
@click.option("--processes", type=click.IntRange(min=1), help="At a time; default CPU cores, 1 with a GPU.")
@click.option(
    "--from",
    "begun",
    expose_value=False,
    callback=_refuse_continued,
    help="Checkpoint that the run goes on from: refused with what is missing, unless with --law flow.",
)
@click.option("--out", type=click.Path(file_okay=False), required=True, help="Folder for what is written.")
@as_json
def design(file: str, law: str | None, out: str, as_json: bool, **given: Any) -> None:
    """Design the weights of a run: influences of every domain at every step of a small proxy, a
    schedule from them, its proof on fresh seeds; resumes. With --law flow: no proxy.

    Writes schedule.csv where something is to gain, design.jsonl, design.csv and report.html.
    """
    own = {name: given.pop(name) for name in ("harm", "proxy", "minutes", "quick", "untrained", "processes")}
    if law is not None:
        _by_law(file, law, own["harm"], out, as_json, given)
        return
    from megatron_commute import reduce

    with reduce.joined():
        try:
            found = _on_proxies(file, out, as_json, given, own)
        except (ConfigError, FloatingPointError, ValueError) as error:
            raise Refusal(str(error)) from error
    if as_json and found:
        print_json(found)
    elif found:
        click.echo("\n".join([found["text"], *found["files"]]))


def _by_law(file, law, harm, out, as_json, flags):
    from megatron_commute.decide import flow
    from megatron_commute.report import design as page

    try:
        limit = {} if harm is None else {"strength": flow.strength_within(harm)}
    except ValueError as error:
        raise Refusal(f"--harm: {error}") from error
    asked = checked(file, flags, law=law, **limit)
    Path(out).mkdir(parents=True, exist_ok=True)
    path = Path(out) / "schedule.csv"
    text_files.replace(path, schedule.written(asked.plan.names, asked.plan.schedule))
    files = [str(path), *drawn(asked, out, with_page=True)]
    if as_json:
        print_json({"files": files, "flow": asked.flow, "warnings": list(asked.plan.warnings)})
        return
    headers, rows = page.rows(asked.plan.names, asked.flow, asked.plan.samples)
    click.echo(f"{table(rows, headers)}\n\nstrength {asked.flow['strength']:g}")
    for warning in asked.plan.warnings:
        click.echo(f"warning: {warning}")
    click.echo("\n".join(files))


def _on_proxies(file, out, as_json, flags, own):
    """The whole design; None on all ranks but the first."""
    import torch
    from tqdm import tqdm

    from megatron_commute import reduce
    from megatron_commute.design import cost, options, result
    from megatron_commute.report import plots

    asked = checked(file, flags, law="flow")
    chosen = options.parsed(own["proxy"], own["quick"])
    harm = 0.005 if own["harm"] is None else own["harm"]
    first = reduce.rank() == 0
    ranks = reduce.size(reduce.everyone())
    processes = own["processes"] or (1 if ranks > 1 or torch.cuda.is_available() else os.cpu_count() or 1)
    about = {"config": asked.config, "plan": asked.plan, "run": asked.run, "rates": asked.rates}
    about |= {"untrained": _texts(own["untrained"]), "harm": harm, "quick": own["quick"]}
    found = options.design(options=chosen, **about)
    step = cost.measured_step(found)
    if own["minutes"]:
        losses = len(found.source.names)
        chosen = options.within(chosen, own["minutes"], step, losses, processes * ranks)
        found = options.design(options=chosen, **about)
    found, needed = cost.within_memory(found, step, processes * ranks)
    if first:
        click.echo(_announced(found, needed), err=True)
    bar = tqdm(total=result.cells(found), unit="run", dynamic_ncols=True, disable=as_json or not first)
    with bar:
        told = result.written(found, asked.run, needed, out, processes, lambda cell: bar.update())
    if told:
        told["files"].append(str(plots.designed(out)))
    return told


def _texts(words):
    found = []
    for word in words:
        name, sign, prefix = word.partition("=")
        if not (name and sign and prefix):
            raise ConfigError(f"--untrained {word}: write NAME=PREFIX of a .bin and .idx")
        found.append((name, prefix))
    return found


def _announced(found, cost):
    """What will run, for how long, with how much memory."""
    shape = found.proxy.shape
    size = in_units(cost["bytes"])
    rows = [[row["part"], f"{row['runs']:g}", f"{row['seconds'] / 60:.1f}"] for row in cost["parts"]]
    again = ", states recomputed" if found.recompute else ""
    return (
        f"proxy: {shape.flavour}, {cost['parameters']:,} parameters, {found.proxy.steps} steps of "
        f"{found.proxy.batch} sequences of {shape.sequence} tokens, vocabulary {shape.vocabulary}\n"
        f"{table(rows, ['part', 'runs', 'minutes'])}\n"
        f"{cost['least_seconds'] / 60:.1f} to {cost['seconds'] / 60:.1f} minutes; {size} of states{again}"
    )
