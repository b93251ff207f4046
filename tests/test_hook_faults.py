"""Faults in a probe, around it and in the log: what is survived, what is told, what the restart does."""

import json
import types

import numpy as np
import pytest
from plain_loop import BATCH, Loop, fails_at, held_out, lines, mean_loss

from megatron_commute import reduce
from megatron_commute.adapters import torch_loop
from megatron_commute.config import Config, Probe
from megatron_commute.decide import controller
from megatron_commute.measure import probe
from megatron_commute.record import log as record


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
        if array.size > 50:  # the table of a probe's contractions
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


def test_a_full_disk_loses_a_line_and_not_the_training(tmp_path, monkeypatch):
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
    assert loop.losses == Loop(tmp_path / "undisturbed").until().losses
    assert [line["step"] for line in lines(tmp_path, "probe")] == [4, 16, 20]


def test_a_controller_that_fails_leaves_weights_and_training_alone(tmp_path, monkeypatch):
    def fail(law, situation):
        raise ArithmeticError("no such simplex")

    alone = Loop(tmp_path / "alone", mode="act", watched=False).until()
    monkeypatch.setattr(controller, "decide", fail)
    loop = Loop(tmp_path, mode="act").until()
    told = lines(tmp_path, "probe")
    assert told and all("controller failed" in line["reason"] for line in told)
    assert all("no such simplex" in line["reason"] and line["effective_sample"] is None for line in told)
    assert loop.drawn == alone.drawn and loop.losses == alone.losses


def test_a_loader_that_has_read_too_far_keeps_its_weights_and_ends_nothing(tmp_path):
    loop = Loop(tmp_path)
    ahead = loop.mixture.copy()
    ahead.skip(loop.plan.samples)
    loop.hook.stream.sampler = types.SimpleNamespace(frontier=ahead, schedule=ahead.schedule)
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


def test_each_probe_goes_on_in_the_holdout(tmp_path):
    seen = []

    def draw(part, domain, numbers):
        seen.extend((part, domain, int(n)) for n in numbers)
        return held_out(part, domain, numbers)

    Loop(tmp_path, draw=draw, steps=12).until()
    for part, used in (("gradient", 16), ("direction", 8)):
        assert sorted({n for p, k, n in seen if p == part and k == 0}) == list(range(2 * used))


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


def test_the_reason_of_a_skip_is_never_empty(tmp_path):
    """A bare assert has no words: the line that it stands on is told."""

    def draw(part, domain, numbers):
        raise AssertionError

    Loop(tmp_path, steps=6, draw=draw).until()
    assert ": raise AssertionError" in lines(tmp_path, "skip")[0]["reason"]
