"""When to probe, what to record, and when new weights take effect: the plug-in's one object with a life.

The hook stands at the samples consumed by training; the sampler's own copy of the mixture runs ahead of it with the data
loader. Both are the same pure stream, so the hook knows the domain of every sample without asking anybody.
"""

import dataclasses
import json
import os
import time

import numpy as np

from megatron_commute import reduce
from megatron_commute.config import direction_samples
from megatron_commute.decide import control_file as control
from megatron_commute.decide import laws
from megatron_commute.decide.steering import Steering
from megatron_commute.measure import probe
from megatron_commute.record import lines as events
from megatron_commute.record.tally import Account

STATE_VERSION = 3
WRITTEN_BY = {2: "0.1.0"}  # versions of megatron_commute whose state this one cannot go on from
MOST_FAILURES = 3  # probes that may fail in a row before probing switches itself off
WATCH_EVERY = 10  # steps between two looks at the control file


class Hook:
    """Follows one training run. Call `begin` before every step and `end` after it; keep `state_dict` in the checkpoint.

    config, plan: of config.load and config.resolve. mixture, ledger: at the samples consumed (adapters.resume). model:
    probe.Model. groups: reduce.Groups. draw: (part, domain, numbers i64[n]) -> tokens, numbers counted from 0 over the
    whole run and wrapped by the caller. record: record.Record (used on rank 0 only). learning_rate: step -> rate. decay:
    the optimiser's decoupled weight decay. sampler: what feeds training, told of new weights (None in mode shadow). say:
    prints one line.
    """

    def __init__(
        self,
        config,
        plan,
        run,
        mixture,
        ledger,
        model,
        groups,
        draw,
        record,
        learning_rate,
        decay,
        sampler,
        say,
    ):
        self.config, self.plan, self.run, self.mixture, self.model = config, plan, run, mixture, model
        self.groups, self.draw, self.record, self.say, self.ledger = groups, draw, record, say, ledger
        self.learning_rate, self.decay, self.sampler = learning_rate, decay, sampler
        self._work_in(config.probe.memory)
        self.probes, self.failures, self.off = 0, 0, False
        place = (reduce.rank_in(groups.data), reduce.size(groups.data), groups.data)
        self.account = Account(len(plan.names), run.global_batch, run.micro_batch, *place)
        self.domains = self.positions = np.zeros(0, dtype=np.int64)
        self.weights = np.asarray(mixture.weights, dtype=np.float64)  # once a step has begun, those it used
        self.fatal_step = None
        watch = control.Watch(record.path.parent / control.NAME, plan.names, config.mode != "shadow")
        self.steering = Steering(
            config=config,
            plan=plan,
            run=run,
            mixture=mixture,
            sampler=sampler,
            groups=groups,
            watch=watch,
            write=lambda event, **fields: self._write(event, **fields),
            say=say,
        )
        self.probe_seconds, self.started, self.step_started = 0.0, time.monotonic(), None
        self.step_seconds, self.step_time = [], None

    def _work_in(self, memory):
        """Choose how probes work and deal their splits to ranks; memory: a wish of probe.memory."""
        wish = dataclasses.replace(self.config.probe, memory=memory)
        self.memory = probe.choose_memory(self.model, self.groups, wish, len(self.plan.names))
        self.settings = dataclasses.replace(wish, memory=self.memory.mode)
        self.team = reduce.team(self.groups, wish.splits, together=self.memory.mode == "sharded")
        self.say(self.memory.sentence)

    @property
    def speaks(self):
        """Whether this rank keeps the record."""
        return reduce.rank() == 0

    def start(self, news=()):
        """Open a new record, of a fresh run or of one whose mixture changed by consent (news: what changed). An older
        record in its place is moved aside.
        """
        settings, plan, run = self.config, self.plan, self.run
        here = sum(
            p.numel() for p, owned in zip(self.model.parameters(), self.model.owned, strict=True) if owned
        )
        parameters = reduce.sum_of_numbers(np.array([float(here)]), self.groups.model)[0]
        if self.speaks:
            self.record.start_fresh()
            self._fault_file.unlink(missing_ok=True)
        self._write(
            "start",
            **events.start(settings, plan, run, int(parameters)),
            memory={"mode": self.memory.mode, "bytes": self.memory.bytes},
            sample=self.mixture.index,
            news=news,
        )
        for note in (*news, *plan.warnings):
            self.say(f"note: {note}")
        if settings.mode == "act" and settings.controller.law in laws.MEASURED:
            self.say(
                f"ACTING ON AN UNCALIBRATED SIGNAL: mode act lets the law `{settings.controller.law}` move the weights; "
                "its signal was not compared with effects at the end of a run"
            )

    def begin(self, step):
        """Before step `step` (0-based): probe if it is time, then take this step's samples from the stream."""
        if step % WATCH_EVERY == 0:
            self.steering.look(step)
        if step and step % self.config.every == 0 and not self.off:
            self._probe(step)
        self.step_started = time.monotonic()
        self.weights = np.asarray(self.mixture.weights, dtype=np.float64)
        self.domains, self.positions = self.mixture.take(self.run.global_batch)
        for change in self.mixture.projections:
            self._write("projection", step=step, **change._asdict())
        self.mixture.projections.clear()

    def end(self, losses, tokens, delivered=None):
        """After the step: this rank's sequences in the order trained, losses f64[n] and tokens i64[n, s]. delivered:
        (domain, position) i64[n] of what the loader brought, checked against the stream."""
        first = self.mixture.index - self.run.global_batch
        before = self.account.losses.copy()
        self.account.add(first, self.domains, self.positions, losses, tokens)
        self.steering.losses += self.account.losses - before
        self.step_seconds.append(time.monotonic() - self.step_started)
        if delivered is not None:
            expected = self.domains[self.account.mine], self.positions[self.account.mine]
            if not all(np.array_equal(got, want) for got, want in zip(delivered, expected, strict=True)):
                self.say(
                    f"THE LOADER BROUGHT OTHER SAMPLES than the mixture drew for {first}..{self.mixture.index}"
                )

    def log_losses(self, step, valid=None):
        """Write the loss line of the steps since the last one, and start anew. Returns {name: mean training loss}."""
        means = dict(zip(self.plan.names, self.account.means(), strict=True))
        fields = {"valid": valid} if valid is not None else {}
        self._write(
            "loss",
            step=step,
            sample=self.mixture.index,
            lr=self.learning_rate(step),
            train=means,
            **fields,
            served=self._named(self.mixture.served),
            weights=self._named(self.weights),
            fingerprint=f"{self.account.fingerprint:016x}",
            timing={
                "step_seconds": self._step_time(),
                "probe_seconds": self.probe_seconds,
                "seconds": time.monotonic() - self.started,
            },
        )
        self.step_seconds = []
        return means

    def finish(self, step):
        """Write the closing line of a complete run."""
        timing = {"seconds": time.monotonic() - self.started, "probe_seconds": self.probe_seconds}
        self._write(
            "end",
            step=step,
            sample=self.mixture.index,
            served=self._named(self.mixture.served),
            timing=timing,
        )

    def _write(self, event, **fields):
        if not self.speaks:
            self.record.lines += 1
            return
        try:
            self.record.append(event, **fields)
        except OSError as fault:
            self.say(
                f"the decision log could not be written ({fault}); training goes on, this {event} line is lost"
            )

    @property
    def _fault_file(self):
        """Left behind by a probe that ended the run inside a collective; read on resume."""
        return self.record.path.with_suffix(".fault")

    def _leave_word(self, step):
        """Tell the restart to skip the probe of `step`."""
        _write_json(self._fault_file, {"step": step})

    def _named(self, values):
        return dict(zip(self.plan.names, np.asarray(values).tolist(), strict=True))

    def _probe(self, step):
        begun = time.monotonic()
        flow = (self.decay, self._windows(step))
        weights = np.asarray(self.mixture.weights, dtype=np.float64)
        first = self.probes
        self.probes += 1
        if step == self.fatal_step:
            self._skip(step, "the run ended inside this probe before it was restarted", begun)
            return
        try:
            found = probe.measure(
                *(self.model, self.groups, self.team, self._drawn(first), self.settings),
                *(self.plan.targets, weights, flow, self.config.probe.time_limit),
            )
        except probe.ProbeFailed as fault:
            self._skip(step, str(fault), begun)
            return
        except Exception as fault:
            self._leave_word(step)
            raise RuntimeError(
                f"a collective failed inside the probe at step {step}; a restart from the last checkpoint resumes and "
                f"skips this probe"
            ) from fault
        self.failures = 0
        decision, effective, told = self.steering.decide(found)
        self._measured(step, begun, found, weights, decision, effective, told)

    def _drawn(self, number):
        """draw for probe `number`: each probe goes on in the held-out sequences where the last one stopped."""
        samples, splits = self.config.probe.samples, self.config.probe.splits
        used = {"gradient": samples, "direction": splits * direction_samples(samples, splits)}
        return lambda part, domain, numbers: self.draw(part, domain, number * used[part] + numbers)

    def _windows(self, step):
        """Flow times (learning rate x steps) of the two windows that a decision weighs against each other."""
        length = max(1, min(self.config.every, (self.run.train_iters - step) // 2))
        rates = [self.learning_rate(step + i) for i in range(2 * length)]
        first, second = sum(rates[:length]), sum(rates[length:])
        return max(first, 1e-30), max(second, 1e-30)

    def _measured(self, step, begun, found, weights, decision, effective, told):
        rates = {"lr": self.learning_rate(step), "decay": self.decay, "windows": self._windows(step)}
        fields = events.probe(self.config, self.plan, found, weights, decision, effective)
        fields |= told or {}
        self._write(
            "probe", step=step, sample=self.mixture.index, **rates, **fields, timing=self._timed(begun)
        )
        self.say(events.sentence(step, self.plan.names, found, weights, decision, effective))

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

    def _step_time(self):
        """Median seconds of a step since the last loss line; of the steps before it where none has been taken since."""
        if self.step_seconds:
            self.step_time = float(np.median(self.step_seconds))
        return self.step_time

    def _timed(self, begun):
        spent = time.monotonic() - begun
        self.probe_seconds += spent
        trained = time.monotonic() - self.started - self.probe_seconds
        return {
            "probe_seconds": spent,
            "step_seconds": self._step_time(),
            "overhead": self.probe_seconds / trained if trained > 0 else None,
        }

    def state_dict(self):
        """What a checkpoint keeps: JSON, a few numbers per domain. Collective-free, equal on all ranks."""
        return {
            "version": STATE_VERSION,
            "config": self.config.digest,
            "ledger": self.ledger._asdict(),
            "mixture": self.mixture.state_dict(),
            "probes": self.probes,
            "failures": self.failures,
            "off": self.off,
            "account": self.account.state_dict(),
            "lines": self.record.lines,
            "lead": self.plan.lead,
            "seed": self.config.seed,
            "memory": self.memory.mode,
            "steering": self.steering.state_dict(),
        }

    def load_state_dict(self, state, rewind=True):
        """Go on where `state` was taken; the mixture stands there already (adapters.resume). rewind: in the same record.

        Raises ValueError, on every rank, for a state of another version and for a record that lacks lines.
        """
        if state.get("version") != STATE_VERSION:
            version = state.get("version")
            raise ValueError(
                f"plug-in state of {WRITTEN_BY.get(version, f'version {version!r}')}: resume with the version that wrote it"
            )
        self.probes, self.failures, self.off = state["probes"], state["failures"], state["off"]
        if not rewind:
            return
        self.steering.load_state_dict(state["steering"])
        if self.config.probe.memory == "auto" and state["memory"] != self.memory.mode:
            self._work_in(state["memory"])  # what is free today must not change the numbers of a run
        self.account.load_state_dict(state["account"])
        problem = ""
        if self.speaks:
            try:
                self.record.rewind(state["lines"])
            except (OSError, ValueError) as fault:
                problem = str(fault)
        else:
            self.record.lines = state["lines"]
        problem = reduce.gather_text(problem, self.groups)[0]
        if problem:  # said by every rank, so that none waits for the first
            raise ValueError(problem)
        mine = (
            json.loads(self._fault_file.read_text())["step"]
            if self.speaks and self._fault_file.exists()
            else -1
        )
        self.fatal_step = int(reduce.broadcast_numbers(np.array([float(mine)]), self.groups)[0])


def _write_json(path, content):
    temporary = path.with_suffix(path.suffix + f".{os.getpid()}")
    temporary.write_text(json.dumps(content))
    os.replace(temporary, path)
