"""Does a schedule help? Fresh seeds, each paired with the constant mixture; looks after 4, 8 and 16
of them, with the error split between the looks.
"""

import dataclasses
import math

import numpy as np

from megatron_commute.intervals import CONFIDENCE, student

LOOKS = (4, 8, 16)  # seeds
GAIN, NOTHING, HARM, OPEN = "gain", "nothing", "harm", "open"  # verdicts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """Of a final loss, against the constant mixture, over pairs of seeds."""

    name: str
    # of the loss
    constant: float
    # mean loss of the constant mixture, nats per token
    change: float
    # mean, in nats
    interval: float
    # half of its interval at the look's confidence
    most: float
    # one-sided upper 95 % bound of the change
    worse: float
    # one-sided probability of so low a change, were there no gain

    def as_dict(self):
        """Fields and percentages."""
        percents = {"percent": self.percent, "percent_interval": self.percent_interval}
        return dataclasses.asdict(self) | percents

    @property
    def percent(self):
        return 100 * self.change / self.constant

    @property
    def percent_interval(self):
        return 100 * self.interval / self.constant


def change(name, ours, constant, looks=LOOKS):
    """Change of a loss, from those of paired runs f64[n] each, n >= 2."""
    from scipy.special import stdtr

    ours, constant = np.asarray(ours, dtype=np.float64), np.asarray(constant, dtype=np.float64)
    n, moved = len(ours), ours - constant
    error = float(moved.std(ddof=1)) / math.sqrt(n)
    confidence = 1 - (1 - CONFIDENCE) / len(looks)
    one_sided = student(n - 1, 2 * CONFIDENCE - 1)
    t = moved.mean() / error if error else math.copysign(math.inf, moved.mean()) if moved.mean() else 0.0
    return Change(
        name=name,
        constant=float(constant.mean()),
        change=float(moved.mean()),
        interval=student(n - 1, confidence) * error,
        most=float(moved.mean()) + one_sided * error,
        worse=float(stdtr(n - 1, t)),
    )


def verdict(target, domains, harm, last):
    """One of GAIN, NOTHING, HARM and, before the `last` look, OPEN.

    target: its Change; domains: Changes of the trained domains; harm: the part of its loss that one
    of them may lose, by the upper bound.
    """
    gains = target.change + target.interval < 0
    harmless = all(own.most <= harm * own.constant for own in domains)
    if gains and harmless:
        return GAIN
    if not gains:
        return NOTHING if last or target.change - target.interval > 0 else OPEN
    return HARM if last or any(own.change > harm * own.constant for own in domains) else OPEN


def equivalent(gain, at, gains):
    """The x at which a curve through (0, 0) and (at, gains), straight between them, reaches `gain`;
    None beyond it. at, gains: lists; a gain that falls is noise and counts as the one before.
    """
    reached = np.maximum.accumulate([0.0, *gains])
    return None if gain > reached[-1] else float(np.interp(gain, reached, [0.0, *at]))
