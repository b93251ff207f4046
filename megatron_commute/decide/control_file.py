"""The control file: how people intervene in a run that goes on.

RUN/commute.control.yaml may be written, changed and removed while the run goes on:

    freeze: true                        # the weights stay
    weights: {en: 0.5, ru: 0.5}         # these instead, budgets permitting ...
    schedule: late.csv                  # ... or those of a schedule file, all of it to come
    target: {ru: 1}                     # mode act: what the law is to serve
    strength: 0.5                       # mode act: of the law
    from: 128000                        # from this sample on; default: as soon as possible
    caps: {en: 0.6}                     # most that a law may ask, one number or NAME: share

Each version of its content holds until the next one; removing the file changes nothing. A broken
version is told once and ignored: nothing that stands in this file ends a run or holds it up.
"""

import dataclasses
import os
from pathlib import Path

from megatron_commute.decide import control_text
from megatron_commute.decide.flow import STRONGEST
from megatron_commute.settings import schedule, text_files
from megatron_commute.settings.batches import Batches
from megatron_commute.settings.mixture_file import (
    SHARE_TOLERANCE,
    by_domain,
    mixture_of,
    refuse_strangers,
    shares,
)
from megatron_commute.settings.yaml_checks import ConfigError, Document, Refused, integer, number, text

NAME = "commute.control.yaml"
MOST_CHANGES = 2000  # of a schedule
LAST_SAMPLE = 2**53  # whole numbers up to here are exact in float64
LONGEST_WORD = 400  # characters of a complaint


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What a run can follow, against which a control file is checked. K domains."""

    names: tuple[str, ...]
    # of the domains
    feeds: bool
    # whether the plug-in feeds training
    acts: bool = True
    # whether a law moves the weights
    samples: int = LAST_SAMPLE
    # of the run
    seq_length: int = 1
    # tokens of a sample
    batches: Batches = dataclasses.field(default_factory=lambda: Batches(1))
    # samples of every step
    shares: tuple[float, ...] | None = None
    # planned part of the samples of each domain; None: all have some
    holdouts: tuple[int, ...] | None = None
    # held-out sequences of each domain; None: all have some


def limits(config, plan, run) -> Limits:
    """Those of config.load, config.resolve and config.Run."""
    return Limits(
        names=tuple(plan.names),
        feeds=config.mode != "shadow",
        acts=config.mode == "act",
        samples=plan.samples,
        seq_length=run.seq_length,
        batches=run.batches,
        shares=tuple(plan.shares.tolist()),
        holdouts=tuple(plan.holdouts),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Control:
    """One version of the file."""

    freeze: bool = False
    # the weights stay
    weights: tuple[float, ...] | None = None
    # f64[K]
    at: int = 0
    # sample from which weights, schedule, target and strength hold; 0: as soon as possible
    caps: tuple[float, ...] | None = None
    # f64[K]
    target: tuple[float, ...] | None = None
    # f64[K]; None: the mixture file's
    strength: float | None = None
    # None: the mixture file's
    schedule: tuple[tuple[int, tuple[float, ...]], ...] | None = None
    # (sample, weights f64[K])

    @classmethod
    def of(cls, values):
        """The Control of `dataclasses.asdict` after a way through JSON."""
        return cls(**{key: _frozen(value) for key, value in values.items()})


def _frozen(value):
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _flag(value):
    if not isinstance(value, bool):
        raise Refused("write true or false")
    return value


def _sample(value):
    found = integer("write a sample of the run, 0 or more", 0)(value)
    if found > LAST_SAMPLE:
        raise Refused("write a sample of the run")
    return found


CONTROL_KEYS = {
    "freeze": _flag,
    "weights": mixture_of("leave the key out"),
    "schedule": text("write the path of a CSV file, or leave the key out"),
    "target": mixture_of("leave the key out"),
    "strength": number(f"write a number above 0, at most {STRONGEST:g}", lambda x: 0 < x <= STRONGEST),
    "from": _sample,
    "caps": shares,
}


def read(path, limits: Limits):
    """(Control, digest of its content) of a control file.

    Raises ConfigError naming file, line, key and cure.
    """
    try:
        content = text_files.read(path, control_text.LARGEST, "a text file")
    except text_files.TextFileError as error:
        raise ConfigError(str(error)) from error
    control_text.check(content, str(path))
    document = Document(str(path), content)
    values = document.section("", document.tree, CONTROL_KEYS)
    _refuse_out_of_place(document, values, limits)
    weights, caps = values.get("weights"), values.get("caps")
    if weights is not None:
        weights = _of_all(document, "weights", weights, limits)
    if caps is not None:
        caps = by_domain(document, "caps", caps, list(limits.names), 1.0)
        if sum(caps) < 1 - SHARE_TOLERANCE:
            raise document.error("caps", f"they sum to {sum(caps):g}", "write caps that sum to at least 1")
        for name, cap, weight in zip(limits.names, caps, weights or [0.0] * len(caps), strict=True):
            if weight > cap + SHARE_TOLERANCE:
                problem = f"{weight:g} of {name} is above its cap {cap:g}"
                raise document.error("weights", problem, "write a lower weight or a higher cap")
    control = Control(
        freeze=values.get("freeze", False),
        weights=weights,
        at=values.get("from", 0),
        caps=caps,
        target=_target(document, values.get("target"), limits),
        strength=values.get("strength"),
        schedule=_changes(document, values.get("schedule"), limits),
    )
    return control, document.digest()


def _refuse_out_of_place(document, values, limits):
    """Keys that this run cannot follow, or that contradict one another."""
    for key in ("weights", "schedule"):
        if key in values and not limits.feeds:
            problem = "the host's own data path decides in mode shadow"
            raise document.error(key, problem, "leave them out, or run in mode fixed or act")
    for key in ("target", "strength"):
        if key in values and not limits.acts:
            problem = "no law moves the weights of this run"
            raise document.error(key, problem, "leave it out, or run in mode act")
    if "weights" in values and "schedule" in values:
        raise document.error("schedule", "there are weights beside it", "write one of the two")
    if "from" in values and not {"weights", "schedule", "target", "strength"} & set(values):
        raise document.error("from", "there are no weights that could hold from there", "write weights too")


def _of_all(document, key, given, limits):
    """Shares f64[K] of every domain, sum 1."""
    refuse_strangers(document, key, given, limits.names)
    return tuple(given.get(name, 0.0) for name in limits.names)


def _target(document, given, limits):
    if given is None:
        return None
    target = _of_all(document, "target", given, limits)
    for k, name in enumerate(limits.names):
        if target[k] and limits.shares is not None and not limits.shares[k]:
            problem = "no samples of it are planned"
            raise document.error(f"target.{name}", problem, "take it out, or give the domain a budget")
        if target[k] and limits.holdouts is not None and not limits.holdouts[k]:
            problem = "it has no held-out data, on which a target is measured"
            raise document.error(f"target.{name}", problem, "take it out, or give the domain a holdout")
    return target


def _changes(document, file, limits):
    """(sample, weights f64[K]) of a schedule file, whose path starts at the folder of the control
    file.
    """
    if file is None:
        return None
    path = Path(document.file).absolute().parent / Path(file).expanduser()
    try:
        points = schedule.of_text(
            text_files.read(path, control_text.LARGEST, "a CSV file"),
            path,
            limits.names,
            limits.samples,
            limits.seq_length,
        )
    except ValueError as error:
        raise document.error("schedule", *str(error).rsplit("; ", 1)) from error
    found = schedule.changes(points, limits.batches) if len(points) <= MOST_CHANGES else ()
    if not 0 < len(found) <= MOST_CHANGES:
        raise document.error("schedule", "it has too many points", f"write {MOST_CHANGES} changes at most")
    return tuple((int(at), tuple(map(float, weights))) for at, weights in found)


class Watch:
    """Looks for new versions of a control file; one stat call while it stays as it is."""

    def __init__(self, path, limits: Limits):
        self.path, self.limits = Path(path), limits
        self.digest, self.told, self._seen = "", "", None

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
            control, digest = read(self.path, self.limits)
        except ConfigError as error:
            return self._complaint(str(error))
        except Exception as fault:  # whatever a parser makes of it, training goes on
            kind = f"{type(fault).__name__}: {fault}"
            known = ", ".join(CONTROL_KEYS)
            return self._complaint(f"{self.path}: is no control file ({kind[:80]}); known here: {known}")
        self.told = ""
        if digest[:12] == self.digest:
            return None
        self.digest = digest[:12]
        return control

    def _complaint(self, words):
        """The complaint on one line; None where it was told last time already."""
        line = " ".join(words.split())
        line = line if len(line) <= LONGEST_WORD else line[: LONGEST_WORD - 3] + "..."
        if line == self.told:
            return None
        self.told = line
        return line
