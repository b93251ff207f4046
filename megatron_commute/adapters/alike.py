"""Whether all ranks read the same: a stale copy on one node would part the streams of its ranks
from the others without a word.
"""

import hashlib
import json
from pathlib import Path

import numpy as np

import megatron_commute
from megatron_commute import mixture, reduce
from megatron_commute.config import ConfigError

_PIECE, _PIECES = 1 << 20, 64  # an index of more than 64 MiB is read in as many pieces of 1 MiB


def facts(config):
    """{what: [digest, where it was read]} of everything that a rank's stream follows from."""
    package = Path(megatron_commute.__file__).resolve().parent
    source = [path.read_bytes() for path in sorted(package.rglob("*.py"))]
    version = f"{megatron_commute.__version__}-{_digest(*source)}"
    found = {
        "the mixture file": [config.digest[:16], str(config.file)],
        "megatron_commute": [version, str(package)],
        "the mixture's arithmetic": ["plain" if mixture.stretch is None else "compiled", str(package)],
    }
    if config.schedule is not None:
        path = Path(config.schedule)
        found["the schedule"] = [_digest(path.read_bytes()), str(path)]
    for domain in config.domains:
        held = (domain.holdout,) if isinstance(domain.holdout, str) else ()
        for kind, prefixes in (("data", domain.path), ("holdout", held)):
            for number, prefix in enumerate(prefixes):
                nth = f" ({number + 1})" if number else ""
                found[f"{kind} of {domain.name}{nth}"] = [_data(prefix), f"{prefix}.idx"]
    return found


def refuse_unlike(own):
    """Raise ConfigError on every rank where `facts` are not those of all ranks; collective."""
    code = float(int(_digest(json.dumps({what: told[0] for what, told in own.items()}).encode())[:12], 16))
    text = json.dumps(own)
    most = reduce.max_of_numbers(np.array([code, -code, float(len(text.encode()))]), reduce.everyone())
    if most[0] == -most[1]:
        return
    world = reduce.Groups(world=reduce.everyone())
    told = differences([json.loads(one) for one in reduce.gather_text(text, world, int(most[2]))])
    raise ConfigError(f"--commute: {told}; give all ranks the same and start again")


def differences(every):
    """In words, what differs between the `facts` of all ranks, in order, and which have which."""
    clauses = []
    for what in sorted({what for own in every for what in own}):
        ranks = {}
        for rank, own in enumerate(every):
            digest, where = own.get(what, ["nothing", "-"])
            ranks.setdefault(digest, ([], where))[0].append(rank)
        if len(ranks) > 1:
            parts = [f"{_named(r)} {digest} ({where})" for digest, (r, where) in ranks.items()]
            clauses.append(f"{what}: {', '.join(parts)}")
    return f"ranks differ in {'; '.join(clauses)}"


def _named(ranks):
    """rank 1, ranks 0 2 3, ranks 0 2 3 and 61 more."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"ranks {' '.join(str(rank) for rank in ranks[:8])}{more}"


def _data(prefix):
    """Digest of PREFIX.idx and the sizes of both files."""
    index, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    size = index.stat().st_size
    with index.open("rb") as file:
        if size <= _PIECE * _PIECES:
            return _digest(f"{size} {data.stat().st_size}".encode(), file.read())
        pieces = []
        for number in range(_PIECES):
            file.seek((size - _PIECE) * number // (_PIECES - 1))
            pieces.append(file.read(_PIECE))
    return _digest(f"{size} {data.stat().st_size}".encode(), *pieces)


def _digest(*parts):
    whole = hashlib.blake2b(digest_size=8)
    for part in parts:
        whole.update(part)
    return whole.hexdigest()
