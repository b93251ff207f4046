"""What a decision may look at: everything a law or a guardrail reads, as it will be when the
decision takes effect.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Situation:
    """What a decision may look at, as it will be when it takes effect. K domains."""

    weights: np.ndarray
    """f64[K] in force"""
    remaining: np.ndarray
    """f64[K] samples left of each budget, NaN for endless domains"""
    initial: np.ndarray
    """f64[K] planned weights, which share out what the budgets leave to endless domains"""
    samples_left: int
    """to the end of the run"""
    window: int
    """samples until the next decision"""
    score: np.ndarray
    """f64[K]; above zero: delay"""
    score_se: np.ndarray
    """f64[K] standard error"""
    dof: int
    """of score_se: replicates - 1"""
    minimum: np.ndarray
    """f64[K], the domains' own bound, kept to the end"""
    maximum: np.ndarray
    """f64[K], the same from above"""
    floors: np.ndarray
    """f64[K], least that a law may ask"""
    caps: np.ndarray
    """f64[K], most that a law may ask"""
    rate: float
    """largest change of one weight"""
    confidence: float
    """of the two-sided interval outside which a score counts"""
    strength: float
    """of the law"""
    target: np.ndarray | None = None
    """f64[K] shares of the target"""
    losses: np.ndarray | None = None
    """f64[K] mean training loss of each domain since the last decision, nats"""
    scheduled: np.ndarray | None = None
    """f64[K], the schedule's weights for this window"""
    memory: dict = dataclasses.field(default_factory=dict)
    """what the law's last decision asked to keep"""
    decisions_since_change: int = 2**31
    """decisions since the last one that changed the weights; 0: that was the last one"""
    cooldown: int = 1
    """decisions to rest after a change"""
    progress: float = 0.0
    """samples used / samples in all"""
    freeze: float = 1.0
    """part of the run at whose end the law stops"""
    frozen: bool = False
    """the weights stay, whatever the law says"""
    owed: np.ndarray | None = None
    """f64[K] samples that every domain is still to get, by the weights so far; law flow"""
    shares: np.ndarray | None = None
    """f64[K] planned part of the run's samples; law flow"""
    segments: np.ndarray | None = None
    """f64[M] samples of each segment of what is left, one of which ends with the window; law
    flow"""
    profile: np.ndarray | None = None
    """f64[M] mean p of each of them, 0 to 1; law flow"""
    kept: int = 0
    """first segments that stay at the planned mixture; law flow"""


def situation(*, config, plan, at, ahead, window, measured, control, **known):
    """The Situation at sample `at`, where a decision would take effect.

    ahead: the mixture there. window: samples until the next decision. measured: probe.Measurement
    of one target, None where nothing was measured. control: what people wrote
    (control_file.Control). known: losses, decisions_since_change, target, strength, and what law
    flow needs.
    """
    law, K = config.controller, len(plan.names)
    budgets = np.array([np.nan if b is None else b for b in plan.budgets], dtype=np.float64)
    caps = np.array(law.caps or [1.0] * K)
    if control.caps is not None:
        caps = np.minimum(caps, control.caps)
    scheduled = [weights for at, weights in plan.schedule if at <= ahead.index]
    return Situation(
        weights=np.asarray(ahead.weights, dtype=np.float64),
        remaining=budgets - np.asarray(ahead.served),
        initial=plan.weights,
        samples_left=plan.samples - at,
        window=window,
        score=np.full(K, np.nan) if measured is None else measured.score[0],
        score_se=np.full(K, np.nan) if measured is None else measured.score_se[0],
        dof=config.probe.splits - 1,
        minimum=plan.minimum,
        maximum=plan.maximum,
        floors=np.array(law.floors or [0.0] * K),
        caps=caps,
        rate=law.rate,
        confidence=law.confidence,
        scheduled=np.asarray(scheduled[-1]) if scheduled else None,
        cooldown=law.cooldown,
        progress=min(1.0, at / plan.samples),
        freeze=law.freeze,
        frozen=control.freeze,
        **known,
    )


def facts(situation):
    """A Situation as JSON values for the record, without what no law was given; NaN is None."""
    values = {}
    for field in dataclasses.fields(situation):
        value = getattr(situation, field.name)
        if field.name == "memory" or value is None:
            continue
        values[field.name] = (
            np.asarray(value).tolist() if isinstance(value, np.ndarray | np.generic) else value
        )
    return values


def from_facts(facts):
    """The Situation that `facts` described, or a line of a record says; fields that were cut since
    are left out.
    """
    values = {}
    for field in dataclasses.fields(Situation):
        if field.name in facts:
            value = facts[field.name]
            values[field.name] = np.array(value, dtype=np.float64) if isinstance(value, list) else value
    return Situation(**values)
