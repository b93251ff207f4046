"""What every command says alike: refusals, JSON, tables."""

import json
import os
from collections.abc import Callable
from typing import Any

import click


class Refusal(click.ClickException):
    """Bad input: one line on stderr, exit status 2."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once a node, as files may be missing on one of them
            click.echo(f"error: {self.message}", err=True)


as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")


def told(error: OSError | ValueError) -> str:
    """What a refusal says of a fault of files."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}; free the disk, or name another place to write to"
    return str(error)


OF_CHECKPOINTS = (
    click.option(
        "--tokens", type=click.IntRange(min=1), help="Length of the run; default the checkpoints' own."
    ),
    click.option(
        "--train-iters", type=click.IntRange(min=1), help="Steps of the run; default the checkpoints' own."
    ),
    click.option("--micro-batch-size", "micro_batch", type=click.IntRange(min=1), help="Sequences at once."),
    click.option("--arguments", type=click.Path(), help="JSON flags for checkpoints that keep none."),
)


def of_checkpoints(command: Callable) -> Callable:
    """Adds what a command asks of checkpoints that do not say it themselves."""
    for option in reversed(OF_CHECKPOINTS):
        command = option(command)
    return command


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def table(rows: list[list[Any]], headers: list[str]) -> str:
    from tabulate import tabulate

    return tabulate(rows, headers=headers, disable_numparse=True)
