"""Standard errors of a probe: intervals of score gaps hold the truth as often as they say, and know rounding too."""

import numpy as np
import oracles
import pytest
import torch
from probing import EACH, FLOW, LENGTH, MIXED, VOCABULARY, WEIGHTS, K, measured, settings, small_gpt

from megatron_commute import hvp, reduce
from megatron_commute.adapters import torch_loop
from megatron_commute.measure import probe


class Noisy(torch.nn.Module):
    """K quadratic losses whose samples differ in centre and curvature: L = (theta - b)' A (theta - b) / 2."""

    def __init__(self, n=5, numbers=4096):
        super().__init__()
        rng = np.random.default_rng(11)
        self.theta = torch.nn.Parameter(torch.from_numpy(rng.normal(size=n)))
        roots = rng.normal(size=(K, n, n))
        self.A = torch.from_numpy(roots @ roots.swapaxes(1, 2) / n)
        self.b = torch.from_numpy(rng.normal(size=(K, n)))
        noise = rng.normal(size=(K, numbers, n, n + 1))
        # exactly zero mean over the bank, so that A and b are the truth
        self.noise = torch.from_numpy(noise - noise.mean(1, keepdims=True))

    def forward(self, tokens):
        total = 0
        for k, number in tokens.tolist():
            e = self.noise[k, number]
            x = self.theta
            curved = self.A[k] + 0.15 * (e[:, :-1] + e[:, :-1].T)
            total = total + x @ curved @ x / 2 - x @ (self.A[k] @ self.b[k] + 0.3 * e[:, -1])
        return total / len(tokens)


def test_intervals_of_score_gaps_cover_the_truth():
    """300 repeats: the 95 % Student interval of s_i - s_j, splits - 1 degrees of freedom, holds the truth in 92-98 %."""
    module, splits, repeats = Noisy(), 5, 300
    theta = module.theta.detach()
    g = [A @ (theta - b) for A, b in zip(module.A, module.b, strict=True)]
    u = sum(w * x for w, x in zip(MIXED[0], g, strict=True))
    M = np.array([[float(u @ A @ x) for x in g] for A in module.A])
    s = (M.T - M) @ WEIGHTS
    rng, student = (
        np.random.default_rng(12),
        2.7764451,
    )  # 97.5 % quantile of Student's t, 4 degrees of freedom
    model, team = (
        torch_loop.probe_model(module, lambda m, tokens: m(tokens), 2),
        reduce.team(reduce.Groups(), splits),
    )
    covered = []
    for _ in range(repeats):
        drawn = {
            (part, k): rng.choice(4096, size=2 * splits, replace=False)
            for part in ("direction", "gradient")
            for k in range(K)
        }

        def draw(part, k, numbers, drawn=drawn):
            return torch.tensor([[k, int(drawn[part, k][n])] for n in numbers])

        how = settings(samples=2 * splits, splits=splits, method="exact")
        found = probe.measure(model, reduce.Groups(), team, draw, how, MIXED, WEIGHTS, FLOW)
        P = found.replicates[:, 0].swapaxes(1, 2) - found.replicates[:, 0]
        gaps = (P @ WEIGHTS)[:, [0, 0, 1]] - (P @ WEIGHTS)[:, [1, 2, 2]]
        half = student * gaps.std(0, ddof=1) / np.sqrt(splits)
        covered.append(np.abs(gaps.mean(0) - (s[[0, 0, 1]] - s[[1, 2, 2]])) <= half)
    share = np.mean(covered, axis=0)
    assert ((share >= 0.92) & (share <= 0.98)).all(), share


def gap(found, truth):
    """Root mean square error of P off its diagonal."""
    return np.sqrt(((found.P - truth.P)[:, ~np.eye(K, dtype=bool)] ** 2).mean())


def wider_gpt(dtype=torch.float64):
    """Wide enough that no single sequence has a curvature of its own kind."""
    torch.manual_seed(3)
    return oracles.GPT(VOCABULARY, 24, 2, 1, LENGTH, spread=0.3).to(dtype)


@pytest.mark.parametrize("metric", ["identity", "adam"])
def test_the_numerical_error_of_differences_is_known(monkeypatch, metric):
    """Where rounding rules (short steps), at the usual step, where truncation rules: stated at half to twenty times the
    true error (root mean square over pairs), since one sequence a domain stands for all."""
    truth = measured(wider_gpt(), settings(method="exact", metric=metric))
    assert truth.numerical.tolist() == [0.0]
    monkeypatch.setattr(hvp, "_FRACTION", (0.0, 1.0))
    for length in (3e-6, 3e-5, 1.5e-3, 0.02):
        monkeypatch.setattr(hvp, "_LENGTH", length)
        found = measured(wider_gpt(torch.float32), settings(metric=metric))
        assert 0.5 <= found.numerical[0] / gap(found, truth) <= 20, length
        assert (found.gap_se[0][~np.eye(K, dtype=bool)] >= found.numerical[0]).all()


def test_errors_combine_in_quadrature_and_nothing_is_added_where_zero_is_exact():
    how = settings()
    found = measured(small_gpt(), how, EACH)
    assert found.numerical.shape == (K,) and (found.numerical > 0).all()
    P = found.replicates.swapaxes(-1, -2) - found.replicates
    spread = P.std(0, ddof=1) / np.sqrt(how.splits)
    off = 1 - np.eye(K)
    np.testing.assert_allclose(found.P_se, np.hypot(spread, off * found.numerical[:, None, None]), rtol=1e-12)
    assert all((matrix.diagonal() == 0).all() for matrix in (*found.P_se, *found.gap_se))
