"""The hook in plain torch loops: watching is invisible, faults are survived, decisions take effect where the log says."""

import copy
import json
import types

import numpy as np
import oracles
import pytest
import ranks
import torch

from megatron_commute import controller, probe, record, reduce, takeover
from megatron_commute.adapters import torch_loop
from megatron_commute.config import Config, Controller, Domain, Plan, Probe, Run
from megatron_commute.hook import Hook
from megatron_commute.mixture import Mixture

NAMES, WEIGHTS, BATCH, EVERY = ("en", "ru", "code"), (0.6, 0.1, 0.3), 4, 4
VOCABULARY, LENGTH = 16, 6


def text(domain, numbers, salt):
    rows = []
    for number in numbers:
        rng = np.random.default_rng([int(domain), int(number), salt])
        follows = np.random.default_rng(int(domain)).permutation(VOCABULARY)
        row = rng.integers(VOCABULARY, size=LENGTH + 1)
        for i in range(LENGTH):
            row[i + 1] = follows[row[i]] if rng.random() < 0.8 else row[i + 1]
        rows.append(row)
    return torch.from_numpy(np.array(rows))


def held_out(part, domain, numbers):
    return text(domain, numbers, 1 if part == "direction" else 2)


def mean_loss(module, tokens):
    return oracles.cross_entropy(module(tokens[:, :-1]), tokens[:, 1:])


class Loop:
    """A training loop of `steps` steps as a user would write one, with dropout 0.1, and a hook or none."""

    def __init__(
        self, folder, steps=24, mode="act", draw=held_out, state=None, groups=None, watched=True, confidence=0.5,
        names=NAMES, weights=WEIGHTS, targets=None, every=EVERY, budgets="shares",
    ):  # fmt: skip
        torch.manual_seed(0)
        gpt = oracles.GPT(VOCABULARY, 8, 2, 1, LENGTH, spread=0.2)
        self.module = torch.nn.Sequential(gpt, torch.nn.Dropout(0.1))
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-2, weight_decay=0.01)
        self.groups, self.steps, self.said, self.losses, self.drawn = (
            groups or reduce.Groups(),
            steps,
            [],
            [],
            [],
        )
        self.step, self.hook = 0, None
        ranks_ = reduce.size(self.groups.data)
        self.run = Run(LENGTH, BATCH, 1, ranks_, steps)
        K, samples = len(names), steps * BATCH
        shares = np.array(weights)
        budget = [round(samples * w) for w in weights[1:]]
        budget = [samples - sum(budget), *budget] if budgets == "shares" else list(budgets)
        self.plan = Plan(
            names, shares, tuple(budget), (100,) * K, (64,) * K, np.array([weights] if targets is None else targets),
            np.zeros(K), np.ones(K), samples, 2 * BATCH, ("a note",), shares,
        )  # fmt: skip
        config = Config(
            domains=tuple(Domain(n, (n,)) for n in names), mode=mode, every=every, probe=Probe(samples=16, splits=4),
            controller=Controller(confidence=confidence, floors=(0.0,) * K, caps=(1.0,) * K, rate=0.2), digest="d",
        )  # fmt: skip
        self.mixture = Mixture(shares, budget, samples=samples)
        if state is not None:
            self.step = state["step"]
            self.module.load_state_dict(state["module"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.mixture = Mixture.from_state(json.loads(state["hook"])["mixture"])
        # what feeds training, at its own copy of the mixture, which nothing reads ahead of
        feed = self.mixture.copy()
        self.sampler = types.SimpleNamespace(frontier=feed, schedule=feed.schedule, take=feed.take)
        if watched:
            self._attach(folder, config, draw, state)

    def _attach(self, folder, config, draw, state):
        params = list(self.module.parameters())
        model = torch_loop.probe_model(
            self.module, mean_loss, 3, lambda: torch_loop.second_moments(self.optimizer, params), groups=self.groups
        )  # fmt: skip
        log = record.Record(folder / record.NAME)
        ledger = takeover.ledger(self.plan.names, ["x"] * len(self.plan.names))
        self.hook = Hook(
            *(config, self.plan, self.run, self.mixture.copy(), ledger, model, self.groups, draw, log),
            *(lambda step: 1e-2 * (1 - step / self.steps), 0.01, self.sampler, self.said.append),
        )
        self.hook.start() if state is None else self.hook.load_state_dict(json.loads(state["hook"]))

    def until(self, stop=None):
        while self.step < (stop or self.steps):
            if self.hook is not None:
                self.hook.begin(self.step)
            domains, positions = self.sampler.take(BATCH)
            tokens = torch.cat([text(d, [p], 3) for d, p in zip(domains, positions, strict=True)])
            mine = slice(None) if self.hook is None else self.hook.account.mine
            torch.manual_seed(self.step)
            self.optimizer.zero_grad()
            loss = mean_loss(self.module, tokens[mine])
            loss.backward()
            for p in self.module.parameters():
                p.grad.copy_(reduce.all_reduce_sum(p.grad, self.groups.data))
            self.optimizer.step()
            self.losses.append(loss.item())
            self.drawn += list(zip(domains.tolist(), positions.tolist(), strict=True))
            self.step += 1
            if self.hook is not None:
                losses = np.full(len(tokens[mine]), loss.item())
                self.hook.end(losses, tokens[mine].numpy(), (domains[mine], positions[mine]))
                if self.step % 3 == 0:
                    self.hook.log_losses(self.step)
        if self.step == self.steps and self.hook is not None:
            self.hook.finish(self.step)
        return self

    def checkpoint(self):
        return copy.deepcopy(
            {
                "step": self.step, "module": self.module.state_dict(), "optimizer": self.optimizer.state_dict(),
                "hook": json.dumps(self.hook.state_dict()),
            }
        )  # fmt: skip


def lines(folder, *events):
    found = [{k: v for k, v in line.items() if k != "timing"} for line in record.read(folder)]
    return [line for line in found if not events or line["event"] in events]


def test_training_losses_with_and_without_probes_are_bit_identical(tmp_path):
    watched, alone = Loop(tmp_path, mode="fixed").until(), Loop(tmp_path, watched=False).until()
    assert len(lines(tmp_path, "probe")) == 5
    assert watched.losses == alone.losses and watched.drawn == alone.drawn
    assert all(
        torch.equal(a, b) for a, b in zip(watched.module.parameters(), alone.module.parameters(), strict=True)
    )
    assert all("not touched" in line["reason"] for line in lines(tmp_path, "probe"))


def test_weights_take_effect_at_the_sample_that_the_log_names_and_budgets_stay_exact(tmp_path):
    loop = Loop(tmp_path).until()
    stream = Mixture(WEIGHTS, loop.plan.budgets, samples=loop.plan.samples)
    moved = [line for line in lines(tmp_path, "probe") if line["effective_sample"] is not None]
    assert len(moved) >= 2
    for line in moved:
        assert line["effective_sample"] == line["sample"] + loop.plan.lead == (line["step"] + 2) * BATCH
        stream.schedule(line["weights_next"], line["effective_sample"])
    assert loop.drawn == list(zip(*map(np.ndarray.tolist, stream.take(loop.plan.samples)), strict=True))
    assert stream.served.tolist() == list(loop.plan.budgets)
    assert any("UNCALIBRATED" in line for line in loop.said) and "note: a note" in loop.said
    assert not any("OTHER SAMPLES" in line for line in loop.said)


def test_a_probe_too_late_to_act_says_so(tmp_path):
    loop = Loop(tmp_path, steps=10, every=9).until()
    (line,) = lines(tmp_path, "probe")
    assert line["step"] == 9 and line["effective_sample"] is None and "run ends before" in line["reason"]
    assert loop.drawn == Loop(tmp_path, steps=10, watched=False).until().drawn


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A whole run: its folder and its loop."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, Loop(folder).until()


@pytest.mark.parametrize("stop", [3, 8, 13, 20, 23])
def test_resumed_anywhere_the_log_and_the_losses_are_those_of_one_run(tmp_path, undisturbed, stop):
    parted, (whole, one) = tmp_path, undisturbed
    first = Loop(parted).until(stop)
    kept, losses, drawn = first.checkpoint(), list(first.losses), list(first.drawn)
    first.until(min(stop + 5, 24))  # what was written after the checkpoint goes aside
    second = Loop(parted, state=kept).until()
    assert losses + second.losses == one.losses and drawn + second.drawn == one.drawn
    assert lines(parted) == lines(whole)
    assert list(parted.glob("*.discarded-1"))


def test_what_memory_is_free_on_resume_does_not_change_how_probes_work(tmp_path, undisturbed, monkeypatch):
    whole, parted = undisturbed[0], tmp_path / "parted"
    kept = Loop(parted).until(10).checkpoint()
    monkeypatch.setattr(probe, "_free_memory", lambda device, groups: 1)
    second = Loop(parted, state=kept).until()
    assert json.loads(kept["hook"])["memory"] == "full" == second.hook.memory.mode
    assert lines(parted) == lines(whole)
    assert Loop(tmp_path / "fresh").hook.memory.mode == "scores"


def test_without_budgets_endless_domains_are_served_as_the_law_says(tmp_path):
    loop = Loop(tmp_path, budgets=[None] * 3).until()
    probes = lines(tmp_path, "probe")
    assert any(line["effective_sample"] for line in probes) and len(loop.losses) == 24
    for line in probes:
        for k in range(3):
            if line["effective_sample"] and line["score"][k] > 0 > line["score"][(k + 1) % 3]:
                assert abs(sum(line["weights_next"]) - 1) < 1e-9


def test_target_each_is_reported_and_never_acted_on(tmp_path):
    loop = Loop(tmp_path, steps=10, targets=np.eye(3)).until()
    (line, _) = lines(tmp_path, "probe")
    assert (
        np.array(line["P"]).shape == (3, 3, 3)
        and line["target"] == "each"
        and "never acted on" in line["reason"]
    )
    assert loop.drawn == Loop(tmp_path, steps=10, watched=False).until().drawn


@pytest.mark.parametrize("K", [1, 2])
def test_few_domains(tmp_path, K):
    weights = (1.0,) if K == 1 else (0.7, 0.3)
    Loop(tmp_path, steps=12, names=NAMES[:K], weights=weights).until()
    probes = lines(tmp_path, "probe")
    assert len(probes) == 2 and np.array(probes[0]["P"]).shape == (K, K)
    if K == 1:
        assert all(line["effective_sample"] is None and line["score"] == [0.0] for line in probes)


# --- faults ---------------------------------------------------------------------------------------------------------


def fails_at(*steps_of_probe):
    """A draw whose data are bad in the given probes, counted from 0."""

    def draw(part, domain, numbers):
        number = int(numbers[0]) // (16 if part == "gradient" else 8)
        if part == "gradient" and number in steps_of_probe:
            raise ValueError("token 99 is outside the vocabulary")
        return held_out(part, domain, numbers)

    return draw


def test_three_failures_in_a_row_switch_probing_off_and_a_success_starts_the_count_anew(tmp_path):
    loop = Loop(tmp_path, steps=40, mode="act", draw=fails_at(0, 1, 3, 4, 5)).until()
    told = lines(tmp_path, "probe", "skip")
    assert [line["event"] for line in told] == ["skip", "skip", "probe", "skip", "skip", "skip"]
    assert [line["failures"] for line in told if line["event"] == "skip"] == [1, 2, 1, 2, 3]
    assert [line["off"] for line in told if line["event"] == "skip"] == [False] * 4 + [True]
    assert [line["step"] for line in told] == [4, 8, 12, 16, 20, 24] and len(loop.losses) == 40
    assert "token 99 is outside the vocabulary" in told[0]["reason"]
    assert sum("SKIPPED, weights stay" in line for line in loop.said) == 5
    assert sum("PROBING IS OFF" in line for line in loop.said) == 1
    state = loop.hook.state_dict()
    assert state["off"] and state["failures"] == 3 and state["probes"] == 6


def test_skipped_probes_leave_the_weights_alone(tmp_path):
    skipped = Loop(tmp_path, draw=fails_at(*range(9))).until()
    alone = Loop(tmp_path, watched=False).until()
    assert skipped.losses == alone.losses and skipped.drawn == alone.drawn


def test_an_optimiser_without_second_moments_skips_probes_and_ends_nothing(tmp_path):
    loop = Loop(tmp_path, steps=14)
    loop.hook.model = torch_loop.probe_model(loop.module, mean_loss, 3)
    loop.until()
    told = lines(tmp_path, "skip")
    assert [line["failures"] for line in told] == [1, 2, 3] and "metric: identity" in told[0]["reason"]


def test_a_fault_in_a_collective_ends_the_run_and_the_restart_skips_that_probe(tmp_path, monkeypatch):
    first = Loop(tmp_path).until(7)
    kept = first.checkpoint()

    def broken(array, group, sum_of_numbers=reduce.sum_of_numbers):
        if array.ndim == 4:  # the table of a probe's contractions
            raise RuntimeError("Connection closed by peer")
        return sum_of_numbers(array, group)

    with monkeypatch.context() as patch:
        patch.setattr(reduce, "sum_of_numbers", broken)
        with pytest.raises(
            RuntimeError, match=r"collective failed inside the probe at step 8; a restart .* skips this"
        ):
            first.hook.begin(7)
            first.hook.begin(8)
    assert json.loads((tmp_path / "commute.fault").read_text()) == {"step": 8}
    second = Loop(tmp_path, state=kept).until()
    told = lines(tmp_path, "probe", "skip")
    assert [(line["event"], line["step"]) for line in told[:3]] == [("probe", 4), ("skip", 8), ("probe", 12)]
    assert "ended inside this probe before" in told[1]["reason"] and len(second.losses) == 17
    assert [m.training for m in second.module.modules()] == [True] * len(list(second.module.modules()))
    Loop(tmp_path, steps=4)
    assert not (tmp_path / "commute.fault").exists(), "a fresh run forgets the faults of an older one"


def test_a_full_disk_loses_a_line_and_not_the_training(tmp_path, undisturbed, monkeypatch):
    loop = Loop(tmp_path).until(5)
    whole, append, full = loop.hook.record.lines, record.Record.append, [True]

    def no_room(self, event, **fields):
        if full[0]:
            raise OSError(28, "No space left on device")
        append(self, event, **fields)

    monkeypatch.setattr(record.Record, "append", no_room)
    loop.until(13)
    assert loop.hook.record.lines == whole and any("No space left" in line for line in loop.said)
    full[0] = False
    loop.until()
    assert loop.losses == undisturbed[1].losses
    assert [line["step"] for line in lines(tmp_path, "probe")] == [4, 16, 20]


def test_a_record_shorter_than_the_checkpoint_is_refused(tmp_path):
    kept = Loop(tmp_path).until(9).checkpoint()
    (tmp_path / record.NAME).write_text("")
    with pytest.raises(ValueError, match="has 0 lines, the checkpoint was written after"):
        Loop(tmp_path, state=kept)


def test_a_loader_that_has_read_too_far_keeps_its_weights_and_ends_nothing(tmp_path):
    loop = Loop(tmp_path)
    ahead = loop.mixture.copy()
    ahead.skip(loop.plan.samples)
    loop.hook.sampler = types.SimpleNamespace(frontier=ahead, schedule=ahead.schedule)
    loop.until()
    assert all(line["effective_sample"] is None for line in lines(tmp_path, "probe"))
    assert "read past sample 24 already; write a longer `lead`" in lines(tmp_path, "probe")[0]["reason"]
    assert loop.drawn == Loop(tmp_path, watched=False).until().drawn


def test_a_loader_that_brings_other_samples_is_told(tmp_path):
    loop = Loop(tmp_path).until(2)
    loop.hook.begin(2)
    domains = loop.hook.domains.copy()
    loop.hook.end(
        np.zeros(BATCH), np.zeros((BATCH, 3), dtype=np.int64), ((domains + 1) % 3, loop.hook.positions)
    )
    assert "THE LOADER BROUGHT OTHER SAMPLES than the mixture drew for 8..12" in loop.said


def test_windows_are_those_of_the_schedule_and_end_with_the_run(tmp_path):
    hook = Loop(tmp_path, steps=24).hook
    rate = [1e-2 * (1 - step / 24) for step in range(25)]
    assert hook._windows(8) == pytest.approx((sum(rate[8:12]), sum(rate[12:16])))
    assert hook._windows(20) == pytest.approx((sum(rate[20:22]), sum(rate[22:24])))
    assert hook._windows(23) == pytest.approx((rate[23], 1e-30))


def test_each_probe_goes_on_in_the_holdout(tmp_path):
    seen = []

    def draw(part, domain, numbers):
        seen.extend((part, domain, int(n)) for n in numbers)
        return held_out(part, domain, numbers)

    Loop(tmp_path, draw=draw, steps=12).until()
    for part, used in (("gradient", 16), ("direction", 8)):
        assert sorted({n for p, k, n in seen if p == part and k == 0}) == list(range(2 * used))


# --- several ranks --------------------------------------------------------------------------------------------------


def two_ranks(rank, folder):
    """Runs on two ranks: one with its log, one whose ranks disagree about the decision, one with a fault on rank 1."""
    world = reduce.everyone()
    groups = reduce.Groups(world, None, world)
    plain = Loop(folder / "plain", groups=groups).until()
    decide = controller.decide

    def stubborn(law, situation):
        decision = decide(law, situation)
        return decision if rank == 0 else controller.Decision(np.array([1.0, 0.0, 0.0]), "mine")

    controller.decide = stubborn
    split = Loop(folder / "split", groups=groups).until(13)
    controller.decide = decide
    bad = fails_at(0, 1, 2) if rank == 1 else held_out
    faulty = Loop(folder / "faulty", groups=groups, draw=bad).until(14)
    told = types.SimpleNamespace(losses=plain.losses, drawn=plain.drawn, other=split.drawn, said=plain.said)
    try:
        state = plain.checkpoint() | {"step": 0}
        (folder / "plain" / record.NAME).unlink(missing_ok=True)
        torch.distributed.barrier()
        Loop(folder / "plain", groups=groups, state=state)
    except ValueError as fault:
        told.short = str(fault)
    early = Loop(folder / "moved", groups=groups).until(13)
    return told, faulty.drawn, faulty.hook.state_dict()["off"], early.checkpoint(), early.drawn


def test_two_ranks_keep_one_log_and_one_mind(tmp_path):
    first, second = ranks.run(two_ranks, 2, tmp_path, timeout=120)
    (one, faulty, off), (two, faulty_two, off_two) = first[:3], second[:3]
    assert one.drawn == two.drawn and one.drawn[: 13 * BATCH] == one.other == two.other, (
        "rank 0 decides for all"
    )
    assert any(line["effective_sample"] for line in lines(tmp_path / "split", "probe"))
    assert off and off_two and faulty == faulty_two
    told = lines(tmp_path / "faulty", "probe", "skip")
    assert [line["event"] for line in told] == ["skip"] * 3
    assert told[0]["reason"] == "rank 1: preparing: ValueError: token 99 is outside the vocabulary"
    assert "has 0 lines" in one.short and one.short == two.short, "no rank waits for the first"
    _goes_on_alone(tmp_path / "moved", *first[3:])


def _goes_on_alone(folder, kept, drawn):
    """A run of two ranks resumed on one: the stream goes on, budgets end exact, the log stays one log."""
    moved = Loop(folder, state=kept).until()
    assert moved.mixture.served.sum() == 13 * BATCH and moved.hook.mixture.served.tolist() == list(
        moved.plan.budgets
    )
    stream = Mixture(WEIGHTS, moved.plan.budgets, samples=moved.plan.samples)
    for line in lines(folder, "probe"):
        if line["effective_sample"] is not None:
            stream.schedule(line["weights_next"], line["effective_sample"])
    everything = list(zip(*map(np.ndarray.tolist, stream.take(moved.plan.samples)), strict=True))
    assert drawn + moved.drawn == everything
    assert [line["step"] for line in lines(folder, "probe")] == [4, 8, 12, 16, 20]


def test_measure_is_told_the_limit_of_the_mixture_file(tmp_path, monkeypatch):
    loop, seen = Loop(tmp_path, steps=6), []
    loop.hook.config = Config(
        **{**vars(loop.hook.config), "probe": Probe(samples=16, splits=4, time_limit=7.0)}
    )

    def spy(*args):
        seen.append(args[-1])
        raise probe.ProbeFailed("enough")

    monkeypatch.setattr(probe, "measure", spy)
    loop.until()
    assert seen == [7.0]
