"""How often `design` sees a gain where there is none: two domains that are random halves of one
text.
"""

import os
import struct
from pathlib import Path

import numpy as np

from megatron_commute.data import index_file
from megatron_commute.design import options
from megatron_commute.design import run as work
from megatron_commute.settings import text_files

SHARES = {"one": 0.2, "other": 0.8}  # of two halves of one text; the target is the smaller
STYLES = ("WSD", "cosine")  # of the learning rate, in turn
BATCH, LAYERS, HIDDEN = 20, 1, 32


def split(prefix, names, seed):
    """Indices NAME.idx, each of a random half of the texts of `prefix`, beside links to its
    tokens.
    """
    raw = Path(f"{prefix}.idx").read_bytes()
    _, _, code, texts, _ = index_file.HEAD.unpack_from(raw)
    at = index_file.HEAD.size
    lengths = np.frombuffer(raw, "<i4", texts, at)
    pointers = np.frombuffer(raw, "<i8", texts, at + 4 * texts)
    first = np.random.default_rng(seed).permutation(texts) < texts // 2
    for name, mine in zip(names, (first, ~first), strict=True):
        count = int(mine.sum())
        head = index_file.HEAD.pack(index_file.MAGIC, 1, code, count, count + 1)
        bounds = struct.pack(f"<{count + 1}q", *range(count + 1))
        text_files.replace(f"{name}.idx", head + lengths[mine].tobytes() + pointers[mine].tobytes() + bounds)
        if not os.path.lexists(f"{name}.bin"):
            os.symlink(os.path.abspath(f"{prefix}.bin"), f"{name}.bin")


def rows(settings, folder, steps, count, design_of, processes, tell):
    """What `count` designs of so many steps say, each of halves of English of its own. design_of:
    that of bilingual_design.
    """
    own = options.Options(
        layers=LAYERS,
        hidden=HIDDEN,
        steps=steps,
        batch=BATCH,
        sequence=settings.sequence,
        vocabulary=settings.vocabulary + 1,
    )
    found = []
    for number in range(count):
        style, place = STYLES[number % len(STYLES)], folder / f"halves-{number}"
        place.mkdir(parents=True, exist_ok=True)
        for part, held in (("train", ""), ("valid", "holdout of ")):
            split(f"{settings.data}/english_{part}", [place / f"{held}{name}" for name in SHARES], number)
        domains = {
            name: {"path": name, "holdout": f"holdout of {name}", "budget": round(share * steps * BATCH)}
            for name, share in SHARES.items()
        }
        design = design_of(place / "halves.yaml", {"domains": domains, "target": {"one": 1}}, style, own)
        told = work.carried_out(design, place / "work", processes, tell, lambda *_: None)
        look = told["proofs"][-1]["looks"][-1] if told["proofs"] else {"seeds": 0, "changes": []}
        row = {"x": number, "style": style, "outcome": told["outcome"], "seeds": look["seeds"]}
        for change in look["changes"][:1]:
            row |= {"change in percent": change.percent, "interval": change.percent_interval}
        found.append(row)
    return found
