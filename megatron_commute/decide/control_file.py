"""The control file: how people intervene in a run that goes on.

RUN/commute.control.yaml may be written, changed and removed while the run goes on:

    freeze: true                        # the weights stay
    weights: {en: 0.5, ru: 0.5}         # these instead, budgets permitting ...
    from: 128000                        # ... from this sample on; default: as soon as possible
    caps: {en: 0.6}                     # most that a law may ask, one number or NAME: share

Each version of its content holds until the next one; removing the file changes nothing. A broken
version is told once and ignored.
"""

import dataclasses
import math
import os
from pathlib import Path

import numpy as np

from megatron_commute.settings.mixture_file import (
    SHARE_TOLERANCE,
    by_domain,
    mixture_of,
    refuse_strangers,
    shares,
)
from megatron_commute.settings.yaml_checks import ConfigError, Document, Refused, integer

NAME = "commute.control.yaml"


@dataclasses.dataclass(frozen=True)
class Control:
    """One version of the file. weights f64[K] or None, from sample `at` (0: as soon as
    possible); caps f64[K] or None.
    """

    freeze: bool = False
    weights: tuple[float, ...] | None = None
    at: int = 0
    caps: tuple[float, ...] | None = None

    def numbers(self, K):
        """As float64 [3 + 2 K], for the ranks that do not read the file."""
        empty = [math.nan] * K
        return np.array([1.0, self.freeze, self.at, *(self.weights or empty), *(self.caps or empty)])

    @classmethod
    def of_numbers(cls, numbers):
        K = (len(numbers) - 3) // 2
        weights, caps = (
            None if np.isnan(part).any() else tuple(part.tolist())
            for part in (numbers[3 : 3 + K], numbers[3 + K :])
        )
        return cls(bool(numbers[1]), weights, int(numbers[2]), caps)


def _flag(value):
    if not isinstance(value, bool):
        raise Refused("write true or false")
    return value


CONTROL_KEYS = {
    "freeze": _flag,
    "weights": mixture_of("leave the key out"),
    "from": integer("write a sample of the run, 0 or more", 0),
    "caps": shares,
}


def read(path, names, feeds):
    """(Control, digest of its content) of a control file. feeds: whether the plug-in feeds
    training.

    Raises ConfigError naming file, line, key and cure.
    """
    document = Document(str(path))
    values = document.section("", document.tree, CONTROL_KEYS)
    weights, caps = values.get("weights"), values.get("caps")
    if weights is not None and not feeds:
        problem = "the host's own data path decides in mode shadow"
        raise document.error("weights", problem, "leave them out, or run in mode fixed or act")
    if "from" in values and weights is None:
        raise document.error("from", "there are no weights that could hold from there", "write weights too")
    if weights is not None:
        refuse_strangers(document, "weights", weights, names)
        weights = tuple(weights.get(name, 0.0) for name in names)
    if caps is not None:
        caps = by_domain(document, "caps", caps, list(names), 1.0)
        if sum(caps) < 1 - SHARE_TOLERANCE:
            raise document.error("caps", f"they sum to {sum(caps):g}", "write caps that sum to at least 1")
        for name, cap, weight in zip(names, caps, weights or [0.0] * len(names), strict=True):
            if weight > cap + SHARE_TOLERANCE:
                problem = f"{weight:g} of {name} is above its cap {cap:g}"
                raise document.error("weights", problem, "write a lower weight or a higher cap")
    return Control(values.get("freeze", False), weights, values.get("from", 0), caps), document.digest()


class Watch:
    """Looks for new versions of a control file; one stat call while it stays as it is."""

    def __init__(self, path, names, feeds):
        self.path, self.names, self.feeds = Path(path), tuple(names), feeds
        self.digest, self._seen = "", None

    def look(self):
        """A new Control, the complaint (str) about a broken version, or None where there is
        nothing new.
        """
        try:
            found = os.stat(self.path)
        except OSError:
            self._seen = None
            return None
        seen = (found.st_mtime_ns, found.st_size, found.st_ino)
        if seen == self._seen:
            return None
        self._seen = seen
        try:
            control, digest = read(self.path, self.names, self.feeds)
        except ConfigError as error:
            return str(error)
        if digest[:12] == self.digest:
            return None
        self.digest = digest[:12]
        return control
