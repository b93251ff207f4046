"""The hook in plain torch loops: watching is invisible, faults are survived, decisions take effect where the log says."""

import json
import types

import numpy as np
import pytest
import ranks
import torch
from plain_loop import BATCH, NAMES, WEIGHTS, Loop, fails_at, held_out, lines

from megatron_commute import reduce
from megatron_commute.decide import controller
from megatron_commute.measure import probe
from megatron_commute.mixture import Mixture
from megatron_commute.record import log as record


def test_listeners_hear_every_line_as_the_record_has_it(tmp_path):
    heard = []
    Loop(tmp_path, steps=12, listeners=[heard.append]).until()
    assert heard == record.read(tmp_path)


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


@pytest.mark.parametrize("stop", [3, 8, 13, 23])
def test_resumed_anywhere_the_log_and_the_losses_are_those_of_one_run(tmp_path, undisturbed, stop):
    parted, (whole, one) = tmp_path, undisturbed
    first = Loop(parted).until(stop)
    kept, losses, drawn = first.checkpoint(), list(first.losses), list(first.drawn)
    first.until(min(stop + 5, 24))  # what was written after the checkpoint goes aside
    second = Loop(parted, state=kept).until()
    assert losses + second.losses == one.losses and drawn + second.drawn == one.drawn
    assert lines(parted) == lines(whole)
    assert list(parted.glob("*.discarded-1"))


def test_resumed_at_its_end_a_run_tells_the_weights_of_its_last_step(tmp_path):
    """There a host validates once more."""
    loop = Loop(tmp_path).until()
    again = Loop(tmp_path, state=loop.checkpoint())
    again.hook.log_losses(24)
    told = list(lines(tmp_path, "loss")[-1]["weights"].values())
    assert told == loop.hook.weights.tolist() and sum(told) == pytest.approx(1)


def test_what_memory_is_free_on_resume_does_not_change_how_probes_work(tmp_path, undisturbed, monkeypatch):
    whole, parted = undisturbed[0], tmp_path / "parted"
    kept = Loop(parted).until(10).checkpoint()
    vector = sum(p.numel() * p.element_size() for p in undisturbed[1].module.parameters())
    monkeypatch.setattr(probe, "_free_memory", lambda device, groups: 8 * vector)  # for scores alone
    second = Loop(parted, state=kept).until()
    assert json.loads(kept["hook"])["memory"] == "full" == second.hook.memory.mode
    assert lines(parted) == lines(whole)
    assert Loop(tmp_path / "fresh").hook.memory.mode == "scores"


@pytest.mark.parametrize(
    ("version", "named"), [(2, r"of 0\.1\.0"), (7, "of version 7"), (None, "of version None")]
)
def test_a_state_of_another_version_is_refused_and_the_record_stays(tmp_path, version, named):
    kept = Loop(tmp_path).until(10).checkpoint()
    state = json.loads(kept["hook"]) | {"version": version}
    written = (tmp_path / record.NAME).read_bytes()
    with pytest.raises(ValueError, match=f"plug-in state {named}: resume with the version that wrote it"):
        Loop(tmp_path, state=kept | {"hook": json.dumps(state)})
    assert (tmp_path / record.NAME).read_bytes() == written


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


def test_one_domain_has_nothing_to_decide(tmp_path):
    Loop(tmp_path, steps=12, names=NAMES[:1], weights=(1.0,)).until()
    probes = lines(tmp_path, "probe")
    assert len(probes) == 2 and probes[0]["P"] == [[0.0]]
    assert all(line["effective_sample"] is None and line["score"] == [0.0] for line in probes)


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
    assert moved.mixture.served.sum() == 13 * BATCH and moved.hook.stream.served.tolist() == list(
        moved.plan.budgets
    )
    stream = Mixture(WEIGHTS, moved.plan.budgets, samples=moved.plan.samples)
    for line in lines(folder, "probe"):
        if line["effective_sample"] is not None:
            stream.schedule(line["weights_next"], line["effective_sample"])
    everything = list(zip(*map(np.ndarray.tolist, stream.take(moved.plan.samples)), strict=True))
    assert drawn + moved.drawn == everything
    assert [line["step"] for line in lines(folder, "probe")] == [4, 8, 12, 16, 20]
