"""The record of an analysis, which a later one goes on writing; written: a record.log.Record."""

import json
import math

from megatron_commute.checkpoints.files import CheckpointError
from megatron_commute.record import log
from megatron_commute.settings import text_files


def reopen(written):
    """Whole lines of an earlier analysis in this folder; what a killed one left half-written is
    moved aside.
    """
    if not written.path.exists():
        return []
    whole = written.path.read_bytes().count(b"\n")
    lines = log.read(written.path)[:whole]
    while lines and lines[-1]["event"] == "valid":  # its probe never came
        lines.pop()
    if lines and lines[0].get("analysis") is None:
        raise CheckpointError(
            f"--out {written.path.parent}: holds the record of a run, which is not overwritten; name another "
            "folder"
        )
    if len(lines) == 1:  # nothing was measured, so other settings may follow
        lines.pop()
    written.rewind(len(lines))
    return lines


def sort(written):
    """Put the lines in the order of steps, where checkpoints were analysed in another."""
    lines = written.path.read_bytes().splitlines(keepends=True)
    pairs = [(json.loads(line), line) for line in lines]
    # version 0.1.0 ended a record with a line that has no step
    pairs.sort(key=lambda pair: (pair[0]["event"] != "start", pair[0].get("step", math.inf)))
    ordered = [line for _, line in pairs]
    if ordered != lines:
        text_files.replace(written.path, b"".join(ordered))
