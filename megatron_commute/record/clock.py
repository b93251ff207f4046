"""Seconds of a run, its steps and its probes: the objects `timing` of a record, the only part
that may differ between equal runs.
"""

import time

import numpy as np


class Clock:
    """Of one process, from the moment it is made."""

    def __init__(self):
        self.began, self.in_probes = time.monotonic(), 0.0
        self._step_began, self._steps, self._median = None, [], None

    def step_begins(self):
        self._step_began = time.monotonic()

    def step_ends(self):
        self._steps.append(time.monotonic() - self._step_began)

    def of_probe(self, began):
        """Timing of a probe that began at `began` (time.monotonic) and ends now."""
        spent = time.monotonic() - began
        self.in_probes += spent
        trained = time.monotonic() - self.began - self.in_probes
        overhead = self.in_probes / trained if trained > 0 else None
        return {"probe_seconds": spent, "step_seconds": self._step(), "overhead": overhead}

    def of_loss(self):
        """Timing of a loss line; steps are counted anew from here."""
        timing = {"step_seconds": self._step(), **self.of_run()}
        self._steps = []
        return timing

    def of_run(self):
        """Timing of the run until now."""
        return {"probe_seconds": self.in_probes, "seconds": time.monotonic() - self.began}

    def _step(self):
        """Median seconds of a step since the last loss line; of those before where none was
        taken since.
        """
        if self._steps:
            self._median = float(np.median(self._steps))
        return self._median
