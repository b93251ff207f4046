"""From measurements to weights: what the laws may look at, what they decide, and what people write meanwhile.

Hook says when; this object holds what decisions need to remember: losses since the last one, each law's own memory, and the
control file's last word. Every method is collective and ends alike on all ranks.
"""

import dataclasses
import json

import numpy as np

from megatron_commute import reduce
from megatron_commute.decide import control_file as control
from megatron_commute.decide import controller
from megatron_commute.record import lines as events

NEVER = 2**31  # decisions since a change that never was


class Steering:
    """Of one run. config, plan, run, mixture, sampler, groups: as in hook.Hook; watch: control.Watch; write:
    (event, **fields) into the record; say: prints one line.
    """

    def __init__(self, *, config, plan, run, mixture, sampler, groups, watch, write, say):
        self.config, self.plan, self.run, self.mixture, self.sampler = config, plan, run, mixture, sampler
        self.groups, self.watch, self.write, self.say = groups, watch, write, say
        self.control, self.memories = control.Control(), {}
        self.coming = None  # (sample, weights): what people asked for from a later sample on
        self.since_change, self.losses = NEVER, np.zeros((len(plan.names), 2))

    def effective(self):
        """The first sample, on a global batch, at which a decision of now can take effect."""
        batch = self.run.global_batch
        return -(-(self.mixture.index + self.plan.lead) // batch) * batch

    def decide(self, found):
        """(decision, its sample, what all laws say): the controller's decision on rank 0, sent bit for bit to all."""
        effective, settings = self.effective(), self.config
        if len(self.plan.targets) > 1:
            return controller.Decision(None, "target `each` is reported and never acted on"), effective, None
        try:
            seen = self.situation(found, effective)
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

    def situation(self, found, effective):
        """What the laws may look at, at the sample where their decision would take effect."""
        plan = self.plan
        ahead = self.mixture.copy()
        left = plan.samples - effective
        if left > 0:
            ahead.skip(effective - ahead.index)
        total, count = self.losses.T
        losses = np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)
        return control.situation(
            config=self.config,
            plan=plan,
            ahead=ahead,
            left=left,
            window=self.config.every * self.run.global_batch,
            found=found,
            progress=min(1.0, effective / plan.samples),
            control=self.control,
            losses=losses,
            decisions_since_change=self.since_change,
        )

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
        if wanted is not None and at < self.plan.samples and self.schedule(wanted, at):
            effective, self.since_change, self.coming = at, 0, (at, list(wanted))
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
        }

    def load_state_dict(self, state):
        self.losses, self.since_change = np.array(state["losses"]), state["since_change"]
        self.memories, kept = state["memories"], dict(state["control"])
        self.coming = None if state["coming"] is None else tuple(state["coming"])
        self.watch.digest = kept.pop("digest")
        self.control = control.Control(**{k: tuple(v) if isinstance(v, list) else v for k, v in kept.items()})
