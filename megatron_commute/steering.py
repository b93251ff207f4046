"""From measurements to weights: who may look at what, when waves ride on the weights, and what people write meanwhile.

Hook says when; this object holds what decisions need to remember: losses since the last one, each law's own memory, the
measured responses, and the control file's last word. Every method is collective and ends alike on all ranks.
"""

import dataclasses
import json
import time

import numpy as np

from megatron_commute import control, controller, events, probe, reduce
from megatron_commute.response import Responses

NEVER = 2**31  # decisions since a change that never was


class Steering:
    """Of one run. config, plan, run, mixture, sampler, model, groups, draw, host: as in hook.Hook; watch:
    control.Watch; write: (event, **fields) into the record; say: prints one line; timed: (time begun) -> the timing
    object; fault: (step) -> None, leaves word for the restart that a collective failed there.
    """

    def __init__(
        self, config, plan, run, mixture, sampler, model, groups, draw, host, watch, write, say, timed, fault
    ):
        self.config, self.plan, self.run, self.mixture, self.sampler = config, plan, run, mixture, sampler
        self.groups, self.watch, self.write, self.say = groups, watch, write, say
        self.timed, self.fault = timed, fault
        self.responses = Responses(config, plan, run, model, groups, draw, host)
        self.control, self.memories = control.Control(), {}
        self.coming = None  # (sample, weights): what people asked for from a later sample on
        self.since_change, self.losses = NEVER, np.zeros((len(plan.names), 2))

    def effective(self):
        """The first sample, on a global batch, at which a decision of now can take effect."""
        batch = self.run.global_batch
        return -(-(self.mixture.index + self.plan.lead) // batch) * batch

    def base(self):
        """The weights f64[K] in force without the wave that may ride on them."""
        riding = any(c.start <= self.mixture.index < c.end for c in self.responses.waves.cycles)
        return self.responses.waves.base if riding else np.asarray(self.mixture.weights, dtype=np.float64)

    def decide(self, found, weights):
        """(decision, its sample, what all laws say): the controller's decision on rank 0, sent bit for bit to all."""
        effective, settings = self.effective(), self.config
        if len(self.plan.targets) > 1:
            return controller.Decision(None, "target `each` is reported and never acted on"), effective, None
        try:
            seen = self.situation(found, effective, weights)
        except Exception as fault:  # ours, and the same on every rank, since all look at the same numbers
            why = f"weights stay: the controller failed, please report it: {type(fault).__name__}: {fault}"
            return controller.Decision(None, why), effective, None
        asked = dict.fromkeys((settings.controller.law, *settings.controller.compare))
        told = control.decisions(asked, seen, self.memories)
        self.memories = {law: decision.memory for law, decision in told.items()}
        self.losses[:] = 0.0
        self.since_change = min(self.since_change + 1, NEVER)
        decision = control.permitted(settings, told[settings.controller.law])
        told = {"situation": control.facts(seen), "laws": events.laws(told)}
        sent = decision.weights if decision.weights is not None else np.full(len(self.plan.names), np.nan)
        weights = reduce.broadcast_numbers(sent, self.groups)
        if np.isnan(weights).any():
            return decision, effective, told
        if not self.schedule(weights, effective):
            late = f"weights stay: the data loaders have read past sample {effective} already; write a longer `lead`"
            return controller.Decision(None, late), effective, told
        self.since_change = 0
        return dataclasses.replace(decision, weights=weights), effective, told

    def schedule(self, weights, sample):
        """Let weights f64[K] hold from `sample` on, in what feeds training too; False where loaders are past it."""
        passed = self.sampler is not None and self.sampler.frontier.index > sample
        if reduce.any_rank(passed, self.groups.world):
            return False
        for stream in (self.mixture, self.sampler):
            if stream is not None:
                stream.schedule(weights, sample)
                # a later wish of people outlives an earlier change
                if self.coming is not None and self.coming[0] > sample:
                    stream.schedule(self.coming[1], self.coming[0])
        return True

    def situation(self, found, effective, weights):
        """What the laws may look at, at the sample where their decision would take effect."""
        plan = self.plan
        ahead = self.mixture.copy()
        left = plan.samples - effective
        if left > 0:
            ahead.skip(effective - ahead.index)
        known = self.responses.known(weights)
        total, count = self.losses.T
        losses = np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)
        if np.isfinite(losses[plan.targets[0] > 0]).all():
            known.setdefault("loss", float(np.nan_to_num(losses) @ plan.targets[0]))
        return control.situation(
            *(self.config, plan, ahead, left, self.config.every * self.run.global_batch, found),
            *(min(1.0, effective / plan.samples), self.control),
            losses=losses,
            decisions_since_change=self.since_change,
            **known,
        )

    def modulate(self):
        """Lay the next waves over the weights, up to where the next decision takes effect."""
        first, batch = self.effective(), self.run.global_batch
        most = self.plan.samples * (1 - self.config.controller.end.share)
        last = int(min(first + self.config.every * batch, most))
        if self.responses.kind != "lock-in" or self.control.freeze or last <= first:
            return
        passed = self.sampler is not None and self.sampler.frontier.index > first
        if reduce.any_rank(passed, self.groups.world):
            return
        if self.coming is not None and self.coming[0] > first:
            last = min(last, self.coming[0])
        self.responses.modulate(self.mixture, self.sampler, first, last, *self.bounds())
        if self.coming is not None and self.coming[0] >= last:
            self.schedule(self.coming[1], self.coming[0])

    def bounds(self):
        """Lower and upper bounds f64[K] of what may be tried out."""
        law, K = self.config.controller, len(self.plan.names)
        low = np.maximum(self.plan.minimum, np.array(law.floors or [0.0] * K))
        high = np.minimum(self.plan.maximum, np.array(law.caps or [1.0] * K))
        if self.control.caps is not None:
            high = np.minimum(high, self.control.caps)
        return low, np.maximum(high, low)

    def read(self, step):
        """Take the reading that is due; a fault costs the reading."""
        begun = time.monotonic()
        try:
            fields = self.responses.read(self.mixture.index)
        except probe.ProbeFailed as fault:
            fields = {"kind": "lock-in", "reason": str(fault), "sample": self.mixture.index}
            self.say(f"reading at step {step} SKIPPED: {fault}")
        if fields is not None:
            self.write("response", step=step, **fields, timing=self.timed(begun))
        else:
            self.timed(begun)

    def excursion(self, step, mine):
        """One rollout; training goes on from where it was. mine: this rank's samples of a global batch."""
        begun, sample = time.monotonic(), self.mixture.index
        if self.plan.samples - sample < self.run.global_batch or self.control.freeze:
            return
        try:
            fields = self.responses.excursion(step, self.mixture, *self.bounds(), mine)
        except Exception as fault:
            if reduce.size(self.groups.world) > 1 and not isinstance(fault, probe.ProbeFailed):
                self.fault(step)
                raise RuntimeError(
                    f"a rollout failed at step {step} between collectives; a restart from the last checkpoint resumes "
                    f"and skips it"
                ) from fault
            fields = {"kind": "rollout", "reason": f"{type(fault).__name__}: {fault}"}
            self.say(f"rollout at step {step} SKIPPED, the run goes on from where it was: {fault}")
        self.write("response", step=step, sample=sample, **fields, timing=self.timed(begun))

    def look(self, step):
        """Follow a new version of the control file; rank 0 reads it."""
        new, numbers = None, np.zeros(4 + 2 * len(self.plan.names))
        if reduce.rank() == 0:
            new = self.watch.look()
            if isinstance(new, control.Control):
                numbers[0], numbers[1:] = int(self.watch.digest, 16), new.numbers(len(self.plan.names))
            elif new is not None:
                numbers[1] = 2.0
        numbers = reduce.broadcast_numbers(numbers, self.groups)
        if numbers[1] == 0:
            return
        if numbers[1] == 2:
            self.write("control", step=step, sample=self.mixture.index, error=new)
            self.say(f"the control file is IGNORED until it is changed: {new}")
            return
        self.watch.digest = f"{int(numbers[0]):012x}"
        self.control, effective = control.Control.of_numbers(numbers[1:]), None
        at = max(self.effective(), -(-self.control.at // self.run.global_batch) * self.run.global_batch)
        wanted = self.control.weights
        if wanted is None and self.control.freeze and self.responses.waves.cycles:
            wanted, at = self.responses.waves.base, self.effective()
        if wanted is not None and at < self.plan.samples and self.schedule(wanted, at):
            effective, self.since_change, self.coming = at, 0, (at, list(wanted))
            self.responses.give_up(at)
        told = {"freeze": self.control.freeze, "weights": self.control.weights, "caps": self.control.caps}
        told |= {"version": self.watch.digest, "effective_sample": effective}
        told = {key: value for key, value in told.items() if value is not None}
        self.write("control", step=step, sample=self.mixture.index, **told)
        self.say(f"control file, version {self.watch.digest}: {json.dumps(told)}")

    def state_dict(self):
        """JSON, equal on all ranks."""
        return {
            "losses": self.losses.tolist(),
            "since_change": self.since_change,
            "memories": self.memories,
            "coming": self.coming,
            "control": {"digest": self.watch.digest, **dataclasses.asdict(self.control)},
            "responses": self.responses.state_dict(),
        }

    def load_state_dict(self, state):
        self.losses, self.since_change = np.array(state["losses"]), state["since_change"]
        self.memories, kept = state["memories"], dict(state["control"])
        self.coming = None if state["coming"] is None else tuple(state["coming"])
        self.watch.digest = kept.pop("digest")
        self.control = control.Control(**{k: tuple(v) if isinstance(v, list) else v for k, v in kept.items()})
        self.responses.load_state_dict(state["responses"], self.mixture.index)
