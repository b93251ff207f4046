"""A run that goes on in another folder than the one it was loaded from: its record begins there."""

from pathlib import Path

import numpy as np

from megatron_commute import reduce
from megatron_commute.record import log


def sentence(record, origin, state, groups):
    """Where a run comes from whose checkpoint lies in `origin` and whose `record`, a file, is to
    begin anew; "" where the record goes on. Collective; rank 0 looks.

    state: of that checkpoint; None, or no origin, for no branch. A record that was brought along,
    the same up to the checkpoint, goes on.
    """
    if state is None or not origin:
        return ""
    begins = float(reduce.rank() == 0 and _begins(Path(record), Path(origin, log.NAME), state["lines"]))
    if not reduce.broadcast_numbers(np.array([begins]), groups)[0]:
        return ""
    sample = state["mixture"]["index"]
    return f"branched at sample {sample} from {origin}, whose record has what came before"


def _begins(here, there, lines):
    if here.resolve() == there.resolve():
        return False
    if not here.exists():
        return True
    return there.exists() and _head(here, lines) != _head(there, lines)


def _head(path, lines):
    return path.read_bytes().split(b"\n")[:lines]
