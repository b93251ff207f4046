"""The learning rates of a run, as Megatron computes them from its flags.

Megatron counts in samples and sets the rate after every step, so step n (0-based) is trained at the
rate of n global batches: under a warm-up the first step has the rate --lr-warmup-init, which is 0.
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np

STYLES = ("constant", "linear", "cosine", "inverse-square-root", "WSD")
WSD_STYLES = ("exponential", "linear", "cosine", "minus_sqrt")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RateSchedule:
    """Megatron's flags of the learning rate; ValueError with its cure for those that make no
    schedule.
    """

    lr: float
    # peak rate
    train_iters: int
    # steps of the run
    global_batch_size: int = 1
    # samples of a step; matters to inverse-square-root without a warm-up only
    min_lr: float = 0.0
    # rate at and after the end of the decay
    lr_warmup_iters: float = 0
    # steps of the linear warm-up
    lr_warmup_fraction: float | None = None
    # the warm-up as a part of the decay steps, in place of lr_warmup_iters
    lr_warmup_init: float = 0.0
    # rate at which the warm-up begins
    lr_decay_style: str = "cosine"
    # one of STYLES
    lr_decay_iters: float | None = None
    # steps until min_lr, warm-up included; None: those of the run
    lr_wsd_decay_iters: float | None = None
    # last part of lr_decay_iters, in which WSD decays
    lr_wsd_decay_style: str = "exponential"
    # one of WSD_STYLES

    def __post_init__(self):
        for name in ("lr", "min_lr", "lr_warmup_init", "lr_warmup_iters"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{_flag(name)} {value}: write a finite number >= 0")
        for name in ("train_iters", "global_batch_size", "lr_decay_iters", "lr_wsd_decay_iters"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{_flag(name)} {value}: write a positive number")
        for name, known in (("lr_decay_style", STYLES), ("lr_wsd_decay_style", WSD_STYLES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{_flag(name)} {getattr(self, name)}: write one of {', '.join(known)}")
        for name in ("min_lr", "lr_warmup_init"):
            if getattr(self, name) > self.lr:
                value = getattr(self, name)
                raise ValueError(f"{_flag(name)} {value:g}: above --lr {self.lr:g}; lower it or raise --lr")
        self._check_lengths()

    def _check_lengths(self):
        fraction = self.lr_warmup_fraction
        if fraction is not None and self.lr_warmup_iters:
            raise ValueError("--lr-warmup-fraction beside --lr-warmup-iters: write one of them")
        if fraction is not None and not 0 <= fraction < 1:
            raise ValueError(f"--lr-warmup-fraction {fraction}: write a number from 0 to below 1")
        if self.warmup >= self.decay:
            problem = f"a warm-up of {self.warmup:g} steps leaves nothing of --lr-decay-iters {self.decay:g}"
            if self.lr_decay_iters is None:
                problem = f"a warm-up of {self.warmup:g} steps leaves nothing of --train-iters {self.decay:g}"
            raise ValueError(f"{problem}; shorten the warm-up or train longer")
        if self.warmup >= self.train_iters:
            raise ValueError(
                f"a warm-up of {self.warmup:g} steps in a run of --train-iters {self.train_iters}: it never "
                "reaches --lr; shorten the warm-up or train longer"
            )
        if self.lr_decay_style == "WSD" and self.lr_wsd_decay_iters is None:
            raise ValueError(
                "--lr-decay-style WSD: write --lr-wsd-decay-iters, the steps of the decay at the end"
            )
        if self.lr_decay_style == "WSD" and self.lr_wsd_decay_iters > self.decay:
            raise ValueError(
                f"--lr-wsd-decay-iters {self.lr_wsd_decay_iters:g}: longer than all of the {self.decay:g} "
                "decay steps; shorten it"
            )

    @property
    def decay(self):
        """Steps until min_lr."""
        return self.train_iters if self.lr_decay_iters is None else self.lr_decay_iters

    @property
    def warmup(self):
        """Steps of the warm-up."""
        return (
            self.lr_warmup_iters if self.lr_warmup_fraction is None else self.lr_warmup_fraction * self.decay
        )


class Flag(NamedTuple):
    """A flag of a command line: `name` with dashes, the type of its value, its choices or (), one
    line of help.
    """

    name: str
    kind: type
    choices: tuple[str, ...]
    help: str

    @property
    def field(self):
        """Its field of RateSchedule, and its name among parsed flags."""
        return self.name.replace("-", "_")

    @property
    def default(self):
        found = {field.name: field.default for field in dataclasses.fields(RateSchedule)}[self.field]
        return None if found is dataclasses.MISSING else found


FLAGS = (
    Flag("lr", float, (), "peak learning rate"),
    Flag("min-lr", float, (), "rate at the end of the decay"),
    Flag("lr-warmup-iters", int, (), "steps of the linear warm-up"),
    Flag("lr-warmup-fraction", float, (), "the warm-up as a part of the decay steps"),
    Flag("lr-warmup-init", float, (), "rate at which the warm-up begins"),
    Flag("lr-decay-style", str, STYLES, "way from --lr to --min-lr"),
    Flag("lr-decay-iters", int, (), "steps until --min-lr (default: the run's)"),
    Flag("lr-wsd-decay-iters", int, (), "steps of the decay at the end, for WSD"),
    Flag("lr-wsd-decay-style", str, WSD_STYLES, "way of that decay"),
)


def from_flags(values) -> RateSchedule:
    """The schedule of parsed flags, a mapping by RateSchedule's field names; None stands for the
    default.
    """
    names = [field.name for field in dataclasses.fields(RateSchedule)]
    given = {name: values[name] for name in names if values.get(name) is not None}
    for name in ("lr", "train_iters"):
        if name not in given:
            raise ValueError(f"{_flag(name)}: missing; without it the learning rates are unknown")
    return RateSchedule(**given)


def _flag(field):
    return f"--{field.replace('_', '-')}"


def rate(schedule: RateSchedule, step) -> float:
    """Learning rate at which step `step` (0-based) is trained."""
    return float(after(schedule, step * schedule.global_batch_size))


def rates(schedule: RateSchedule) -> np.ndarray:
    """Learning rates of every step of the run, f64[train_iters]."""
    return after(schedule, np.arange(schedule.train_iters) * schedule.global_batch_size)


def after(schedule: RateSchedule, samples) -> np.ndarray:
    """Learning rate f64[...] of the step that begins after `samples` samples."""
    batch, peak = schedule.global_batch_size, schedule.lr
    n = np.asarray(samples, dtype=np.float64)
    warmup, decay = schedule.warmup * batch, schedule.decay * batch
    found = _decayed(schedule, n, warmup, decay)
    if schedule.lr_decay_style != "constant":
        found = np.where(n > decay, schedule.min_lr, found)
    if warmup == 0:
        return found
    first = schedule.lr_warmup_init
    return np.where(n <= warmup, first + (peak - first) * n / warmup, found)


def window_steps(step, every, train_iters):
    """Steps of each of the two windows that a decision after `step` steps weighs against each
    other.
    """
    return max(1, min(every, (train_iters - step) // 2))


def flow_times(rate, step, every, train_iters):
    """Flow times (learning rate x steps) of those two windows; rate: step (0-based) -> learning
    rate.
    """
    length = window_steps(step, every, train_iters)
    coming = [rate(step + i) for i in range(2 * length)]
    return max(sum(coming[:length]), 1e-30), max(sum(coming[length:]), 1e-30)


def _decayed(schedule, n, warmup, decay):
    """Rates f64[...] after n samples as if the warm-up were over; meaningless past `decay`."""
    peak, last, style = schedule.lr, schedule.min_lr, schedule.lr_decay_style
    if style == "constant":
        return np.full_like(n, peak)
    if style == "inverse-square-root":
        return np.maximum(last, peak * max(warmup, 1) ** 0.5 / np.maximum(n, 1) ** 0.5)
    if style == "WSD":
        length = schedule.lr_wsd_decay_iters * schedule.global_batch_size
        way, part = schedule.lr_wsd_decay_style, (n - (decay - length)) / length
    else:
        way, part = style, (n - warmup) / (decay - warmup)
    part = part.clip(0.0, 1.0)
    if way == "linear":
        left = 1.0 - part
    elif way == "cosine":
        left = 0.5 * (np.cos(math.pi * part) + 1.0)
    elif way == "exponential":
        left = 2.0 * 0.5**part - 1.0
    else:
        left = 1.0 - np.sqrt(part)
    return last + left * (peak - last)
