"""How often `design` sees a gain where there is none: two domains that are random halves of one
text.
"""

import dataclasses
import json
import os
import struct
from pathlib import Path

import numpy as np

from megatron_commute.config import Run, load, resolve
from megatron_commute.data import index_file
from megatron_commute.data.indexed import inspect_data
from megatron_commute.decide import flow
from megatron_commute.design import options
from megatron_commute.design import run as work
from megatron_commute.experiments.bilingual_flow import rate_of
from megatron_commute.settings import text_files
from megatron_commute.settings.rates import rates

SHARES = {"one": 0.2, "other": 0.8}  # of two halves of one text
BATCH, LAYERS, HIDDEN = 20, 1, 32


def split(prefix, names, seed):
    """Indices NAME.idx, each of a random half of the texts of `prefix`, beside links to its
    tokens.
    """
    raw = Path(f"{prefix}.idx").read_bytes()
    _, _, code, texts, _ = index_file._HEAD.unpack_from(raw)
    at = index_file._HEAD.size
    lengths = np.frombuffer(raw, "<i4", texts, at)
    pointers = np.frombuffer(raw, "<i8", texts, at + 4 * texts)
    first = np.random.default_rng(seed).permutation(texts) < texts // 2
    for name, mine in zip(names, (first, ~first), strict=True):
        head = struct.pack("<9sQBQQ", index_file.MAGIC, 1, code, mine.sum(), mine.sum() + 1)
        bounds = np.arange(mine.sum() + 1, dtype="<i8")
        text_files.replace(
            f"{name}.idx", head + lengths[mine].tobytes() + pointers[mine].tobytes() + bounds.tobytes()
        )
        if not os.path.lexists(f"{name}.bin"):
            os.symlink(os.path.abspath(f"{prefix}.bin"), f"{name}.bin")


def design_of(settings, folder, steps, style, seed):
    """The Design of two halves of English, drawn by `seed`; the target is the smaller."""
    folder.mkdir(parents=True, exist_ok=True)
    told = {}
    for part, held in (("train", ""), ("valid", "holdout of ")):
        split(f"{settings.data}/english_{part}", [folder / f"{held}{name}" for name in SHARES], seed)
    samples = steps * BATCH
    for name, share in SHARES.items():
        told[name] = {"path": name, "holdout": f"holdout of {name}", "budget": round(share * samples)}
    path = folder / "halves.yaml"
    about = {"domains": told, "target": {"one": 1}, "mode": "fixed", "probe": {"samples": 8, "splits": 2}}
    text_files.replace(path, json.dumps(about))  # JSON is YAML
    config = load(str(path))
    a_run = Run(
        seq_length=settings.sequence,
        global_batch=BATCH,
        micro_batch=BATCH,
        data_parallel=1,
        train_iters=steps,
        prefetched=0,
    )
    own = options.Options(
        layers=LAYERS, hidden=HIDDEN, steps=steps, vocabulary=settings.vocabulary + 1, batch=BATCH
    )
    own = dataclasses.replace(own, sequence=settings.sequence)
    told = {"config": config, "plan": resolve(config, a_run, *inspect_data(config, settings.sequence))}
    told |= {"run": a_run, "rates": rates(rate_of(style, steps, own.lr)), "options": own}
    return options.design(**told, harm=flow.HARM)


def rows(settings, folder, steps, styles, count, processes, tell):
    """What `count` designs say, each of halves of its own, the rate schedules in turn."""
    found = []
    for number in range(count):
        style, place = styles[number % len(styles)], folder / f"halves-{number}"
        design = design_of(settings, place, steps, style, number)
        told = work.carried_out(design, place / "work", processes, tell, lambda *_: None)
        look = told["proofs"][-1]["looks"][-1] if told["proofs"] else {"seeds": 0, "changes": []}
        row = {"x": number, "style": style, "outcome": told["outcome"], "seeds": look["seeds"]}
        for change in look["changes"][:1]:
            row |= {"change in percent": change.percent, "interval": change.percent_interval}
        found.append(row)
    return found
