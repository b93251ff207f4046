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
from megatron_commute.decide import control_file, controller, flow_act, flow_run
from megatron_commute.decide.situation import facts, situation
from megatron_commute.record import lines
from megatron_commute.settings.schedule import refuse_impossible

NEVER = 2**31  # decisions since a change that never was


class Outcome(NamedTuple):
    """What a measurement, or a word of people, led to."""

    decision: controller.Decision
    """what is done with the weights"""
    effective: int
    """sample from which new weights hold"""
    fields: dict
    """what the line says of it: the Situation, and what every law would have done"""


class Aim(NamedTuple):
    """What people want of the law from some sample on."""

    target: tuple[float, ...] | None = None
    """f64[K]; None: the mixture file's"""
    strength: float | None = None
    """None: the mixture file's"""
    scheduled: bool = False
    """a schedule of theirs takes the place of the law"""


class News(NamedTuple):
    """What came of a version of the control file."""

    fields: dict
    """of a line `control`"""
    sentence: str
    """for the screen"""
    outcomes: tuple[Outcome, ...] = ()
    """decisions that it asked for at once"""


class Steering:
    """Of one run. config, plan: of config.load and config.resolve; stream: data.stream.Stream;
    watch: control_file.Watch; flow: flow_run.FlowRun where law flow decides or is compared.
    """

    def __init__(self, *, config, plan, stream, watch, flow=None):
        self.config, self.plan, self.stream, self.watch = config, plan, stream, watch
        follows = flow_run.follows(config)
        self.flow = None if follows and config.mode == "fixed" else flow  # there the plan is all there is
        self.alone = self.flow is not None and follows  # whether decisions come without a measurement as well
        self.control, self.memories = control_file.Control(), {}
        self.coming = []  # (sample, weights): what people asked for from later samples on
        self.aim, self.later = Aim(), None  # in force, and (sample, Aim) of a later one
        self.since_change, self.losses = NEVER, np.zeros((len(plan.names), 2))

    def effective(self):
        """The first sample, on a global batch, at which a decision of now can take effect."""
        return self.stream.batches.next(self.stream.index + self.plan.lead)

    def targets(self):
        """f64[T, K] that a decision of now serves."""
        target = self._aim_at(self.effective()).target
        return self.plan.targets if target is None else np.array([target])

    def _aim_at(self, sample):
        return self.later[1] if self.later is not None and sample >= self.later[0] else self.aim

    def _next_decision(self):
        """The sample from which the next regular decision holds, at the beginning of a step."""
        every, batches = self.config.every, self.stream.batches
        step = batches.step(self.stream.index)
        step = max(-(-step // every), 1) * every
        return batches.next(batches.begin(step) + self.plan.lead)

    def decide(self, measured):
        """The Outcomes of a probe.Measurement (None where there is none): the controller's
        decision on rank 0, sent bit for bit to all, and that after a change of aim in its window.
        """
        at = self.effective()
        if measured is None and not self.alone:
            return []
        if len(self.plan.targets) > 1:
            return [
                Outcome(controller.Decision(None, "target `each` is reported and never acted on"), at, {})
            ]
        batches = self.stream.batches
        coming = batches.begin(batches.step(self.stream.index) + self.config.every)
        return self._decided(measured, at, batches.next(coming + self.plan.lead))

    def begin(self):
        """The Outcomes of law flow before the first step of a run, or of one that was changed."""
        return self._decided(None, self.stream.index, self._next_decision()) if self.alone else []

    def _decided(self, measured, at, end):
        """The Outcomes for the samples from `at` to `end`, where the next decision takes over."""
        change = None if self.later is None else self.later[0]
        if not self.alone or change is None or not at < change < min(end, self.plan.samples):
            return [self._outcome(measured, at, end)]
        return [self._outcome(measured, at, change), self._outcome(None, change, end, again=True)]

    def _outcome(self, measured, at, end, again=False):
        """The Outcome of one window. again: of the law that acts alone, on what others measured."""
        try:
            seen = self._situation(measured, at, end)
        except Exception as fault:  # ours, and the same on every rank, since all look at the same numbers
            return Outcome(controller.failed(fault), at, {})
        law, others = self.config.controller.law, () if again else self.config.controller.compare
        decisions = controller.decisions(dict.fromkeys((law, *others)), seen, self.memories)
        self.memories |= {name: decision.memory for name, decision in decisions.items()}
        if not again:
            self.losses[:] = 0.0
            self.since_change = min(self.since_change + 1, NEVER)
        fields = {"situation": facts(seen), "laws": lines.laws(decisions)}
        decision = self._carried_out(decisions[law], seen, at)
        if self.alone and decision.course is not None:
            fields["flow"] = flow_act.expected(self.flow, seen, decision, at, self.stream.batches)
        return Outcome(decision, at, fields)

    def _carried_out(self, decision, seen, at):
        """The decision as far as mode, people and data loaders let it act."""
        if self.config.mode != "act":
            return controller.Decision(None, f"mode {self.config.mode}: measured, weights not touched")
        if self._aim_at(at).scheduled:
            return controller.Decision(None, "weights follow the schedule of the control file")
        sent = decision.weights[None] if decision.pieces is None and decision.weights is not None else None
        sent = decision.pieces if sent is None else sent
        sent = np.full((1, len(self.plan.names)), np.nan) if sent is None else sent
        weights = reduce.broadcast_numbers(sent.ravel(), self.stream.groups).reshape(sent.shape)
        if np.isnan(weights).any():
            return decision
        decision = dataclasses.replace(
            decision, weights=weights[0], pieces=None if decision.pieces is None else weights
        )
        changes = [(at, weights[0])]
        if decision.pieces is not None:
            changes = flow_act.granted(seen, decision, at)
        if not self.schedule(changes):
            why = f"weights stay: the data loaders have read past sample {at} already; write a longer `lead`"
            return controller.Decision(None, why)
        self.since_change = 0
        return decision

    def schedule(self, changes):
        """Let the (sample, weights f64[K]) of `changes` hold; False where loaders are past the
        first. What people asked for from a later sample on outlives them.
        """
        wishes = [change for change in self.coming if change[0] > changes[0][0]]
        if wishes:
            changes = [change for change in changes if change[0] < wishes[0][0]]
        return self.stream.schedule([*changes, *wishes])

    def _situation(self, measured, at, end):
        """What the laws may look at, at the sample where their decision would take effect."""
        total, count = self.losses.T
        ahead = self.stream.ahead(at if at < self.plan.samples else self.stream.index)
        aim, known = self._aim_at(at), {}
        if self.flow is not None and at < self.plan.samples:
            known = flow_act.known(self.flow, self.plan, ahead, at, end, self.stream.batches)
        return situation(
            config=self.config,
            plan=self.plan,
            at=at,
            ahead=ahead,
            window=end - at,
            measured=measured,
            control=self.control,
            target=self.plan.targets[0] if aim.target is None else np.array(aim.target),
            strength=self.config.controller.strength if aim.strength is None else aim.strength,
            losses=np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0),
            decisions_since_change=self.since_change,
            **known,
        )

    def look(self):
        """The News of a new version of the control file, which rank 0 reads, or None."""
        word = b""
        if reduce.rank() == 0:
            new = self.watch.look()
            if isinstance(new, control_file.Control):
                word = json.dumps([self.watch.digest, dataclasses.asdict(new)]).encode()
            elif new is not None:
                word = json.dumps([None, new]).encode()
        size = int(reduce.broadcast_numbers(np.array([float(len(word))]), self.stream.groups)[0])
        if not size:
            return None
        sent = np.frombuffer(word.ljust(size, b" "), dtype=np.uint8).astype(np.float64)
        text = reduce.broadcast_numbers(sent, self.stream.groups).astype(np.uint8).tobytes()
        version, what = json.loads(text)
        self.watch.told = what if version is None else ""
        if version is None:
            return _ignored(what)
        self.watch.digest, control = version, control_file.Control.of(what)
        at = max(self.effective(), self.stream.batches.next(control.at))
        problem = self._problem(control, at)
        return _ignored(problem) if problem else self._followed(control, version, at)

    def _problem(self, control, at):
        """Why a version cannot be followed from sample `at` on; "" where it can."""
        if control.schedule is None:
            return ""
        file, plan = self.watch.path, self.plan
        first = control.schedule[0][0]
        if first < at:
            problem = f"it names sample {first}, before it can hold"
            return f"{file}: schedule: {problem}; write points from sample {at} on"
        ahead = self.stream.ahead(min(at, plan.samples))
        left = [None if b is None else int(b - n) for b, n in zip(plan.budgets, ahead.served, strict=True)]
        moved = [(sample - at, np.array(weights)) for sample, weights in control.schedule]
        facts = (plan.names, left, plan.samples - at, plan.minimum, plan.maximum)
        try:
            refuse_impossible(ahead.weights, moved, *facts)
        except ValueError as error:
            return f"{file}: schedule: from sample {at} on, {error}"
        return ""

    def _followed(self, control, version, at):
        """Take over a version of the control file; as `look`."""
        effective, now, acts = None, self.effective(), self.config.mode == "act"
        wishes = [(at, control.weights)] if control.weights is not None else control.schedule
        if wishes and at < self.plan.samples and self.stream.schedule(_arrays(wishes)):
            effective, self.since_change, self.coming = at, 0, [(n, list(w)) for n, w in wishes]
        scheduled = acts and control.schedule is not None and effective is not None
        aim = Aim(control.target, control.strength, scheduled)
        before, dropped = self._aim_at(now), self.later is not None and self.later[0] > now
        self.control, self.aim, self.later = control, before, None if aim == before else (at, aim)
        if self.later is not None and at < self.plan.samples:
            effective = at
        if before.scheduled and not wishes:  # the law takes over from where the schedule stands
            self.coming = []
            self.stream.schedule([(at, self.stream.ahead(min(at, self.plan.samples)).weights)])
        outcomes, end = [], self._next_decision()
        if self.alone and control.freeze:
            self.schedule([(now, self.stream.ahead(min(now, self.plan.samples)).weights)])
        elif self.alone and not wishes and (dropped or self.later is not None):
            start = now if dropped else at
            outcomes = self._decided(None, start, end) if start < end else []
        fields = dataclasses.asdict(control) | {"version": version, "effective_sample": effective}
        fields = {key: value for key, value in fields.items() if value is not None and key != "at"}
        shown = fields | ({"schedule": f"{len(wishes)} changes"} if control.schedule else {})
        return News(fields, f"control file, version {version}: {json.dumps(shown)}", tuple(outcomes))

    def state_dict(self):
        """JSON, equal on all ranks."""
        return {
            "losses": self.losses.tolist(),
            "since_change": self.since_change,
            "memories": self.memories,
            "coming": self.coming,
            "aim": list(self.aim),
            "later": None if self.later is None else [self.later[0], list(self.later[1])],
            "control": {"digest": self.watch.digest, **dataclasses.asdict(self.control)},
            "told": self.watch.told,
        }

    def load_state_dict(self, state):
        self.losses, self.since_change = np.array(state["losses"]), state["since_change"]
        self.memories, control = state["memories"], dict(state["control"])
        coming = state["coming"] or []
        if coming and not isinstance(coming[0], list | tuple):  # one change, as 0.2.0 wrote it
            coming = [coming]
        self.coming = [(sample, weights) for sample, weights in coming]
        self.aim = _aim(state.get("aim", ()))
        later = state.get("later")
        self.later = None if later is None else (later[0], _aim(later[1]))
        self.watch.digest, self.watch.told = control.pop("digest"), state.get("told", "")
        self.control = control_file.Control.of(control)


def _arrays(changes):
    return [(sample, np.array(weights)) for sample, weights in changes]


def _aim(values):
    return Aim(*(tuple(value) if isinstance(value, list) else value for value in values))


def _ignored(problem):
    return News({"error": problem}, f"the control file is IGNORED until it is changed: {problem}")
