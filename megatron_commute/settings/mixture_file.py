"""The mixture file: which keys it has, what may be written there, and the frozen `Config` it
becomes.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_commute.settings import memory
from megatron_commute.settings.cut_keys import refuse_cut
from megatron_commute.settings.schedule import SCALE
from megatron_commute.settings.values import Budget, Config, Controller, Domain, Probe
from megatron_commute.settings.yaml_checks import (
    LARGEST_NUMBER,
    Check,
    Document,
    Refused,
    anything,
    boolean,
    did_you_mean,
    integer,
    number,
    one_of,
    or_null,
    text,
    whole,
    written_number,
)

MODES = ("shadow", "fixed", "act")
DEFAULT_RATES = {"flow": 1.0}  # follows its plan, which no measurement's noise moves
DEFAULT_LAWS = {None: "tilt", "shadow": "tilt", "fixed": "tilt", "act": "flow"}  # by mode
METHODS = ("difference", "exact", "fused")
METRICS = ("identity", "adam")
MEMORIES = ("auto", *memory.MODES)
SHARE_TOLERANCE = 1e-6


def _path(cure: str) -> Check:
    def check(value: Any) -> str:
        written = text(cure)(value)
        try:
            if "\0" in os.fsdecode(os.fsencode(Path(written).expanduser())):
                raise Refused(cure)
        except (RuntimeError, UnicodeEncodeError):  # a home that nobody has, half a character
            raise Refused(cure) from None
        return written

    return check


def _prefix(value: Any) -> str:
    prefix = _path("write the prefix of a .bin/.idx pair")(value)
    if prefix.endswith((".bin", ".idx")):
        raise Refused(f"write the prefix without its ending: {prefix[:-4]}")
    return prefix


def _prefixes(value: Any) -> tuple[str, ...]:
    listed = value if isinstance(value, list) else [value]
    if not listed:
        raise Refused("write the prefix of a .bin/.idx pair, or a list of them")
    return tuple(_prefix(item) for item in listed)


def _budget(value: Any) -> Budget:
    amount, unit = whole(value), "sequences"
    match = re.fullmatch(r"([\d_.]+(?:[eE][+-]?\d+)?)\s*([kMGBT]?)tok(?:ens)?", str(value), flags=re.ASCII)
    if match and (tokens := written_number(match[1])) is not None and tokens <= LARGEST_NUMBER:
        amount, unit = whole(tokens.scaleb(SCALE[match[2]])), "tokens"
    if amount is None or amount <= 0:
        raise Refused("write a positive number of sequences (12000), of tokens (3.1Mtok), or null")
    return Budget(amount=amount, unit=unit)


def _holdout(value: Any) -> int | str:
    if isinstance(value, str):
        return _prefix(value)
    return integer("write a positive number of sequences or the prefix of a .bin/.idx pair", 1)(value)


_share = number("write a share between 0 and 1", lambda x: 0 <= x <= 1)


def shares(value: Any) -> float | dict[str, float]:
    if isinstance(value, Mapping):
        return {name: _share(share) for name, share in value.items()}
    return _share(value)


def mixture_of(instead: str) -> Check:
    """Shares by name that sum to 1; instead: what else may stand here, for the cure."""
    cure = f"write shares of the domains that sum to 1, such as {{en: 0.5, ru: 0.5}}, or {instead}"

    def check(value: Any) -> dict[str, float]:
        if not isinstance(value, Mapping) or not value:
            raise Refused(cure)
        shares = {name: number(cure, lambda x: 0 <= x <= 1)(share) for name, share in value.items()}
        if abs(sum(shares.values()) - 1) > SHARE_TOLERANCE:
            raise Refused(f"these sum to {sum(shares.values()):.6g}, {cure}")
        return shares

    return check


def _target(value: Any) -> str | dict[str, float]:
    return "each" if value == "each" else mixture_of("each, or null")(value)


_law = text("write the name of a law, such as flow or hold")


def _laws(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise Refused("write a list of laws, such as [hold, tilt]")
    return tuple(dict.fromkeys(_law(law) for law in value))


FILE_KEYS: dict[str, Check] = {
    "domains": anything,
    "target": or_null(_target),
    "mode": one_of(MODES),
    "every": integer("write a positive number of training steps between two probes", 1),
    "lead": or_null(integer("write a positive number of samples, or null for 4 global batches", 1)),
    "seed": integer("write an integer that is not negative", 0),
    "probe": anything,
    "controller": anything,
    "schedule": or_null(_path("write the path of a CSV file, or null")),
    "measure_budget": number("write a share of the training compute, such as 0.005", lambda x: 0 < x <= 1),
}
DOMAIN_KEYS: dict[str, Check] = {
    "path": _prefixes,
    "weight": or_null(_share),
    "budget": or_null(_budget),
    "min": _share,
    "max": _share,
    "holdout": or_null(_holdout),
}
PROBE_KEYS: dict[str, Check] = {
    "samples": integer("write a positive number of sequences", 1),
    "splits": integer("write 2 or more, standard errors come from the splits", 2),
    "method": one_of(METHODS),
    "metric": one_of(METRICS),
    "memory": one_of(MEMORIES),
    "offload": boolean,
    "time_limit": or_null(number("write a positive number of seconds, or null", lambda x: x > 0)),
}
CONTROLLER_KEYS: dict[str, Check] = {
    "law": _law,
    "strength": number("write a positive number", lambda x: x > 0),
    "memory": number("write a number of 0 or more, such as 2.5", lambda x: x >= 0),
    "rate": number(
        "write the largest change of a weight in one decision, such as 0.05", lambda x: 0 < x <= 1
    ),
    "confidence": number("write a probability from 0.5 to below 1, such as 0.95", lambda x: 0.5 <= x < 1),
    "floors": shares,
    "caps": shares,
    "cooldown": integer("write the number of decisions to rest after a change, 0 or more", 0),
    "freeze": number("write a part of the run above 0, such as 0.9; 1: never", lambda x: 0 < x <= 1),
    "compare": _laws,
}


def load(path: str | Path) -> Config:
    """Reads and checks a mixture file; data and run are looked at by `config.resolve`.

    Relative paths in the file start at its folder. Raises ConfigError naming file, line, key and
    cure.
    """
    document = Document(str(path))
    refuse_cut(document)
    values = document.section("", document.tree, FILE_KEYS)
    domains = _domains(document, values.pop("domains", None))
    names = [domain.name for domain in domains]
    probe = Probe(**document.section("probe", values.pop("probe", None), PROBE_KEYS))
    if probe.samples % probe.splits:
        fitting = -(-probe.samples // probe.splits) * probe.splits
        problem = f"{probe.samples} is not divisible by the {probe.splits} splits"
        raise document.error("probe.samples", problem, f"write {fitting}, or other probe.splits")
    if probe.memory == "sharded" and probe.method != "difference":
        problem = f"method {probe.method} needs whole parameters on every rank"
        raise document.error("probe.memory", problem, "write full or scores, or method: difference")
    if probe.offload and probe.method != "difference":
        problem = f"method {probe.method} needs its direction beside the parameters"
        raise document.error("probe.offload", problem, "write false, or method: difference")
    law = _controller(document, values.pop("controller", None), names, DEFAULT_LAWS[values.get("mode")])
    if isinstance(values.get("target"), dict):
        refuse_strangers(document, "target", values["target"], names)
    if values.get("target") == "each" and values.get("mode") == "act":
        problem = "mode act cannot act on several targets at once"
        raise document.error("target", problem, "write shares of the domains, or mode: shadow")
    if values.get("schedule") is not None:
        if values.get("mode") != "fixed":
            raise document.error("schedule", "is followed in mode fixed only", "write mode: fixed")
        values["schedule"] = _beside(document.file, values["schedule"])
    return Config(
        domains=domains,
        probe=probe,
        controller=law,
        file=document.file,
        digest=document.digest(),
        lines=document.lines,
        **values,
    )


def _controller(document: Document, value: Any, names: list[str], default_law: str) -> Controller:
    law = {"law": default_law} | document.section("controller", value, CONTROLLER_KEYS)
    law.setdefault("rate", DEFAULT_RATES.get(law["law"], Controller.rate))
    for key, default in (("floors", 0.0), ("caps", 1.0)):
        law[key] = by_domain(document, f"controller.{key}", law.get(key, {}), names, default)
    for name, floor, cap in zip(names, law["floors"], law["caps"], strict=True):
        if floor > cap:
            problem = f"{floor:g} is above the cap {cap:g} of {name}"
            raise document.error("controller.floors", problem, "write a lower floor or a higher cap")
    return Controller(**law)


def _domains(document: Document, value: Any) -> tuple[Domain, ...]:
    cure = "write at least one domain, such as domains: {en: {path: data/en}}"
    if not isinstance(value, Mapping) or not value:
        raise document.error("domains", "no domain is named", cure)
    domains, reader_of = [], {}
    for name, item in value.items():
        key = f"domains.{name}"
        if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
            raise document.error(
                key, "is no name", "use letters, digits, - and _, in quotes if all are digits"
            )
        written = document.section(key, item, DOMAIN_KEYS)
        if "path" not in written:
            raise document.error(f"{key}.path", "missing", "write the prefix of a .bin/.idx pair")
        paths = tuple(_beside(document.file, prefix) for prefix in written.pop("path"))
        for path in paths:
            if path in reader_of:
                problem = f"{path} is read by domain {reader_of[path]} already"
                raise document.error(f"{key}.path", problem, "name every prefix once")
            reader_of[path] = name
        minimum, maximum = written.pop("min", 0.0), written.pop("max", 1.0)
        if minimum > maximum:
            raise document.error(f"{key}.min", f"{minimum:g} is above max {maximum:g}", "write a lower one")
        if isinstance(written.get("holdout"), str):
            written["holdout"] = _beside(document.file, written["holdout"])
            if written["holdout"] in reader_of:
                raise document.error(f"{key}.holdout", "is trained on as well", "name a prefix of its own")
        domains.append(Domain(name=name, path=paths, minimum=minimum, maximum=maximum, **written))
    return tuple(domains)


def _beside(file: str, path: str) -> str:
    return os.path.normpath(Path(file).absolute().parent / Path(path).expanduser())


def by_domain(
    document: Document, key: str, value: float | dict[str, float], names: list[str], default: float
) -> tuple[float, ...]:
    if not isinstance(value, dict):
        return (value,) * len(names)
    refuse_strangers(document, key, value, names)
    return tuple(value.get(name, default) for name in names)


def refuse_strangers(document: Document, key: str, shares: Mapping, names: list[str]) -> None:
    for name in shares:
        if name not in names:
            cure = f"the domains are {', '.join(names)}{did_you_mean(name, names)}"
            raise document.error(f"{key}.{name}", "there is no such domain", cure)
