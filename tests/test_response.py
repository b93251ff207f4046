"""Measured responses on live runs: what is put back, what is read, what survives a fault and a restart."""

import json

import numpy as np
import pytest
import torch
from plain_loop import WEIGHTS, Loop, held_out, lines

from megatron_commute import lockin, response
from megatron_commute.config import Response

ROLLOUT = Response("rollout", 0.2, 2, 3, None, 4)
WAVE = Response("lock-in", 0.2, 1, 1, None, 4)


@pytest.mark.parametrize("K", [2, 3])
def test_both_orders_train_the_same_samples(K):
    w = np.array(WEIGHTS[:K]) / sum(WEIGHTS[:K])
    v = lockin.wave(w, lockin.walsh(1, K)[0] if K == 2 else np.array([1.0, -1, -1]), 0.2, 0 * w, 1 + 0 * w)
    position = np.array([7, 0, 3][:K])
    (one, two), served = response.orders(w, v, 4, 5, 16, position)
    assert len(one) == len(two) == 13 and abs(served.sum()) < 1e-12
    assert np.abs(served - v).max() <= 1 / 64

    def taken(order):
        return [
            pair
            for domains, positions in order
            for pair in zip(domains.tolist(), positions.tolist(), strict=True)
        ]

    first, second = taken(one), taken(two)
    assert sorted(first[:128]) == sorted(second[:128]) and first[128:] == second[128:]
    assert len(set(first)) == len(first) == 13 * 16
    for k in range(K):
        assert [p for d, p in first if d == k] == list(
            range(position[k], position[k] + sum(d == k for d, _ in first))
        )


class Counting:
    """A Host of one number, which train moves by a rule that remembers the order."""

    def __init__(self):
        self.x, self.trained = 1.0, []

    def save(self):
        return self.x

    def restore(self, saved):
        self.x = saved

    def train(self, step, domains, positions):
        self.trained.append(step)
        self.x = 0.9 * self.x + float((domains == 0).mean())


def test_a_pair_is_read_at_three_marks_and_has_the_sign_of_the_order():
    host, w = Counting(), np.array([0.5, 0.5])
    pair = response.measure(
        host, 40, w, np.array([0.1, -0.1]), Response("rollout", 0.2, 3, 2), 20, np.zeros(2, dtype=int),
        lambda: np.array([host.x, -host.x]),
    )  # fmt: skip
    assert host.x == 1.0 and host.trained == [*range(40, 48)] * 2 and pair.losses.shape == (3, 2, 2)
    a = 0.9
    gain = (
        sum(a**i for i in range(3)) * 0.1
    )  # of the half that is near, against the one that a^3 is taken off
    np.testing.assert_allclose(pair.difference("half"), [gain, -gain])
    np.testing.assert_allclose(pair.difference("switch"), [-gain * (1 - a**3), gain * (1 - a**3)])
    np.testing.assert_allclose(pair.difference()[0], -gain * (1 - a**3) * a**2)
    found = response.effect_of([pair, pair], w, np.eye(2))
    np.testing.assert_allclose(found.value[0], pair.difference()[0] / 0.2 * np.array([1, -1]))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return Loop(tmp_path_factory.mktemp("alone"), steps=16, batch=20, watched=False).until()


def same(one, two):
    state = zip(one.module.state_dict().values(), two.module.state_dict().values(), strict=True)
    moments = zip(one.optimizer.state.values(), two.optimizer.state.values(), strict=True)
    return (
        one.losses == two.losses
        and all(torch.equal(a, b) for a, b in state)
        and all(torch.equal(a[name], b[name]) for a, b in moments for name in a)
    )


def test_rollouts_leave_the_run_bit_for_bit_as_it_was(tmp_path, alone):
    loop = Loop(tmp_path, steps=16, batch=20, mode="fixed", response=ROLLOUT).until()
    told = lines(tmp_path, "response")
    assert same(loop, alone) and [line["step"] for line in told] == [4, 8, 12]
    losses = np.array([line["losses"] for line in told])
    assert losses.shape == (3, 3, 2, 3) and np.ptp(losses[:, :, 0] - losses[:, :, 1]) > 0
    assert loop.drawn == alone.drawn


@pytest.mark.parametrize(("after", "fault"), [(0, ValueError), (5, RuntimeError), (13, KeyboardInterrupt)])
def test_a_rollout_that_ends_early_leaves_the_run_as_if_it_had_not_begun(tmp_path, alone, after, fault):
    loop = Loop(tmp_path, steps=16, batch=20, mode="fixed", response=ROLLOUT)
    loop.fails, loop.fault = after, fault("in the middle")
    if fault is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            loop.until()
        loop.fails = None
        before = Loop(tmp_path / "other", steps=16, batch=20, watched=False).until(4)
        assert same(loop, before)
        return
    loop.until()
    assert same(loop, alone)
    (first, *_) = lines(tmp_path, "response")
    assert "in the middle" in first["reason"] and any(
        "goes on from where it was" in line for line in loop.said
    )


# --- lock-in --------------------------------------------------------------------------------------------------------

TWO = {"names": ("en", "ru"), "weights": (0.6, 0.4)}
LOCKED = {"steps": 48, "every": 8, "batch": 20, "mode": "fixed", "response": WAVE, **TWO}


@pytest.fixture(scope="module")
def waved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("waved")
    return folder, Loop(folder, **LOCKED).until()


def test_the_wave_is_given_back_within_every_cycle_and_budgets_end_exact(waved):
    folder, loop = waved
    assert loop.hook.mixture.served.tolist() == list(loop.plan.budgets)
    told = lines(folder, "response")
    assert len(told) >= 6 and all(line["kind"] == "lock-in" and "reason" not in line for line in told)
    counts = np.array([[d == k for d, _ in loop.drawn] for k in range(2)]).astype(float)
    for line in told:
        start = line["sample"] - 4 * 20  # two cycles in 8 steps: one step up, one down, two at the base
        up, down = counts[:, start : start + 20].sum(1), counts[:, start + 20 : start + 40].sum(1)
        np.testing.assert_allclose((up - down) / 40, line["wave"], atol=1e-12)
        assert np.abs(np.array(line["wave"])).max() <= 0.2 * 0.6 + 1 / 40
    ridden = np.array([list(line["weights"].values()) for line in lines(folder, "loss")])
    assert all(
        list(line["base"].values()) == pytest.approx([0.6, 0.4]) for line in lines(folder, "loss")[:-1]
    )
    assert np.ptp(ridden[:-1, 0]) > 0.02, "loss lines name the weights that were used"


def test_effects_stand_in_the_probe_lines(waved):
    probes = lines(waved[0], "probe")
    known = [line for line in probes if line.get("effect")]
    assert known and all(abs(np.dot(line["effect"], TWO["weights"])) < 1e-9 for line in known)


@pytest.mark.parametrize("stop", [13, 18])
def test_resumed_in_the_middle_of_a_cycle_the_log_is_that_of_one_run(tmp_path, waved, stop):
    first = Loop(tmp_path, **LOCKED).until(stop)
    kept, drawn = first.checkpoint(), list(first.drawn)
    second = Loop(tmp_path, state=kept, **LOCKED).until()
    assert drawn + second.drawn == waved[1].drawn and lines(tmp_path) == lines(waved[0])
    json.dumps(second.hook.state_dict(), allow_nan=False)


def test_readings_that_fail_cost_the_reading_only(tmp_path):
    def draw(part, domain, numbers):
        if part == "response" and domain == 1:
            raise ValueError("token 99 is outside the vocabulary")
        return held_out(part, domain, numbers)

    loop = Loop(tmp_path, draw=draw, **LOCKED | {"steps": 16}).until()
    told = lines(tmp_path, "response")
    assert told and all("token 99" in line["reason"] for line in told)
    assert loop.hook.mixture.served.tolist() == list(loop.plan.budgets)


# --- law finish -----------------------------------------------------------------------------------------------------


def test_finish_rehearses_one_order_and_acts_in_the_last_two_windows_alone(tmp_path, monkeypatch):
    """48 steps, decisions take effect two steps late: that of step 32 leaves 14 steps, its window of 8 and the last."""
    rehearsal = Response("rollout", 0.9, 2, 0, None, 8)
    asked = {"targets": [[0.0, 1.0, 0.0]], "response": rehearsal, "law": "finish", "confidence": 0.1}
    trained, excursion = [], Loop._excursion
    monkeypatch.setattr(
        Loop, "_excursion", lambda self, step, *data: (trained.append(step), excursion(self, step, *data))
    )
    loop = Loop(tmp_path, steps=48, every=8, batch=20, **asked).until()
    assert trained[:8] == [44, 45, 46, 47] * 2, "at the learning rates of the run's last steps"
    assert loop.hook.mixture.served.tolist() == list(loop.plan.budgets)
    told = lines(tmp_path, "response")
    assert len(told) >= 4 and all("reason" not in line for line in told)
    for line in told:  # ru alone against the others, in their proportions
        np.testing.assert_allclose(np.array(line["wave"]) / line["wave"][1], [-2 / 3, 1, -1 / 3], atol=0.1)
    probes = lines(tmp_path, "probe")
    acted = {line["step"]: line for line in probes if line["effective_sample"] is not None}
    assert set(acted) <= {32, 40} and 32 in acted
    seen = acted[32]["situation"]
    pairs = [np.array(line["losses"]) for line in told if line["step"] < 32]
    changes = np.array([(pair[1, 0] - pair[1, 1]) / 2 for pair in pairs])
    order = np.array(seen["order"])
    sizes = np.array([line["wave"] for line in told[: len(pairs)]]) @ order / (order @ order)
    np.testing.assert_allclose(seen["recency"], sizes @ changes / (sizes @ sizes), rtol=1e-9)
    moved = np.array(acted[32]["weights_next"]) - seen["weights"]
    assert np.sign(moved[1]) == -np.sign(seen["recency"][1]) and acted[32]["laws"]["finish"]["expected"] < 0
