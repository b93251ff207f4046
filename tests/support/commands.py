"""The command line, called inside a test."""

from click.testing import CliRunner

from megatron_commute.cli import main


def invoke(*arguments):
    return CliRunner().invoke(main.main, [str(argument) for argument in arguments])
