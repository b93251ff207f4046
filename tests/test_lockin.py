"""Lock-in: waves within their bounds, the demodulated effect against exact paired orders, errors that cover."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import stdtrit

from megatron_commute import lockin


@pytest.mark.parametrize("K", [2, 3, 4, 5, 8])
def test_walsh_signs_separate_the_domains(K):
    period = 2 if K == 2 else 1 << K.bit_length()
    signs = lockin.walsh(3 * period, K)
    assert set(np.unique(signs)) == {-1.0, 1.0} and (signs[:period] == signs[period : 2 * period]).all()
    assert (signs[:period].sum(0) == 0).all()
    if K == 2:
        assert (signs[:, 0] == -signs[:, 1]).all() and signs[:3, 0].tolist() == [1, -1, 1]
    else:
        assert (signs[:period].T @ signs[:period] == period * np.eye(K)).all()


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 8), st.integers(0, 2**31), st.floats(0.01, 0.2))
def test_a_wave_stays_within_delta_bounds_and_the_simplex(K, seed, delta):
    rng = np.random.default_rng(seed)
    base = rng.dirichlet(np.ones(K))
    low, high = base * rng.uniform(0, 1, K), base + (1 - base) * rng.uniform(0, 1, K)
    signs = rng.choice([-1.0, 1.0], K)
    v = lockin.wave(base, signs, delta, low, high)
    assert abs(v.sum()) < 1e-12 and (np.abs(v) <= delta * base + 1e-12).all()
    for way in (1, -1):
        assert (base + way * v >= low - 1e-12).all() and (base + way * v <= high + 1e-12).all()


def test_demodulation_is_the_published_formula_for_two_domains():
    rng = np.random.default_rng(0)
    n, delta = 12, 0.05
    s = (-1.0) ** np.arange(n)
    L = 3 - 0.02 * np.arange(n) + 0.01 * s + 0.003 * rng.normal(size=n)
    A = np.array([s[j] * (2 * L[j] - L[j - 1] - L[j + 1]) / 4 for j in range(1, n - 1)])
    found = lockin.demodulate(L, delta * s[:, None] * [[1.0, -1.0]], [0.5, 0.5])
    np.testing.assert_allclose(found.value, [[A.mean() / delta / 2, -A.mean() / delta / 2]], rtol=1e-12)
    error = A.std(ddof=1) / np.sqrt(n - 2) / delta / 2
    assert found.se[0, 0] == found.se[0, 1] and 1.4 * error < found.se[0, 0] < 1.8 * error
    assert 1 <= found.dof <= n - 3


@pytest.mark.parametrize(("K", "cycles"), [(2, 8), (3, 12), (5, 24)])
def test_the_interval_covers_the_true_effect_under_drift(K, cycles):
    """95 % intervals over 400 seeds with independent noise of each reading: 91 to 99 % hold the truth."""
    held = total = 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        w = rng.dirichlet(3 * np.ones(K))
        true = rng.normal(size=(2, K))
        true -= (true @ w)[:, None]
        waves = np.array([lockin.wave(w, s, 0.2, 0 * w, 1 + 0 * w) for s in lockin.walsh(cycles, K)])
        t = np.arange(cycles)[:, None] / cycles
        L = 3 - 0.1 * t + 0.02 * t**2 + waves @ true.T + 0.004 * rng.normal(size=(cycles, 2))
        found = lockin.demodulate(L, waves, w)

        inside = np.abs(found.value - true) <= stdtrit(found.dof, 0.975) * found.se
        held, total = held + inside.sum(), total + inside.size
        np.testing.assert_allclose(found.value @ w, 0, atol=1e-9)
    assert 0.91 <= held / total <= 0.99


def test_too_few_readings_give_no_effect_and_epochs_are_not_mixed():
    w, signs = np.array([0.6, 0.4]), lockin.walsh(8, 2)
    waves = 0.05 * signs
    L = 2 + waves[:, 0] * 3.0
    assert lockin.demodulate(L[:3], waves[:3], w) is None
    jump = L + np.repeat([0.0, 5.0], 4)
    apart = lockin.demodulate(jump, waves, w, epoch=np.repeat([0, 1], 4))
    assert apart.dof >= 1
    np.testing.assert_allclose(apart.value[0], [3 * 0.4, -3 * 0.6], atol=1e-9)
    assert np.abs(lockin.demodulate(jump, waves, w).value - apart.value).max() > 0.1
    gap = np.array([0, 1, 2, 3, 6, 7, 8, 9.0])
    drift = lockin.demodulate(L + 0.7 * gap, waves, w, at=gap)
    np.testing.assert_allclose(drift.value[0], [1.2, -1.8], atol=1e-9)


class Quadratics:
    """Descent on a weighted sum of K quadratics: exact, without noise; the oracle below runs both orders itself."""

    def __init__(self, K, n=6, seed=0):
        rng = np.random.default_rng(seed)
        A = rng.normal(size=(K, n, n))
        self.A, self.b = A @ A.swapaxes(1, 2) / n + 0.5 * np.eye(n), rng.normal(size=(K, n))

    def step(self, x, w):
        return x - 0.05 * np.einsum("k,kij,kj->i", w, self.A, x - self.b)

    def losses(self, x):
        d = x - self.b
        return np.einsum("ki,kij,kj->k", d, self.A, d) / 2

    def after(self, x, segments):
        for w, steps in segments:
            for _ in range(steps):
                x = self.step(x, w)
        return x


@pytest.mark.parametrize("K", [2, 3, 4])
def test_lock_in_on_a_run_finds_the_effect_of_paired_orders_after_the_tail(K):
    """The oracle starts pairs from saved states in the middle of the run."""
    job, w = Quadratics(K), np.array([0.5, 0.3, 0.15, 0.05][:K])
    w, half, tail = w / w.sum(), 6, 60
    x, states = job.after(np.full(6, 3.0), [(w, 600)]), []
    state = lockin.Waves(K)
    changes = dict(state.plan(0, 1500, w, 2 * half + tail, half, 0.1, 0 * w, 1 + 0 * w))
    now = w
    for t in range(1500):
        now = changes.get(t, now)
        due = state.due(t, tail)
        if due and due[1] == "tail":
            state.take(due[0], job.losses(x))
        if t % (2 * half + tail) == 0:
            states.append(x)
        x = job.step(x, now)
    found = lockin.effect_of(state.readings, w, np.eye(K))
    middle = states[len(states) // 2]
    exact = np.zeros((K, K))
    for k in range(K):
        d = 0.05 * w.min() * (np.eye(K)[k] - w)
        first, last = (
            job.losses(job.after(middle, [(w + s * d, half), (w - s * d, half), (w, tail)])) for s in (1, -1)
        )
        exact[:, k] = (first - last) / 2 / (0.05 * w.min())
    exact -= (exact @ w)[:, None]
    assert np.abs(found.value - exact).max() < 0.15 * np.abs(exact).max()


def test_planning_fills_a_block_gives_everything_back_and_survives_json():
    state, w = lockin.Waves(3), np.array([0.6, 0.1, 0.3])
    changes = state.plan(100, 500, w, 80, 20, 0.2, 0 * w, 1 + 0 * w)
    assert len(state.cycles) == len(changes) // 3 <= 5 and state.epoch == 1
    for (start, up), (half, down), (end, base) in zip(*[iter(changes)] * 3, strict=True):
        np.testing.assert_allclose(up + down, 2 * base)
        assert half - start == end - half == 20 and (base == w).all()
    assert state.due(state.cycles[0].start + 40, 40)[1] == "switch"
    assert state.due(state.cycles[0].start + 40, 0) is None
    again = lockin.Waves(3)
    again.load_state_dict(json.loads(json.dumps(state.state_dict())))
    assert again.state_dict() == state.state_dict()
    state.drop(300)
    assert all(cycle.end <= 300 for cycle in state.cycles) and state.cycles
    state.plan(500, 900, w, 80, 20, 0.2, 0 * w, 1 + 0 * w)
    assert state.epoch == 1
    state.plan(900, 1300, np.array([0.5, 0.2, 0.3]), 80, 20, 0.2, 0 * w, 1 + 0 * w)
    assert state.epoch == 2


def test_along_is_the_regression_through_zero_of_one_order():
    rng = np.random.default_rng(0)
    order, n = np.array([-0.1, 0.15, -0.05]), 9
    sizes = rng.uniform(0.5, 1.0, n)
    truth, noise = np.array([0.2, -0.5, 0.0]), 0.01 * rng.normal(size=(n, 3))
    value, se, dof = lockin.along(order, sizes[:, None] * order, sizes[:, None] * truth + noise)
    for k in range(3):
        fit = np.linalg.lstsq(sizes[:, None], sizes * truth[k] + noise[:, k], rcond=None)
        assert value[k] == pytest.approx(fit[0][0])
        assert se[k] == pytest.approx(np.sqrt(fit[1][0] / (n - 1) / (sizes @ sizes)))
    assert dof == n - 1 and lockin.along(order, [order], [[1.0, 2.0, 3.0]]) is None


def test_towards_has_more_of_what_the_target_asks_for():
    base, target = np.array([0.6, 0.1, 0.3]), np.array([0.0, 1.0, 0.0])
    v = lockin.towards(target, base, 0.9, np.zeros(3), np.ones(3))
    np.testing.assert_allclose(v, [-0.06, 0.09, -0.03], atol=1e-12)
    assert not lockin.towards(base, base, 0.9, np.zeros(3), np.ones(3)).any()
