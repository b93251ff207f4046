"""Standard errors of a probe: intervals of score gaps hold the truth as often as they say."""

import numpy as np
import torch
from test_probe import FLOW, MIXED, WEIGHTS, K, settings

from megatron_commute import probe, reduce
from megatron_commute.adapters import torch_loop


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
