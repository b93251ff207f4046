"""Samples of every step: one batch size, or Megatron's ramp-up of it. Both are a function of the
samples consumed alone, so that a resumed run goes on with the batches it would have had.
"""

import dataclasses
import functools

import numpy as np


@dataclasses.dataclass(frozen=True)
class Batches:
    """The steps of a run, counted from 0."""

    full: int
    # samples of a step, after the ramp-up
    rampup: tuple[int, int, int] | None = None
    # --rampup-batch-size: samples of the first step, increment, samples of the ramp-up

    @functools.cached_property
    def _begins(self):
        """Samples before each step of the ramp-up, and before the first one after it."""
        begins = [0]
        while self.rampup is not None and begins[-1] <= self.rampup[2]:
            begins.append(begins[-1] + self.size(begins[-1]))
        return np.array(begins)

    @property
    def first_full(self):
        """The first step after the ramp-up."""
        return len(self._begins) - 1

    @property
    def sizes(self):
        """Every number of samples that a step may have, in the order of the run."""
        first, increment, _ = self.rampup or (self.full, 1, 0)
        return range(first, self.full + 1, increment)

    def size(self, sample):
        """Samples of the step that begins at `sample`, by the arithmetic of Megatron's
        RampupBatchsizeNumMicroBatches.
        """
        if self.rampup is None or sample > self.rampup[2]:
            return self.full
        first, increment, samples = self.rampup
        return first + int(sample / (samples / ((self.full - first) // increment))) * increment

    def begin(self, step):
        """The sample at which step `step` begins; an int, or i64[n]."""
        ramp = self.first_full
        found = self._begins[np.minimum(step, ramp)] + np.maximum(np.subtract(step, ramp), 0) * self.full
        return found if np.ndim(step) else int(found)

    def step(self, sample):
        """The step in which `sample` is trained."""
        ramp = self.first_full
        if sample >= self._begins[ramp]:
            return ramp + int(sample - self._begins[ramp]) // self.full
        return int(np.searchsorted(self._begins, sample, side="right")) - 1

    def next(self, sample):
        """The first sample at or after `sample` at which a step begins: weights change there."""
        step = self.step(sample)
        begin = self.begin(step)
        return begin if begin == sample else self.begin(step + 1)

    def of_steps(self, count):
        """Samples of the first `count` steps, i64[count]."""
        return np.diff(self.begin(np.arange(count + 1)))


of_run = functools.lru_cache(maxsize=16)(Batches)  # the same object, so that steps are counted once
