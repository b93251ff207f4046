"""When to probe, what to record, and when new weights take effect: the plug-in's one object with
a life.

The stream that it follows is a pure function of the samples consumed, so it knows the domain of
every sample without asking anybody.
"""

import dataclasses
import json
import time

import numpy as np

from megatron_commute import reduce
from megatron_commute.data import resume
from megatron_commute.decide import control_file, flow_run
from megatron_commute.decide.laws import LAWS
from megatron_commute.decide.steering import Steering
from megatron_commute.measure import probe
from megatron_commute.record import lines, log
from megatron_commute.record.clock import Clock
from megatron_commute.record.tally import Tally
from megatron_commute.settings import text_files
from megatron_commute.settings.probe_cost import sequences_drawn
from megatron_commute.settings.rates import flow_times

STATE_VERSION = 3
WRITTEN_BY = {2: "0.1.0"}  # versions of megatron_commute whose state this one cannot go on from
MOST_FAILURES = 3  # probes that may fail in a row before probing switches itself off


class Hook:
    """Follows one training run. Call `begin` before every step and `end` after it; keep
    `state_dict` in the checkpoint.

    config, plan: of config.load and config.resolve. stream: data.stream.Stream at the samples
    consumed. ledger: data.takeover.Ledger. model: measure.model.Model. groups: reduce.Groups.
    draw: (part, domain, numbers i64[n]) -> tokens, numbers counted from 0 over the whole run and
    wrapped by the caller. record: record.log.Record (written on rank 0 only). learning_rate:
    step -> rate. decay: the optimiser's decoupled weight decay. say: prints one line. listeners:
    called on every rank with every line of the record, a dict; they must not raise. flow:
    flow_run.FlowRun where law flow planned the weights.
    """

    def __init__(
        self,
        *,
        config,
        plan,
        run,
        stream,
        ledger,
        model,
        groups,
        draw,
        record,
        learning_rate,
        decay,
        say,
        listeners=(),
        flow=None,
    ):
        self.config, self.plan, self.run, self.stream, self.model = config, plan, run, stream, model
        self.groups, self.draw, self.record, self.say, self.ledger = groups, draw, record, say, ledger
        self.learning_rate, self.decay, self.listeners = learning_rate, decay, tuple(listeners)
        self.flow = flow
        self._work_in(config.probe.memory)
        self.probes, self.failures, self.off = 0, 0, False
        self.tally = Tally(
            domains=len(plan.names),
            global_batch=run.global_batch,
            micro_batch=run.micro_batch,
            data_rank=reduce.rank_in(groups.data),
            data_size=reduce.size(groups.data),
            group=groups.data,
        )
        self.domains = self.positions = np.zeros(0, dtype=np.int64)
        self.weights = stream.weights  # once a step has begun, those it used
        self.fatal_step = None
        path = record.path.parent / control_file.NAME
        watch = control_file.Watch(path, control_file.limits(config, plan, run))
        seen = flow or flow_run.compared(config, plan, run, learning_rate)
        self.steering = Steering(config=config, plan=plan, stream=stream, watch=watch, flow=seen)
        self.clock = Clock()
        self.watch_due = True  # the control file is looked at after every log line and before every probe

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
        """Open a new record; an older one is moved aside. news: what changed by consent."""
        settings, plan, run = self.config, self.plan, self.run
        here = sum(
            p.numel() for p, owns in zip(self.model.parameters(), self.model.owned, strict=True) if owns
        )
        parameters = reduce.sum_of_numbers(np.array([float(here)]), self.groups.model)[0]
        if self.speaks:
            self.record.start_fresh()
            self._fault_file.unlink(missing_ok=True)
        self._write(
            "start",
            **lines.start(settings, plan, run, int(parameters)),
            memory={"mode": self.memory.mode, "bytes": self.memory.bytes},
            sample=self.stream.index,
            news=news,
            **({} if self.flow is None else {"flow": flow_run.told(self.flow, run.batches)}),
        )
        for note in (*news, *plan.warnings):
            self.say(f"note: {note}")
        if self.flow is not None:
            self.say(flow_run.sentence(self.flow, plan.names))
        if settings.mode == "act" and LAWS[settings.controller.law].measured:
            self.say(
                f"ACTING ON AN UNCALIBRATED SIGNAL: mode act lets the law `{settings.controller.law}` move "
                "the weights; its signal was not compared with effects at the end of a run"
            )
        self._decided(run.batches.step(self.stream.index), self.steering.begin())

    def begin(self, step):
        """Before step `step` (0-based): probe if it is time, then take this step's samples from
        the stream.
        """
        probes = step and step % self.config.every == 0
        if (self.watch_due or probes) and (news := self.steering.look()) is not None:
            self._write("control", step=step, sample=self.stream.index, **news.fields)
            self.say(news.sentence)
            self._decided(step, news.outcomes)
        self.watch_due = False
        if probes:
            self._probe(step)
        self.clock.step_begins()
        self.weights = self.stream.weights
        self.domains, self.positions, projections = self.stream.take()
        self.tally.begin(len(self.domains))
        for projection in projections:
            self._write("projection", step=step, **projection)

    def end(self, losses, tokens, delivered=None):
        """After the step: this rank's sequences in the order trained, losses f64[n], an array or a
        tensor that stays on its device, and tokens i64[n, s]. delivered: (domain, position)
        i64[n] of what the loader brought, checked against the stream. Nothing travels.
        """
        first = self.stream.index - len(self.domains)
        self.tally.add(first, self.domains, self.positions, losses, tokens)
        self.clock.step_ends()
        if delivered is not None:
            expected = self.domains[self.tally.mine], self.positions[self.tally.mine]
            if not all(np.array_equal(got, want) for got, want in zip(delivered, expected, strict=True)):
                self.say(
                    f"THE LOADER BROUGHT OTHER SAMPLES than the mixture drew for {first}..{self.stream.index}"
                )

    def log_losses(self, step, valid=None):
        """Write the loss line of the steps since the last one, and start anew. Returns {name:
        mean training loss}. Collective.
        """
        self.settle()
        self.watch_due = True
        means = dict(zip(self.plan.names, self.tally.means(), strict=True))
        fields = self.tally.skips() | ({"valid": valid} if valid is not None else {})
        self._write(
            "loss",
            step=step,
            sample=self.stream.index,
            lr=self.learning_rate(step),
            train=means,
            **fields,
            served=self._named(self.stream.served),
            weights=self._named(self.weights),
            fingerprint=f"{self.tally.fingerprint:016x}",
            timing=self.clock.of_loss(),
        )
        return means

    def settle(self):
        """Bring together what ranks noted since the last line, probe or checkpoint; collective."""
        self.steering.losses += self.tally.settle()

    def finish(self, step, going_on="start it again with its last checkpoint to go on"):
        """Write the closing line; of a run that ends early, with what is left and how to go on."""
        left = lines.left(self.plan, self.stream.index, self.stream.served)
        told = {"served": self._named(self.stream.served)} | ({} if left is None else {"left": left})
        self._write("end", step=step, sample=self.stream.index, **told, timing=self.clock.of_run())
        if left is not None:
            self.say(f"{lines.left_words(left, self.plan, self.stream.index)}; {going_on}")

    def _write(self, event, **fields):
        try:
            if self.speaks:
                self.record.append(event, **fields)
            else:
                self.record.lines += 1
        except OSError as fault:
            self.say(
                f"the decision log could not be written ({fault}); training goes on, this {event} line is "
                "lost"
            )
        for listener in self.listeners:
            listener(log.line(event, fields))

    @property
    def _fault_file(self):
        """Left behind by a probe that ended the run inside a collective; read on resume."""
        return self.record.path.with_suffix(".fault")

    def _named(self, values):
        return dict(zip(self.plan.names, np.asarray(values).tolist(), strict=True))

    def _probe(self, step):
        if self.off:
            return self._decided(step, self.steering.decide(None))
        begun = time.monotonic()
        self.settle()
        times = flow_times(self.learning_rate, step, self.config.every, self.run.train_iters)
        weights = self.stream.weights
        first, self.probes = self.probes, self.probes + 1
        if step == self.fatal_step:
            self._skip(step, "the run ended inside this probe before it was restarted", begun)
            return
        try:
            measured = probe.measure(
                self.model,
                self.groups,
                self.team,
                self._drawn(first),
                self.settings,
                self.steering.targets(),
                weights,
                (self.decay, times),
                self.config.probe.time_limit,
            )
        except probe.ProbeFailed as fault:
            self._skip(step, str(fault), begun)
            return
        except Exception as fault:
            text_files.replace(self._fault_file, json.dumps({"step": step}))  # the restart skips it
            raise RuntimeError(
                f"a collective failed inside the probe at step {step}; a restart from the last checkpoint "
                "resumes and skips this probe"
            ) from fault
        self.failures = 0
        self._measured(step, begun, measured, times, weights, self.steering.decide(measured))

    def _drawn(self, number):
        """draw for probe `number`: each probe goes on in the held-out sequences where the last
        one stopped.
        """
        used = sequences_drawn(self.config.probe)
        return lambda part, domain, numbers: self.draw(part, domain, number * used[part] + numbers)

    def _measured(self, step, begun, measured, times, weights, outcomes):
        rates = {"lr": self.learning_rate(step), "decay": self.decay, "windows": times}
        *decided, more = outcomes[0]
        plan = dataclasses.replace(self.plan, targets=self.steering.targets())
        rates |= lines.probe(self.config, plan, measured, weights, *decided) | more
        self._write("probe", step=step, sample=self.stream.index, **rates, timing=self.clock.of_probe(begun))
        self.say(lines.sentence(step, self.plan.names, measured, weights, *decided))
        self._decided(step, outcomes[1:])

    def _decided(self, step, outcomes):
        """Write decisions that no probe has led to."""
        for decision, effective, fields in outcomes:
            told = lines.decision(self.weights, decision, effective) | fields
            self._write("decision", step=step, sample=self.stream.index, **told)
            self.say(f"step {step}: {decision.reason}")

    def _skip(self, step, reason, begun):
        self.failures += 1
        self.off = self.failures >= MOST_FAILURES
        told = {"reason": reason, "failures": self.failures, "off": self.off}
        timing = self.clock.of_probe(begun)
        self._write("skip", step=step, sample=self.stream.index, **told, timing=timing)
        self.say(f"probe at step {step} SKIPPED, weights stay: {reason}")
        if self.off:
            self.say(f"PROBING IS OFF for the rest of this run: {self.failures} probes failed in a row")
        self._decided(step, self.steering.decide(None))

    def state_dict(self):
        """What a checkpoint keeps: JSON, a few numbers per domain, equal on all ranks but for the
        record's digest. Collective: every rank calls it, though one may write it.
        """
        self.settle()
        return {
            "version": STATE_VERSION,
            "config": self.config.digest,
            "ledger": self.ledger._asdict(),
            "mixture": self.stream.consumed.state_dict(),
            "weights": self.weights.tolist(),
            "probes": self.probes,
            "failures": self.failures,
            "off": self.off,
            "tally": self.tally.state_dict(),
            "lines": self.record.lines,
            "record": self.record.digest if self.speaks else None,
            "settings": resume.settings(self.config, self.plan),
            "lead": self.plan.lead,
            "seed": self.config.seed,
            "memory": self.memory.mode,
            "steering": self.steering.state_dict(),
            "flow": None if self.flow is None else flow_run.state_of(self.flow),
        }

    def load_state_dict(self, state, rewind=True, branch=""):
        """Go on where `state` was taken; the stream stands there already (data.resume). rewind:
        in the same record. branch: in a new one, which begins with this sentence.

        Raises ValueError, on every rank, for a state of another version and for a record that
        lacks lines.
        """
        if state.get("version") != STATE_VERSION:
            version = state.get("version")
            raise ValueError(
                f"plug-in state of {WRITTEN_BY.get(version, f'version {version!r}')}: resume with the "
                "version that wrote it"
            )
        self.probes, self.failures, self.off = state["probes"], state["failures"], state["off"]
        if not rewind:
            return
        self.steering.load_state_dict(state["steering"])
        if self.config.probe.memory == "auto" and state["memory"] != self.memory.mode:
            self._work_in(state["memory"])  # what is free today must not change the numbers of a run
        self.tally.load_state_dict(state["tally"])
        self.weights = np.array(state.get("weights", self.weights))
        if branch:
            return self.start((branch,))
        problem = changed = ""
        if self.speaks:
            try:
                self.fatal_step = log.fault_step(self._fault_file)
                changed = self.record.rewind(state["lines"], state.get("record"), self.stream.index)
            except (OSError, ValueError) as fault:
                problem = str(fault)
        problem, changed = (reduce.gather_text(text, self.groups)[0] for text in (problem, changed))
        if problem:  # said by every rank, so that none waits for the first
            raise ValueError(problem)
        numbers = np.array([float(self.fatal_step or 0), float(self.record.lines)])
        self.fatal_step, self.record.lines = map(int, reduce.broadcast_numbers(numbers, self.groups))
        if changed:
            self._write("note", sample=self.stream.index, text=changed)
            self.say(f"note: {changed}")
