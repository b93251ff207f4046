"""Which stream a run goes on with: a fresh one, that of its checkpoint, or one changed or taken
over by consent.
"""

import dataclasses
import json
import zlib
from pathlib import Path
from typing import NamedTuple

from megatron_commute.config import ConfigError
from megatron_commute.data import takeover
from megatron_commute.mixture import Mixture

# keys whose change law flow names itself, when it has planned the weights
_OF_FLOW = ("target", "controller.law", "controller.strength", "controller.memory")
_EDGE = 1 << 20  # bytes of either end of a .bin file that enter its fingerprint


class Resumed(NamedTuple):
    """Where a run goes on, or begins."""

    mixture: Mixture
    """at the consumed samples"""
    ledger: takeover.Ledger
    """which domain is which over the life of the run"""
    news: list
    """what changed by consent, one sentence each"""


def fingerprint(paths, size):
    """Short text that names the data of one domain: sizes of its .bin files, their ends, and the
    training sequences.

    size: training sequences, which the permutation depends on. Reads two MiB of each file.
    """
    code = 0
    for path in paths:
        data = Path(f"{path}.bin")
        length = data.stat().st_size
        code = zlib.crc32(str(length).encode(), code)
        with data.open("rb") as file:
            code = zlib.crc32(file.read(_EDGE), code)
            file.seek(max(0, length - _EDGE))
            code = zlib.crc32(file.read(_EDGE), code)
    return f"{code:08x}-{size}"


def settings(config, plan):
    """What the mixture file says that steers a run, as {dotted key: JSON value}: kept in every
    checkpoint, so that a restart can name what was changed.

    Left out: what a ledger and a mixture keep (data, budgets, bounds), places of files, and keys
    that only warn.
    """
    found = {"mode": config.mode, "every": config.every, "lead": plan.lead, "seed": config.seed}
    found["target"] = None if config.target is None else config.target
    found["schedule"] = None if config.schedule is None else "a file"
    for section in ("probe", "controller"):
        fields = dataclasses.asdict(getattr(config, section))
        found |= {f"{section}.{key}": value for key, value in fields.items()}
    for key in ("floors", "caps"):
        named = zip(plan.names, found.pop(f"controller.{key}"), strict=True)
        found |= {f"controller.{key}.{name}": value for name, value in named}
    for domain, weight in zip(config.domains, plan.weights, strict=True):
        found[f"domains.{domain.name}.weight"] = float(f"{weight:.9g}")
        found[f"domains.{domain.name}.holdout"] = (
            "a prefix of its own" if isinstance(domain.holdout, str) else domain.holdout
        )
    return json.loads(json.dumps(found))


def _changed_settings(state, config, plan, also):
    """Sentences about settings that differ from those of the checkpoint, of domains in both."""
    before = state.get("settings", {"lead": state["lead"], "seed": state["seed"]})  # 0.2.0 kept those alone
    now = settings(config, plan)
    skipped = _OF_FLOW if also else ()
    return [
        f"{key} was {_said(before[key])}, it is {_said(now[key])}"
        for key in now
        if key in before and before[key] != now[key] and key not in skipped
    ]


def _said(value):
    return value if isinstance(value, str) else json.dumps(value)


def resumed(config, plan, fresh, state, consumed=0, stock=None, *, accept=False, attach=False, also=()):
    """The Resumed of a run that has consumed `consumed` samples.

    fresh: the Mixture of a run that begins; state: Hook.state_dict of the checkpoint, None where
    it has none; stock: the stock blend's weights f64[K] that a checkpoint without state was
    trained with. accept (--commute-accept): a mixture file that differs from the checkpoint's
    holds from here on. attach (--commute-attach): a run that began without the plug-in is taken
    over. also: how the weights planned ahead were found to differ. Raises ConfigError naming
    every difference and the flag that accepts it.
    """
    prints = [fingerprint(d.path, n) for d, n in zip(config.domains, plan.sizes, strict=True)]
    limits = {"samples": fresh.samples, "minimum": list(plan.minimum), "maximum": list(plan.maximum)}
    if state is None:
        return _without_state(config, plan, fresh, prints, limits, consumed, stock, attach)
    if consumed and consumed != state["mixture"]["index"]:
        raise ConfigError(
            f"--global-batch-size: the checkpoint stands at sample {state['mixture']['index']}, its "
            f"iterations times this batch are {consumed}; write the batch size that it was trained with"
        )
    book = takeover.Ledger(**state["ledger"])
    budgets = list(plan.budgets) if fresh.samples is not None else [None] * len(plan.names)
    if fresh.samples is None:
        limits = {name: state["mixture"][name] for name in limits}
    names = list(plan.names)
    other = takeover.differences(state["mixture"], book, names, prints, budgets, **limits)
    changed = _changed_settings(state, config, plan, also)
    index, also = state["mixture"]["index"], list(also)
    coming = [[at, list(w)] for at, w in plan.schedule if at > index]
    followed = state.get("settings", {}).get("schedule") is not None
    if (plan.schedule or followed) and coming != state["mixture"]["pending"]:
        also.append("the schedule's coming changes are others")
    found = other + changed + also
    if not found:
        return Resumed(Mixture.from_state(state["mixture"]), book, [])
    # between the host's data path and the plug-in's, which shuffle each in their own way
    anew = (state["mixture"]["samples"] is None) != (fresh.samples is None)
    order = [
        f"every domain goes on in a NEW order from sample {index} on, that of the other data path"
    ] * anew
    if not accept:
        raise ConfigError(
            f"{config.file}: it differs from the checkpoint: {'; '.join(found)}; put it back, or start with "
            f"--commute-accept to let it hold from sample {index} on{''.join(': ' + one for one in order)}"
        )
    if not other and not also and not anew and not any(".weight was " in one for one in changed):
        return Resumed(Mixture.from_state(state["mixture"]), book, found)
    found += order
    kept = state["mixture"] | ({"pending": []} if also else {})
    try:
        both = takeover.changed(kept, book, names, prints, plan.weights, budgets, **limits)
    except ValueError as error:
        raise ConfigError(f"{config.file}: the changed mixture cannot go on: {error}") from error
    for at, weights in [(index, w) for at, w in plan.schedule if at <= index][-1:] + coming:
        both[0].schedule(weights, int(at))
    return Resumed(*both, found)


def _without_state(config, plan, fresh, prints, limits, consumed, stock, attach):
    book = takeover.ledger(plan.names, prints)
    if consumed == 0:
        return Resumed(fresh, book, [])
    if not attach:
        raise ConfigError(
            f"{config.file}: the checkpoint was written without --commute after {consumed} samples; add "
            "--commute-attach to take the run over: counts of the stock blend are kept, every domain goes "
            "on in a new order"
        )
    if stock is None:
        raise ConfigError(
            "--commute-attach: name the stock blend with --train-data-path, so that its counts can be "
            "replayed"
        )
    if fresh.samples is None:
        fresh.skip(consumed)
        return Resumed(fresh, book, [f"taken over at sample {consumed} from a run without the plug-in"])
    try:
        mixture = takeover.attached(stock, consumed, plan.weights, list(plan.budgets), **limits)
    except ValueError as error:
        raise ConfigError(
            f"{config.file}: cannot take the run over: {error}; budgets count what was served before"
        ) from error
    served = ", ".join(f"{n} {int(c)}" for n, c in zip(plan.names, mixture.served, strict=True))
    told = f"taken over at sample {consumed} from the stock blend, which had served {served}"
    return Resumed(mixture, book, [f"{told}; every domain goes on in a NEW order"])
