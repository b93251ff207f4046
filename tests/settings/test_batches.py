"""Steps that grow: against Megatron's own count, step by step, and in a run of the hook."""

import dataclasses

import numpy as np
import plain_loop
import pytest

from megatron_commute import config
from megatron_commute.mixture import Mixture
from megatron_commute.settings.batches import Batches
from megatron_commute.settings.shares import Run

RAMPS = [(8, 4, 100, 24), (4, 4, 40, 16), (2, 2, 1, 8), (16, 16, 1000, 64), (1, 1, 333, 8)]
RAMPS += [
    (1, 1, 232, 8)
]  # a step begins at the ramp's very end, where its last part is one too few by rounding


def steps(first, increment, samples, full, count):
    """Samples of `count` steps as documented: the batch grows by an increment after each equal part of the ramp-up."""
    parts, consumed, told = (full - first) / increment, 0, []
    for _ in range(count):
        batch = full if consumed > samples else first + int(consumed / (samples / parts)) * increment
        told.append(batch)
        consumed += batch
    return told


@pytest.mark.parametrize(("first", "increment", "samples", "full"), RAMPS)
def test_steps_and_samples_are_those_of_a_count(first, increment, samples, full):
    batches, sizes = Batches(full, (first, increment, samples)), steps(first, increment, samples, full, 200)
    begins = np.cumsum([0, *sizes]).tolist()
    assert batches.of_steps(200).tolist() == sizes and [batches.begin(n) for n in range(201)] == begins
    assert [batches.size(begin) for begin in begins[:-1]] == sizes and set(sizes) <= set(batches.sizes)
    assert sizes[batches.first_full] == full and begins[batches.first_full] > samples
    for sample in range(begins[60]):
        step = batches.step(sample)
        assert begins[step] <= sample < begins[step + 1]
        assert batches.next(sample) == min(begin for begin in begins if begin >= sample)


def test_without_a_ramp_up_a_step_is_a_batch():
    batches = Batches(8)
    assert [batches.step(n) for n in (0, 7, 8, 800)] == [0, 0, 1, 100] and batches.begin(100) == 800
    assert [batches.next(n) for n in (0, 1, 8, 9)] == [0, 8, 8, 16] and list(batches.sizes) == [8]


@pytest.mark.parametrize(
    ("rampup", "told"),
    [
        ((6, 2, 40), "a step of 6 samples is not divisible"),
        ((4, 8, 40), "an increment that leads"),
        ((16, 4, 40), "below"),
    ],
)
def test_a_ramp_up_that_ranks_cannot_share_is_refused_with_its_cure(rampup, told):
    run = Run(seq_length=8, global_batch=16, micro_batch=2, data_parallel=2, train_iters=9, rampup=rampup)
    with pytest.raises(config.ConfigError, match=f"--rampup-batch-size .*{told}"):
        config._check_run(run)


def ramped(folder, law="tilt", **more):
    """A loop of 24 steps: 2, 4, 6 samples a step, then 8."""
    rampup = (2, 2, 24)
    samples = Batches(8, rampup).begin(24)
    shares = np.array(plain_loop.WEIGHTS)
    budgets = [round(samples * share) for share in shares[1:]]
    return plain_loop.Loop(
        folder, batch=8, law=law, rampup=rampup, budgets=[samples - sum(budgets), *budgets], **more
    )


def test_decisions_take_effect_at_steps_of_any_size_and_budgets_are_exact(tmp_path):
    loop = ramped(tmp_path / "whole").until()
    batches = loop.run.batches
    begins = {batches.begin(step) for step in range(25)}
    assert batches.of_steps(24)[:9].tolist() == [2, 2, 2, 2, 4, 4, 6, 6, 8]
    assert len(loop.drawn) == loop.plan.samples == batches.begin(24)
    assert loop.hook.stream.served.tolist() == list(loop.plan.budgets)
    assert not any("OTHER SAMPLES" in line for line in loop.said)
    stream = Mixture(plain_loop.WEIGHTS, loop.plan.budgets, samples=loop.plan.samples)
    moved = [
        line for line in plain_loop.lines(tmp_path / "whole", "probe") if line["effective_sample"] is not None
    ]
    assert len(moved) >= 2
    for line in moved:
        assert line["sample"] == batches.begin(line["step"]) and line["effective_sample"] in begins
        assert 0 <= line["effective_sample"] - line["sample"] - loop.plan.lead < 8
        stream.schedule(line["weights_next"], line["effective_sample"])
    assert loop.drawn == list(zip(*map(np.ndarray.tolist, stream.take(loop.plan.samples)), strict=True))


@pytest.mark.parametrize("stop", [3, 6, 8, 15])
def test_resumed_across_a_change_of_the_batch_size_the_run_is_one(tmp_path, stop):
    whole = ramped(tmp_path / "whole").until()
    first = ramped(tmp_path / "parted").until(stop)
    kept, losses, drawn = first.checkpoint(), list(first.losses), list(first.drawn)
    first.until(stop + 3)
    second = ramped(tmp_path / "parted", state=kept).until()
    assert losses + second.losses == whole.losses and drawn + second.drawn == whole.drawn
    assert plain_loop.lines(tmp_path / "parted") == plain_loop.lines(tmp_path / "whole")


def test_the_start_line_tells_the_ramp_up(tmp_path):
    ramped(tmp_path).until(1)
    (start,) = plain_loop.lines(tmp_path, "start")
    assert start["rampup_batch_size"] == [2, 2, 24] and start["samples"] == Batches(8, (2, 2, 24)).begin(24)
    assert dataclasses.replace(Run(6, 8, 1, 1, 24), rampup=(2, 2, 24)).samples == start["samples"]
