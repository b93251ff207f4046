"""From measurements to weights in a running job: what decisions must remember, and what people
write meanwhile.

Hook says when, and writes into the record what this object answers. Every method is collective
and ends alike on all ranks.
"""

import dataclasses
import json
from typing import NamedTuple

import numpy as np

from megatron_commute import reduce
from megatron_commute.decide import control_file, controller
from megatron_commute.decide.situation import facts, situation
from megatron_commute.record import lines
from megatron_commute.settings.schedule import next_batch

NEVER = 2**31  # decisions since a change that never was


class Outcome(NamedTuple):
    """What a measurement led to."""

    decision: controller.Decision
    """what is done with the weights"""
    effective: int
    """sample from which new weights hold"""
    fields: dict
    """what the probe line says of it: the Situation, and what every law would have done"""


class Steering:
    """Of one run. config, plan: of config.load and config.resolve; stream: data.stream.Stream;
    watch: control_file.Watch.
    """

    def __init__(self, *, config, plan, stream, watch):
        self.config, self.plan, self.stream, self.watch = config, plan, stream, watch
        self.control, self.memories = control_file.Control(), {}
        self.coming = None  # (sample, weights): what people asked for from a later sample on
        self.since_change, self.losses = NEVER, np.zeros((len(plan.names), 2))

    def effective(self):
        """The first sample, on a global batch, at which a decision of now can take effect."""
        return next_batch(self.stream.index + self.plan.lead, self.stream.global_batch)

    def decide(self, measured):
        """The Outcome of a probe.Measurement: the controller's decision on rank 0, sent bit for
        bit to all.
        """
        at = self.effective()
        if len(self.plan.targets) > 1:
            return Outcome(controller.Decision(None, "target `each` is reported and never acted on"), at, {})
        try:
            seen = self._situation(measured, at)
        except Exception as fault:  # ours, and the same on every rank, since all look at the same numbers
            return Outcome(controller.failed(fault), at, {})
        law, others = self.config.controller.law, self.config.controller.compare
        decisions = controller.decisions(dict.fromkeys((law, *others)), seen, self.memories)
        self.memories = {name: decision.memory for name, decision in decisions.items()}
        self.losses[:] = 0.0
        self.since_change = min(self.since_change + 1, NEVER)
        fields = {"situation": facts(seen), "laws": lines.laws(decisions)}
        return Outcome(self._carried_out(decisions[law], at), at, fields)

    def _carried_out(self, decision, at):
        """The decision as far as mode and data loaders let it act."""
        if self.config.mode != "act":
            return controller.Decision(None, f"mode {self.config.mode}: measured, weights not touched")
        sent = np.full(len(self.plan.names), np.nan) if decision.weights is None else decision.weights
        weights = reduce.broadcast_numbers(sent, self.stream.groups)
        if np.isnan(weights).any():
            return decision
        if not self.schedule(weights, at):
            why = f"weights stay: the data loaders have read past sample {at} already; write a longer `lead`"
            return controller.Decision(None, why)
        self.since_change = 0
        return dataclasses.replace(decision, weights=weights)

    def schedule(self, weights, sample):
        """Let weights f64[K] hold from `sample` on; False where loaders are past it."""
        if not self.stream.schedule(weights, sample):
            return False
        if self.coming is not None and self.coming[0] > sample:  # a later wish of people outlives this change
            self.stream.schedule(self.coming[1], self.coming[0])
        return True

    def _situation(self, measured, at):
        """What the laws may look at, at the sample where their decision would take effect."""
        total, count = self.losses.T
        return situation(
            config=self.config,
            plan=self.plan,
            at=at,
            ahead=self.stream.ahead(at if at < self.plan.samples else self.stream.index),
            window=self.config.every * self.stream.global_batch,
            measured=measured,
            control=self.control,
            losses=np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0),
            decisions_since_change=self.since_change,
        )

    def look(self):
        """Follow a new version of the control file, which rank 0 reads.

        (fields of a line `control`, a sentence), or None where there is nothing new.
        """
        new, numbers = None, np.zeros(4 + 2 * len(self.plan.names))
        if reduce.rank() == 0:
            new = self.watch.look()
            if isinstance(new, control_file.Control):
                numbers[0], numbers[1:] = int(self.watch.digest, 16), new.numbers(len(self.plan.names))
            elif new is not None:
                numbers[1] = 2.0
        numbers = reduce.broadcast_numbers(numbers, self.stream.groups)
        if numbers[1] == 0:
            return None
        if numbers[1] == 2:
            return {"error": new}, f"the control file is IGNORED until it is changed: {new}"
        return self._followed(control_file.Control.of_numbers(numbers[1:]), f"{int(numbers[0]):012x}")

    def _followed(self, control, version):
        """Take over a version of the control file; as `look`."""
        self.watch.digest, self.control, effective = version, control, None
        at = max(self.effective(), next_batch(control.at, self.stream.global_batch))
        if control.weights is not None and at < self.plan.samples and self.schedule(control.weights, at):
            effective, self.since_change, self.coming = at, 0, (at, list(control.weights))
        fields = {"freeze": control.freeze, "weights": control.weights, "caps": control.caps}
        fields |= {"version": version, "effective_sample": effective}
        fields = {key: value for key, value in fields.items() if value is not None}
        return fields, f"control file, version {version}: {json.dumps(fields)}"

    def state_dict(self):
        """JSON, equal on all ranks."""
        return {
            "losses": self.losses.tolist(),
            "since_change": self.since_change,
            "memories": self.memories,
            "coming": self.coming,
            "control": {"digest": self.watch.digest, **dataclasses.asdict(self.control)},
        }

    def load_state_dict(self, state):
        self.losses, self.since_change = np.array(state["losses"]), state["since_change"]
        self.memories, control = state["memories"], dict(state["control"])
        self.coming = None if state["coming"] is None else tuple(state["coming"])
        self.watch.digest = control.pop("digest")
        self.control = control_file.Control(
            **{key: tuple(value) if isinstance(value, list) else value for key, value in control.items()}
        )
