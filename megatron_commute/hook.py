"""When to probe, what to record, and when new weights take effect: the plug-in's one object with a life.

The hook stands at the samples consumed by training; the sampler's own copy of the mixture runs ahead of it with the data
loader. Both are the same pure stream, so the hook knows the domain of every sample without asking anybody.
"""

import time
import zlib

import numpy as np

from megatron_commute import controller, probe, reduce

STATE_VERSION = 1
MOST_FAILURES = 3  # probes that may fail in a row before probing switches itself off


class Hook:
    """Follows one training run. Call `begin` before every step and `end` after it; keep `state_dict` in the checkpoint.

    config, plan: of config.load and config.resolve. mixture: a Mixture at the samples consumed. model: probe.Model.
    groups: reduce.Groups. draw: (part, domain, numbers i64[n]) -> tokens, numbers counted from 0 over the whole run and
    wrapped by the caller. record: record.Record (used on rank 0 only). learning_rate: step -> rate. decay: the optimiser's
    decoupled weight decay. sampler: what feeds training, told of new weights (None in mode shadow). say: prints one line.
    """

    def __init__(self, config, plan, run, mixture, model, groups, draw, record, learning_rate, decay, sampler, say):
        self.config, self.plan, self.run, self.mixture, self.model = config, plan, run, mixture, model
        self.groups, self.draw, self.record, self.say = groups, draw, record, say
        self.learning_rate, self.decay, self.sampler = learning_rate, decay, sampler
        self.team = reduce.team(groups, config.probe.splits)
        self.probes, self.failures, self.off = 0, 0, False
        self.losses = np.zeros((len(plan.names), 2))
        self.fingerprint = 0
        self.domains = np.zeros(0, dtype=np.int64)
        self.probe_seconds, self.started, self.step_started = 0.0, time.monotonic(), None
        self.step_seconds = []

    @property
    def speaks(self):
        """Whether this rank keeps the record."""
        return reduce.rank() == 0

    def begin(self, step):
        """Before step `step` (0-based): probe if it is time, then take this step's samples from the stream.

        Returns the domain of each sample of the global batch, i64[global_batch].
        """
        if step % self.config.every == 0 and step and not self.off:
            self._probe(step)
        self.step_started = time.monotonic()
        self.domains, self._positions = self.mixture.take(self.run.global_batch)
        return self.domains

    def end(self, step, loss_sums, loss_counts, fingerprint):
        """After step `step`: per-domain sums f64[K] and counts of this rank's losses, its share of the data fingerprint."""
        local = np.concatenate([loss_sums, loss_counts]).astype(np.float64)
        total = reduce.sum_of_numbers(local, self.groups.data).reshape(2, -1)
        self.losses += total.T
        halves = np.array([fingerprint & 0xFFFFFFFF, fingerprint >> 32], dtype=np.float64)
        low, high = (int(x) for x in reduce.sum_of_numbers(halves, self.groups.data))
        self.fingerprint = (self.fingerprint + low + (high << 32)) % 2**64
        self.step_seconds.append(time.monotonic() - self.step_started)

    def log_losses(self, step, valid=None):
        """Write the loss line of the steps since the last one, and start anew. Returns {name: mean training loss}."""
        means = {
            name: float(total / count) if count else None
            for name, (total, count) in zip(self.plan.names, self.losses, strict=True)
        }
        fields = {"valid": valid} if valid is not None else {}
        self._write(
            "loss",
            step=step,
            sample=self.mixture.index,
            lr=self.learning_rate(step),
            train=means,
            **fields,
            served=self._named(self.mixture.served),
            weights=self._named(self.mixture.weights),
            fingerprint=f"{self.fingerprint:016x}",
            timing={
                "step_seconds": float(np.median(self.step_seconds)) if self.step_seconds else None,
                "probe_seconds": self.probe_seconds,
                "seconds": time.monotonic() - self.started,
            },
        )
        self.losses[:], self.step_seconds = 0.0, []
        return means

    def finish(self, step):
        """Write the closing line of a complete run."""
        timing = {"seconds": time.monotonic() - self.started, "probe_seconds": self.probe_seconds}
        self._write("end", step=step, sample=self.mixture.index, served=self._named(self.mixture.served), timing=timing)

    def _write(self, event, **fields):
        if self.speaks:
            self.record.append(event, **fields)
        else:
            self.record.lines += 1

    def _named(self, values):
        return {name: value for name, value in zip(self.plan.names, np.asarray(values).tolist(), strict=True)}

    def _probe(self, step):
        begun = time.monotonic()
        flow = (self.decay, self._windows(step))
        weights = np.asarray(self.mixture.weights, dtype=np.float64)
        first = self.probes
        self.probes += 1
        try:
            found = probe.measure(
                *(self.model, self.groups, self.team, self._drawn(first), self.config.probe),
                *(self.plan.targets, weights, flow, self.config.probe.time_limit),
            )
        except probe.ProbeFailed as fault:
            self._skip(step, str(fault), begun)
            return
        self.failures = 0
        decision, effective = self._decide(found)
        self._measured(step, begun, found, weights, decision, effective)

    def _drawn(self, number):
        """draw for probe `number`: each probe goes on in the held-out sequences where the last one stopped."""
        samples, splits = self.config.probe.samples, self.config.probe.splits
        used = {"gradient": samples, "direction": splits * probe.direction_samples(samples, splits)}
        return lambda part, domain, numbers: self.draw(part, domain, number * used[part] + numbers)

    def _windows(self, step):
        """Flow times (learning rate x steps) of the two windows that a decision weighs against each other."""
        every = self.config.every
        rates = [self.learning_rate(step + i) for i in range(2 * every)]
        first, second = sum(rates[:every]), sum(rates[every:])
        return max(first, 1e-30), max(second, 1e-30)

    def _decide(self, found):
        """The controller's decision on rank 0, sent bit for bit to all, and the sample at which it takes effect."""
        batch = self.run.global_batch
        effective = -(-(self.mixture.index + self.plan.lead) // batch) * batch
        if self.config.mode != "act":
            return controller.Decision(None, f"mode {self.config.mode}: measured, weights not touched"), effective
        if len(self.plan.targets) > 1:
            return controller.Decision(None, "target `each` is reported and never acted on"), effective
        situation = self._situation(found, effective)
        decision = controller.decide(self.config.controller.law, situation)
        sent = decision.weights if decision.weights is not None else np.full(len(self.plan.names), np.nan)
        weights = reduce.broadcast_numbers(sent, self.groups)
        if np.isnan(weights).any():
            return decision, effective
        self.mixture.schedule(weights, effective)
        if self.sampler is not None:
            self.sampler.schedule(weights, effective)
        return controller.Decision(weights, decision.reason), effective

    def _situation(self, found, effective):
        """What the controller may look at, at the sample where its decision would take effect."""
        plan, settings = self.plan, self.config.controller
        ahead = self.mixture.copy()
        left = plan.samples - effective
        if left > 0:
            ahead.take(effective - ahead.index)
        budgets = np.array([np.nan if b is None else b for b in plan.budgets], dtype=np.float64)
        K = len(plan.names)
        return controller.Situation(
            weights=np.asarray(ahead.weights, dtype=np.float64),
            remaining=budgets - np.asarray(ahead.served),
            initial=plan.weights,
            samples_left=left,
            window=self.config.every * self.run.global_batch,
            score=found.score[0],
            score_se=found.score_se[0],
            dof=self.config.probe.splits - 1,
            minimum=plan.minimum,
            maximum=plan.maximum,
            floors=np.array(settings.floors or [0.0] * K),
            caps=np.array(settings.caps or [1.0] * K),
            rate=settings.rate,
            confidence=settings.confidence,
            strength=settings.strength,
        )

    def _measured(self, step, begun, found, weights, decision, effective):
        one = len(self.plan.targets) == 1
        names = ("P", "P_se", "s", "s_se", "M", "u_g", "h_theta", "score", "score_se")
        values = {name: getattr(found, name)[0] if one else getattr(found, name) for name in names}
        settings, moved = self.config.probe, decision.weights is not None
        first, second = self._windows(step)
        self._write(
            "probe",
            step=step,
            sample=self.mixture.index,
            lr=self.learning_rate(step),
            decay=self.decay,
            windows=[first, second],
            **values,
            weights=weights,
            weights_next=decision.weights if moved else weights,
            effective_sample=effective if moved else None,
            reason=decision.reason,
            target=self.plan.targets[0] if one else "each",
            metric=settings.metric,
            direction=settings.direction,
            method=settings.method,
            difference_step=found.step,
            samples=settings.samples,
            timing=self._timed(begun),
        )
        self.say(self._sentence(step, found, weights, decision, effective))

    def _sentence(self, step, found, weights, decision, effective):
        scores = ", ".join(
            f"{n} {s:+.3g}±{e:.2g}" for n, s, e in zip(self.plan.names, found.score[0], found.score_se[0], strict=True)
        )
        change = ""
        if decision.weights is not None:
            arrows = zip(self.plan.names, weights, decision.weights, strict=True)
            change = " | " + ", ".join(f"{n} {a:.3f}→{b:.3f}" for n, a, b in arrows) + f" from sample {effective}"
        return f"probe at step {step}: scores {scores} | {decision.reason}{change}"

    def _skip(self, step, reason, begun):
        self.failures += 1
        self.off = self.failures >= MOST_FAILURES
        spent = self._timed(begun)
        self._write(
            "skip",
            step=step,
            sample=self.mixture.index,
            reason=reason,
            failures=self.failures,
            off=self.off,
            timing=spent,
        )
        self.say(f"probe at step {step} SKIPPED, weights stay: {reason}")
        if self.off:
            self.say(f"PROBING IS OFF for the rest of this run: {self.failures} probes failed in a row")

    def _timed(self, begun):
        spent = time.monotonic() - begun
        self.probe_seconds += spent
        trained = time.monotonic() - self.started - self.probe_seconds
        step = float(np.median(self.step_seconds)) if self.step_seconds else None
        return {
            "probe_seconds": spent,
            "step_seconds": step,
            "overhead": self.probe_seconds / trained if trained > 0 else None,
        }

    def state_dict(self):
        """What a checkpoint keeps: JSON, a few numbers per domain. Collective-free, equal on all ranks."""
        return {
            "version": STATE_VERSION,
            "config": self.config.digest,
            "names": list(self.plan.names),
            "mixture": self.mixture.state_dict(),
            "probes": self.probes,
            "failures": self.failures,
            "off": self.off,
            "losses": self.losses.tolist(),
            "fingerprint": f"{self.fingerprint:016x}",
            "lines": self.record.lines,
            "lead": self.plan.lead,
        }

    def load_state_dict(self, state):
        """Go on where `state` was taken; the mixture has been rebuilt from it already (see restored_mixture)."""
        check_state(state, self.plan)
        self.probes, self.failures, self.off = state["probes"], state["failures"], state["off"]
        self.losses = np.array(state["losses"], dtype=np.float64)
        self.fingerprint = int(state["fingerprint"], 16)
        if self.speaks:
            self.record.rewind(state["lines"])
        else:
            self.record.lines = state["lines"]


def check_state(state, plan):
    """Raise ValueError naming the difference where a checkpoint's state does not fit this run's plan."""
    if state.get("version") != STATE_VERSION:
        raise ValueError(f"checkpoint: plug-in state version {state.get('version')!r} is not {STATE_VERSION}")
    if state["names"] != list(plan.names):
        raise ValueError(f"checkpoint: its domains {state['names']} are not those of the mixture file {list(plan.names)}")
    if state["lead"] != plan.lead:
        raise ValueError(f"checkpoint: lead {state['lead']} is kept for a whole run; write `lead: {state['lead']}`")


def sample_hash(index, domain, position, tokens):
    """64-bit hash of one delivered sample: its place in the global stream, where it came from, and its content.

    index, domain, position: ints; tokens: integer numpy array. Summed mod 2^64 over samples it does not depend on how
    ranks share them.
    """
    key = np.array([index, domain, position, zlib.crc32(np.ascontiguousarray(tokens, dtype=np.int64))], dtype=np.int64)
    return zlib.crc32(key) << 32 | zlib.adler32(key[::-1].tobytes())
