"""After a run: `average` writes the mean of its checkpoints."""

import click

from megatron_commute.cli.words import Refusal, as_json, of_checkpoints, print_json, table


@click.command()
@click.argument("checkpoints", nargs=-1, required=True, type=click.Path())
@click.option(
    "--out", required=True, type=click.Path(), help="New folder for the mean; one that exists is refused."
)
@click.option(
    "--last",
    type=click.FloatRange(0, 1, min_open=True),
    help="Of ONE folder, the checkpoints in this last part of its steps, such as 0.1.",
)
@click.option("--data", type=click.Path(), help="A mixture file: also the held-out losses of mean and last.")
@click.option("--samples", type=int, help="Held-out sequences per domain; default the file's probe.samples.")
@of_checkpoints
@as_json
def average(checkpoints, out, last, data, as_json, **asked) -> None:
    """Write the mean of checkpoints (global_stepN, checkpoint-N, or a folder of many) as a new one
    of the same layout.
    """
    from megatron_commute.checkpoints import average as means
    from megatron_commute.checkpoints.setting import Asked

    try:
        if data is None and any(value is not None for value in asked.values()):
            raise Refusal(
                "--samples, --tokens, --train-iters, --micro-batch-size and --arguments need --data"
            )
        found = means.chosen(checkpoints, last)
        newest = found[-1][1]
        held_out = rows = None
        if data is not None:
            from megatron_commute.checkpoints.held_out import HeldOut

            held_out = HeldOut(checkpoint=newest, data=data, wanted=Asked(**asked))
        told = means.average(found, out, lambda line: click.echo(line, err=True))
        if held_out is not None:
            rows = held_out.rows(held_out.losses(told["checkpoint"]), held_out.losses(newest))
    except ValueError as error:
        raise Refusal(str(error)) from error
    if as_json:
        print_json({**told, "losses": rows, "notes": held_out.setting.notes if held_out else []})
        return
    click.echo("\n".join(_sentences(told)))
    if rows:
        _print_losses(rows, held_out.setting.notes)


def _sentences(told: dict) -> list[str]:
    steps = ", ".join(map(str, told["steps"]))
    means = f"{told['tensors']} tensors; {told['layout']}"
    lines = [f"the mean of {len(told['steps'])} checkpoints (steps {steps}), {means}"]
    if told["left_out"]:
        lines.append(f"left out, as only the last one's: {', '.join(told['left_out'])}")
    return [*lines, told["load"], told["checkpoint"]]


def _print_losses(rows: list[dict], notes: list[str]) -> None:
    cells = []
    for row in rows:
        error = "" if row["standard_error"] is None else f" ± {row['standard_error']:.2g}"
        apart = f"{row['difference']:+.4f}{error}"
        cells.append([row["domain"], f"{row['mean']:.4f}", f"{row['last']:.4f}", apart])
    click.echo("\n" + table(cells, ["held-out loss", "mean", "last", "mean - last"]))
    click.echo(f"nats per token on {rows[0]['sequences']} sequences of each domain")
    for note in notes:
        click.echo(f"note: {note}")
