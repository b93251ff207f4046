"""Replay: what other laws would have decided on the measurements of a record. Pure functions of its
lines.

Every probe line carries the Situation that its decision saw, so the law that ran decides again what
was logged, to the last bit. Another law sees what was measured under the weights that the run did
use: it is not a simulation of another run.
"""

import dataclasses

import numpy as np

from megatron_commute.decide import controller
from megatron_commute.decide.laws import LAWS
from megatron_commute.decide.situation import from_facts
from megatron_commute.record import log as record
from megatron_commute.settings.batches import Batches
from megatron_commute.settings.cut_keys import CUT_LAWS, CUT_SINCE

GUARDS = {
    "rate": float,
    "confidence": float,
    "strength": float,
    "cooldown": int,
    "freeze": float,
    "floors": float,
    "caps": float,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replayed:
    """One decision of one law."""

    step: int
    # of the probe
    sample: int
    # of the probe
    effective_sample: int
    # from which the weights would have held
    weights: list | None
    # wished for, f64[K]; None where they would have stayed
    before: list
    # in force, f64[K]
    happened: list
    # what the run did, f64[K]
    reason: str
    # of the law, in words


@dataclasses.dataclass(frozen=True, kw_only=True)
class Told:
    """A replay of one record."""

    law: str
    # asked for
    names: list
    # of the domains
    guards: dict
    # guardrails asked for
    decisions: list
    # Replayed, in order
    repeated: tuple
    # (decisions of the law that ran which replaying repeats exactly, decisions logged)


def told(run, law=None, texts=()):
    """The Told of a record (a file, or the folder that holds it).

    ValueError, FileNotFoundError as `replay` and `record.find`.
    """
    lines = record.read(run)
    changed = guards(texts)
    decisions = replay(lines, law, changed)
    start = next(line for line in lines if line["event"] == "start")
    return Told(
        law=law or start["controller"]["law"],
        names=start["names"],
        guards=changed,
        decisions=decisions,
        repeated=agreement(lines),
    )


def as_dict(found):
    """JSON form of a Told."""
    return dataclasses.asdict(found) | {"repeated": list(found.repeated)}


def sentence(found):
    """One line about what a replay says and whether it repeats what ran."""
    moved = sum(1 for row in found.decisions if row.weights is not None)
    return (
        f"{moved} of {len(found.decisions)} decisions would have moved the weights; the law that ran repeats "
        f"{found.repeated[0]} of {found.repeated[1]} decisions exactly"
    )


def guards(texts):
    """{field of a Situation: value} of texts such as "rate=0.1". ValueError names the text and the
    cure.
    """
    found = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in GUARDS:
            raise ValueError(
                f"--guard {text}: no such guardrail; write one of {', '.join(GUARDS)}, such as rate=0.1"
            )
        try:
            found[name] = GUARDS[name](value)
        except ValueError as error:
            raise ValueError(f"--guard {text}: {value!r} is no number; write {name}=NUMBER") from error
    return found


def replay(records, law=None, changed=None):
    """The Replayed decisions of `law` (default: the one that ran) on the lines of `record.read`.

    changed: of `guards`. Raises ValueError where the law is unknown or no line carries what
    decisions saw.
    """
    start = next((line for line in records if line["event"] == "start"), None)
    lines = _decisions(records)
    if start is None or not lines:
        raise ValueError("no line of this record carries what a decision saw: there is nothing to replay")
    ran = start["controller"]["law"]
    law = law or ran
    if law in CUT_LAWS:
        raise ValueError(f"law {law} was cut in {CUT_SINCE} ({CUT_LAWS[law]}); replay it with version 0.1.0")
    if law not in LAWS:
        raise ValueError(f"--law {law}: write one of {', '.join(LAWS)}")
    if LAWS[law].planned and law != ran and all(line["situation"].get("profile") is None for line in lines):
        raise ValueError(
            f"--law {law}: this record does not carry the learning rates to come; run with compare: [{law}]"
        )
    memory, found = {}, []
    for line in lines:
        seen = with_guards(_seen(line), changed or {})
        decision = controller.decisions([law], seen, {law: memory})[law]
        memory = decision.memory
        found.append(_row(line, seen, decision, start))
    return found


def _decisions(records):
    """Lines that carry what a decision saw."""
    return [line for line in records if line["event"] in ("probe", "decision") and line.get("situation")]


def _seen(line):
    """The Situation of a probe line. ValueError where what was cut since had a say in it."""
    if line["situation"].get("end_share") or line.get("calibration"):
        raise ValueError(
            "an end phase or calibrated signals had a say in the decisions of this record; they were cut "
            f"in {CUT_SINCE}: replay it with version 0.1.0"
        )
    return from_facts(line["situation"])


def with_guards(seen, changed):
    """The Situation with some guardrails written anew; floors and caps are one number for all
    domains.
    """
    K = len(seen.weights)
    wide = {
        name: np.full(K, value) if name in ("floors", "caps") else value for name, value in changed.items()
    }
    return dataclasses.replace(seen, **wide)


def _row(line, seen, decision, start):
    batches = Batches(start["global_batch"])
    effective = line["effective_sample"] or batches.next(line["sample"] + start["lead"])
    weights = None if decision.weights is None else decision.weights.tolist()
    return Replayed(
        step=line["step"],
        sample=line["sample"],
        effective_sample=effective,
        weights=weights,
        before=seen.weights.tolist(),
        happened=line["weights_next"],
        reason=decision.reason,
    )


def agreement(records):
    """(decisions that replaying the law that ran repeats exactly, decisions logged): a record
    checks itself.
    """
    start = next(line for line in records if line["event"] == "start")
    law = start["controller"]["law"]
    lines = [line for line in _decisions(records) if law in line["laws"]]
    again = replay(records)
    same = [
        row.weights == line["laws"][law]["weights"] and row.reason == line["laws"][law]["reason"]
        for row, line in zip(again, lines, strict=True)
    ]
    return sum(same), len(same)


def rows(replayed, names):
    """Headers and rows of text for a table: what the law would have done, beside what happened."""
    headers = [
        "step",
        "sample",
        "weights before",
        "would have been",
        "were",
        "reason",
    ]
    text = []
    for row in replayed:
        would = "stay" if row.weights is None else _weights(row.weights)
        text.append([row.step, row.sample, _weights(row.before), would, _weights(row.happened), row.reason])
    return headers, text


def _weights(values):
    return " ".join(f"{value:.3f}" for value in values)
