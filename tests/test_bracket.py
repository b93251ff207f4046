"""The sign and the constant: closed forms, swapped steps, and integrated flows of non-quadratic losses."""

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from megatron_commute import bracket

K, N = 3, 5


class Wavy:
    """K smooth losses sum_i cosh(a_i . theta - b_i) + a quadratic: gradients and Hessians in closed form."""

    def __init__(self, seed=0, domains=K, n=N):
        rng = np.random.default_rng(seed)
        self.a = rng.standard_normal((domains, 4, n)) / np.sqrt(n)
        self.b = rng.standard_normal((domains, 4))
        self.q = rng.standard_normal((domains, n, n)) / n
        self.q = self.q @ self.q.swapaxes(1, 2)
        self.theta = 0.5 * rng.standard_normal(n)
        self.target = rng.dirichlet(np.ones(domains))
        self.weights = rng.dirichlet(np.full(domains, 5.0))

    def loss(self, theta, k):
        return np.cosh(self.a[k] @ theta - self.b[k]).sum() + theta @ self.q[k] @ theta / 2

    def gradient(self, theta, k):
        return np.sinh(self.a[k] @ theta - self.b[k]) @ self.a[k] + self.q[k] @ theta

    def hessian(self, theta, k):
        return (self.a[k].T * np.cosh(self.a[k] @ theta - self.b[k])) @ self.a[k] + self.q[k]

    def gradients(self, theta):
        return np.array([self.gradient(theta, k) for k in range(len(self.a))])

    def target_loss(self, theta):
        return sum(t * self.loss(theta, k) for k, t in enumerate(self.target))

    def measure(self, theta, lam, metric):
        """M, u . g_k and h_k (rows) for the direction lambda."""
        u, g = metric * lam, self.gradients(theta)
        h = np.array([self.hessian(theta, k) @ u for k in range(len(self.a))])
        return h @ (metric * g).T, g @ u, h

    def flow(self, theta, weights, time, metric=1.0, decay=0.0):
        def slope(_, x):
            return -metric * (weights @ self.gradients(x)) - decay * x

        return solve_ivp(slope, (0, time), theta, "DOP853", rtol=1e-13, atol=1e-15).y[:, -1]


def test_pairs_and_scores_are_the_brackets_of_losses_and_of_their_mixtures():
    problem = Wavy(1)
    theta, w = problem.theta, problem.weights
    g, H = problem.gradients(theta), np.array([problem.hessian(theta, k) for k in range(K)])
    u = problem.target @ g
    M, _, _ = problem.measure(theta, u, 1.0)
    P = bracket.pairwise(M)
    direct = np.array([[u @ (H[j] @ g[i] - H[i] @ g[j]) for j in range(K)] for i in range(K)])  # equation 6
    assert np.abs(P - direct).max() < 1e-12 * np.abs(M).max() and (P == -P.T).all()
    s = bracket.scores(P, w)
    for i, j in ((0, 1), (2, 0), (1, 2)):
        gap = u @ (np.tensordot(w, H, 1) @ (g[i] - g[j]) - (H[i] - H[j]) @ (w @ g))
        assert abs(s[i] - s[j] - gap) < 1e-12 * np.abs(M).max()


def test_swapped_steps_differ_by_the_bracket_times_step_squared():
    problem = Wavy(2)
    u = problem.target @ problem.gradients(problem.theta)
    P = bracket.pairwise(problem.measure(problem.theta, u, 1.0)[0])
    steps = 10.0 ** -np.arange(1, 5)
    for i, j in ((0, 1), (1, 2), (2, 0)):
        errors = []
        for step in steps:
            ends = []
            for order in ((i, j), (j, i)):
                theta = problem.theta
                for k in order:
                    theta = theta - step * problem.gradient(theta, k)
                ends.append(problem.target_loss(theta))
            errors.append(abs((ends[0] - ends[1]) / step**2 - P[i, j]) / abs(P[i, j]))
        assert errors[-1] < 2e-3
        slopes = np.diff(np.log10(errors))
        assert np.abs(slopes[1:] + 1).max() < 0.1, errors


@pytest.mark.parametrize("metric", [False, True], ids=["identity", "metric"])
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("rates", [(1.0, 1.0), (1.1, 0.9), (0.6, 1.4)])
def test_full_prediction_against_integrated_flows(metric, decay, rates):
    """The whole dL, and, with the first-order term taken off, the bracket and decay terms by themselves."""
    problem = Wavy(3)
    D = np.random.default_rng(9).uniform(0.3, 2.0, N) if metric else np.ones(N)
    w, delta, i, j = problem.weights, 0.05, 0, 2
    shift = delta * (np.eye(K)[i] - np.eye(K)[j])
    for window in (0.02, 0.005, 0.00125):
        e1, e2 = (rate * window for rate in rates)
        middle = problem.flow(problem.theta, w, e1, D, decay)
        end = problem.flow(middle, w, e2, D, decay)
        lam = _pulled_back(problem, middle, end, w, e2, D, decay)
        M, u_g, h = problem.measure(middle, lam, D)
        s = bracket.scores(bracket.pairwise(M), w)
        score = bracket.full_score(s, u_g, h @ middle, decay, (e1, e2))
        time = bracket.window_time(e1, e2)
        predicted = bracket.predicted_excess_loss(score[i] - score[j], delta, time)
        both = []
        for x in (shift, -shift):
            moved = problem.flow(problem.flow(problem.theta, w + x, e1, D, decay), w - x, e2, D, decay)
            both.append(problem.target_loss(moved) - problem.target_loss(end))
        assert abs(both[0] / predicted - 1) < 0.5 * window
        first_order = -delta * (e1 - e2) * (u_g[i] - u_g[j])
        second_order = (both[0] - both[1]) / 2 - first_order  # the odd part in delta
        assert abs(second_order / (predicted - first_order) - 1) < 3 * window


def _pulled_back(problem, middle, end, w, time, D, decay):
    """dL(end)/dtheta(middle), by integrating the variational equation forwards."""
    n = len(middle)

    def slope(_, packed):
        x, J = packed[:n], packed[n:].reshape(n, n)
        hessian = sum(w[k] * problem.hessian(x, k) for k in range(K))
        return np.concatenate(
            [-D * (w @ problem.gradients(x)) - decay * x, (-(D[:, None] * hessian) @ J - decay * J).ravel()]
        )

    start = np.concatenate([middle, np.eye(n).ravel()])
    J = solve_ivp(slope, (0, time), start, "DOP853", rtol=1e-12, atol=1e-14).y[n:, -1].reshape(n, n)
    return J.T @ (problem.target @ problem.gradients(end))


def test_decay_of_some_parameters_only():
    problem = Wavy(4)
    mask = np.array([1.0, 1.0, 0.0, 0.0, 1.0])
    w, delta, e, c = problem.weights, 0.05, 0.002, 0.5

    def flow(theta, weights):
        def slope(_, x):
            return -(weights @ problem.gradients(x)) - c * mask * x

        return solve_ivp(slope, (0, e), theta, "DOP853", rtol=1e-13, atol=1e-15).y[:, -1]

    u = problem.target @ problem.gradients(problem.theta)
    M, u_g, h = problem.measure(problem.theta, u, 1.0)
    s = bracket.scores(bracket.pairwise(M), w)
    decayed = problem.gradients(problem.theta) @ (mask * u)
    score = bracket.full_score(s, u_g, h @ (mask * problem.theta), c, (e, e), decayed)
    shift = delta * np.array([1.0, -1.0, 0.0])
    base, moved = (flow(flow(problem.theta, w + x), w - x) for x in (0 * shift, shift))
    measured = problem.target_loss(moved) - problem.target_loss(base)
    assert abs(measured / bracket.predicted_excess_loss(score[0] - score[1], delta, e) - 1) < 0.03
    everywhere = bracket.full_score(s, u_g, h @ problem.theta, c, (e, e))
    assert abs(measured / bracket.predicted_excess_loss(everywhere[0] - everywhere[1], delta, e) - 1) > 0.1


def test_improvable_and_may_switch_tell_what_lowers_the_loss():
    """Each verdict is compared with the loss of the flow that follows it."""
    e, delta = 1e-3, 0.2
    for seed in range(6):
        problem = Wavy(seed, domains=2)
        u = problem.target @ problem.gradients(problem.theta)
        P = bracket.pairwise(problem.measure(problem.theta, u, 1.0)[0])
        w = np.array([0.5, 0.5])
        base = problem.flow(problem.theta, w, 2 * e)
        improvable = bracket.improvable(bracket.scores(P, w), w)
        may_switch = bracket.may_switch(P)
        assert improvable.sum() == 1 and may_switch.sum() == 3
        for i, j in ((0, 1), (1, 0)):
            later, sooner = np.eye(2)[i], np.eye(2)[j]
            shift = delta * (sooner - later)
            moved = problem.flow(problem.flow(problem.theta, w + shift, e), w - shift, e)
            assert improvable[i, j] == (problem.target_loss(moved) < problem.target_loss(base))
            pure = problem.flow(problem.flow(problem.theta, later, e), sooner, e)
            blend = problem.flow(problem.theta, (1 - delta) * later + delta * sooner, e)
            blend = problem.flow(blend, delta * later + (1 - delta) * sooner, e)
            lower = problem.target_loss(blend) < problem.target_loss(pure)
            assert may_switch[i, j] == (not lower)


def test_improvable_respects_bounds_and_errors():
    s = np.array([0.3, -0.1, 0.0])
    w = np.array([0.5, 0.5, 0.0])
    expected = np.zeros((3, 3), dtype=bool)
    expected[0, 1] = True  # the third domain has no weight to move
    assert (bracket.improvable(s, w) == expected).all()
    assert not bracket.improvable(s, w, error=0.4).any()
    assert not bracket.improvable(s, w, minimum=[0.5, 0.0, 0.0]).any()
    assert not bracket.improvable(s, w, maximum=[1.0, 0.5, 1.0]).any()
    steps = bracket.improvable(np.stack([s, s]), np.stack([w, np.array([1.0, 0.0, 0.0])]))
    assert steps.shape == (2, 3, 3) and steps[0, 0, 1] and not steps[1].any()
    P = np.array([[0.0, 0.2], [-0.2, 0.0]])
    assert (bracket.may_switch(P) == [[True, False], [True, True]]).all()
    assert bracket.may_switch(P, error=0.2).all()


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_numpy_and_torch_agree_for_any_batch_shape(batch):
    rng = np.random.default_rng(0)
    M, w, u_g, h_theta = (rng.standard_normal((*batch, *shape)) for shape in ((K, K), (K,), (K,), (K,)))

    def everything(M, w, u_g, h_theta):
        P = bracket.pairwise(M)
        s = bracket.scores(P, w)
        full = bracket.full_score(s, u_g, h_theta, 0.1, (1.1, 0.9))
        return P, s, full, bracket.improvable(full, abs(w)), bracket.may_switch(P, 0.1)

    ours = everything(M, w, u_g, h_theta)
    theirs = everything(*(torch.tensor(x) for x in (M, w, u_g, h_theta)))
    for a, b in zip(ours, theirs, strict=True):
        assert isinstance(b, torch.Tensor) and a.shape == tuple(b.shape)
        np.testing.assert_allclose(a, b.numpy(), atol=1e-13)
    assert [x.shape for x in ours[:3]] == [(*batch, K, K), (*batch, K), (*batch, K)]


def test_float32_and_lists_are_taken_to_float64():
    assert bracket.pairwise([[0, 1], [2, 0]]).tolist() == [[0.0, 1.0], [-1.0, 0.0]]
    P = bracket.pairwise(torch.tensor([[0.0, 1.0], [2.0, 0.0]], dtype=torch.float32))
    assert P.dtype == torch.float64
    assert bracket.scores(P, [0.25, 0.75]).tolist() == [0.75, -0.25]
    assert bracket.scores(P, torch.tensor([0.25, 0.75], dtype=torch.float32)).dtype == torch.float64
    assert type(bracket.predicted_excess_loss(torch.tensor(2.0), 0.5, 0.1)) is float
    assert bracket.predicted_excess_loss(np.ones(3), 0.5, 2.0).tolist() == [2.0, 2.0, 2.0]


def test_errors_name_the_cure():
    with pytest.raises(ValueError, match=r"pass M\[..., K, K\]"):
        bracket.pairwise(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="with the same K"):
        bracket.scores(np.zeros((2, 2)), np.ones(3))
    for times in ((0.0, 1.0), (1.0, -1.0), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="learning rate x steps, both positive"):
            bracket.full_score(np.ones(2), np.ones(2), np.ones(2), 0.0, times)
