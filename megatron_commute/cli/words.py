"""What every command says alike: refusals, JSON, tables."""

import json
import os
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


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def table(rows: list[list[Any]], headers: list[str]) -> str:
    from tabulate import tabulate

    return tabulate(rows, headers=headers, disable_numparse=True)
