"""Replay: what other laws would have decided on the measurements of a record. Pure functions of its lines.

Every probe line carries the Situation that its decision saw, so the law that ran decides again what was logged, to
the last bit. Another law sees what was measured under the weights that the run did use: it is not a simulation of
another run.
"""

import dataclasses

import numpy as np

from megatron_commute import control, record
from megatron_commute.laws import LAWS

GUARDS = {
    "rate": float,
    "confidence": float,
    "strength": float,
    "cooldown": int,
    "freeze": float,
    "gate": float,
    "harm": float,
    "floors": float,
    "caps": float,
    "end.share": float,
}


@dataclasses.dataclass(frozen=True)
class Replayed:
    """One decision of one law: weights f64[K] wished for from `effective_sample` on, None where they would have stayed;
    happened f64[K]: what the run did; expected: what the law itself predicted; calibrated, calibrated_se: change of the
    target loss by the effects measured at that probe, nats, relative to the weights before (None where none was
    measured).
    """

    step: int
    sample: int
    effective_sample: int
    weights: list | None
    before: list
    happened: list
    reason: str
    expected: float | None
    expected_se: float | None
    calibrated: float | None
    calibrated_se: float | None


@dataclasses.dataclass(frozen=True)
class Told:
    """A replay of one record: law and guardrails asked for, Replayed decisions, and (repeated exactly, logged) of the
    law that ran.
    """

    law: str
    names: list
    guards: dict
    decisions: list
    repeated: tuple


def told(run, law=None, texts=()):
    """The Told of a record (a file, or the folder that holds it). ValueError, FileNotFoundError as `replay` and
    `record.find`.
    """
    lines = record.read(run)
    changed = guards(texts)
    decisions = replay(lines, law, changed)
    start = next(line for line in lines if line["event"] == "start")
    return Told(law or start["controller"]["law"], start["names"], changed, decisions, agreement(lines))


def as_dict(found):
    """JSON form of a Told."""
    return dataclasses.asdict(found) | {"repeated": list(found.repeated)}


def sentence(found):
    """One line about what a replay is worth and what it says."""
    moved = sum(1 for row in found.decisions if row.weights is not None)
    known = [row for row in found.decisions if row.calibrated is not None]
    text = f"{moved} of {len(found.decisions)} decisions would have moved the weights"
    if known:
        total, error = sum(r.calibrated for r in known), sum(r.calibrated_se**2 for r in known) ** 0.5
        text += (
            f"; by the measured effects they change the target loss by {total:+.2g} ± {error:.1g} nats in all"
        )
    else:
        text += "; no effect was measured, so none is expected of them"
    return f"{text}; the law that ran repeats {found.repeated[0]} of {found.repeated[1]} decisions exactly"


def guards(texts):
    """{field of a Situation: value} of texts such as "rate=0.1". ValueError names the text and the cure."""
    found = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in GUARDS:
            raise ValueError(
                f"--guard {text}: no such guardrail; write one of {', '.join(GUARDS)}, such as rate=0.1"
            )
        try:
            found[name.replace(".", "_")] = GUARDS[name](value)
        except ValueError as error:
            raise ValueError(f"--guard {text}: {value!r} is no number; write {name}=NUMBER") from error
    return found


def replay(records, law=None, changed=None):
    """The Replayed decisions of `law` (default: the one that ran) on the lines of `record.read`.

    changed: of `guards`. Raises ValueError where the law is unknown or no line carries what decisions saw.
    """
    start = next((line for line in records if line["event"] == "start"), None)
    lines = [line for line in records if line["event"] == "probe" and line.get("situation")]
    if start is None or not lines:
        raise ValueError("no line of this record carries what a decision saw: there is nothing to replay")
    law = law or start["controller"]["law"]
    if law not in LAWS:
        raise ValueError(f"--law {law}: write one of {', '.join(LAWS)}")
    memory, found = {}, []
    for line in lines:
        seen = with_guards(control.from_facts(line["situation"]), changed or {})
        decision = control.decisions([law], seen, {law: memory})[law]
        memory = decision.memory
        found.append(_row(line, seen, decision, start))
    return found


def with_guards(seen, changed):
    """The Situation with some guardrails written anew; floors and caps are one number for all domains."""
    K = len(seen.weights)
    wide = {
        name: np.full(K, value) if name in ("floors", "caps") else value for name, value in changed.items()
    }
    return dataclasses.replace(seen, **wide)


def _row(line, seen, decision, start):
    batch = start["global_batch"]
    effective = line["effective_sample"] or -(-(line["sample"] + start["lead"]) // batch) * batch
    weights = None if decision.weights is None else decision.weights.tolist()
    return Replayed(
        *(line["step"], line["sample"], effective, weights, seen.weights.tolist(), line["weights_next"]),
        *(decision.reason, decision.expected, decision.expected_se),
        *expected_effect(seen, decision.weights),
    )


def expected_effect(seen, weights):
    """(change of the target loss in nats, its standard error) of moving to `weights` f64[K] now and giving it back
    later, by the effects that were measured; (None, None) where none were.
    """
    if seen.effect is None:
        return None, None
    if weights is None:
        return 0.0, 0.0
    moved = np.asarray(weights) - seen.weights
    return float(moved @ seen.effect), float(np.sqrt(moved**2 @ seen.effect_se**2))


def agreement(records):
    """(decisions that replaying the law that ran repeats exactly, decisions logged): a record checks itself."""
    start = next(line for line in records if line["event"] == "start")
    law = start["controller"]["law"]
    lines = [line for line in records if line["event"] == "probe" and line.get("situation")]
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
        "effect by measurement",
        "reason",
    ]
    text = []
    for row in replayed:
        would = "stay" if row.weights is None else _weights(row.weights)
        effect = "-" if row.calibrated is None else f"{row.calibrated:+.2g} ± {row.calibrated_se:.1g}"
        text.append(
            [row.step, row.sample, _weights(row.before), would, _weights(row.happened), effect, row.reason]
        )
    return headers, text


def _weights(values):
    return " ".join(f"{value:.3f}" for value in values)
