"""The same text reached twice: by another name, through a link, or by another index of one .bin
file.
"""

import itertools
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from megatron_commute.config import Config, Domain, wished_holdout
from megatron_commute.data.index_file import Layout, meet

_PIECE = 1 << 20  # bytes that are compared together


@dataclass(frozen=True, eq=False)
class Use:
    """One prefix of the mixture file."""

    domain: str
    # its name
    key: str
    # path or holdout
    prefix: str
    # as the file names it, absolute
    layout: Layout
    # of its tokens

    @property
    def ranges(self) -> np.ndarray:
        """Bytes of the .bin file that it reads."""
        return self.layout.ranges(0, self.layout.tokens)


def refuse_shared(config: Config, uses: list[Use]) -> None:
    """Raises ConfigError, at the line of the domain, where text is trained on under two names, or
    measured on and trained on.
    """
    by_file, by_size = defaultdict(list), defaultdict(list)
    for use in uses:
        by_file[use.layout.file].append(use)
        by_size[use.layout.sizes[1]].append(use)
    for same in by_file.values():
        for one, other in itertools.combinations(same, 2):
            keys = {one.key, other.key}
            if keys != {"holdout"} and meet(one.ranges, other.ranges):
                _refuse(config, one, other)
    for same in by_size.values():
        for one, other in itertools.combinations(same, 2):
            apart = one.layout.file != other.layout.file
            if one.key != other.key and apart and one.layout.tokens and _copies(one, other):
                _refuse(config, one, other)


def _refuse(config: Config, one: Use, other: Use) -> None:
    if one.key == other.key:
        problem = f"{other.prefix} has text that domain {one.domain} reads as {one.prefix}"
        raise config.error(f"domains.{other.domain}.path", problem, "name every text once")
    held, read = (one, other) if one.key == "holdout" else (other, one)
    problem = f"{held.prefix} is trained on as well, by domain {read.domain}"
    problem += f" as {read.prefix}" if read.prefix != held.prefix else ""
    raise config.error(f"domains.{held.domain}.holdout", problem, "name a prefix of its own")


def _copies(one: Use, other: Use) -> bool:
    """Whether two files hold the same bytes, read up to the first difference."""
    with open(f"{one.prefix}.bin", "rb") as a, open(f"{other.prefix}.bin", "rb") as b:
        while piece := a.read(_PIECE):
            if piece != b.read(_PIECE):
                return False
    return True


def refuse_repeats(config: Config, domain: Domain, layouts: list[Layout], counts, seq_length: int) -> None:
    """Raises ConfigError where the holdout at the end of a domain's own files has text that its
    training part repeats.

    counts: whole sequences of each file.
    """
    left = wished_holdout(config, domain)
    trained, held = defaultdict(list), defaultdict(list)
    for one, count in zip(reversed(layouts), reversed(counts), strict=True):
        own = min(left, count)
        left -= own
        first = (count - own) * seq_length + 1  # the token between two sequences is of both
        trained[one.file].append(one.ranges(0, first))
        held[one.file].append(one.ranges(first, count * seq_length + 1) if own else one.ranges(0, 0))
    for file in held:
        if meet(_ascending(held[file]), _ascending(trained[file])):
            problem = f"its last {wished_holdout(config, domain)} sequences repeat text of the others"
            raise config.error(f"domains.{domain.name}.holdout", problem, "name a prefix of its own")


def _ascending(parts: list[np.ndarray]) -> np.ndarray:
    found = np.concatenate(parts)
    return found[np.argsort(found[:, 0], kind="stable")]
