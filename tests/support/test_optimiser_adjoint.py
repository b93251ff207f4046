"""The oracle of adjoints against training itself: the end of a window differs by what it says."""

import optimiser_adjoint
import pytest
import torch

OPTIMISERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.02}),
    "momentum": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "adam": (torch.optim.Adam, {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.03}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.3}),
}


def domains(seed=0):
    """Two regression losses of a small network in float64, and its parameters."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 40, 3, generator=generator, dtype=torch.float64)
    y = torch.stack([x[0].sin().sum(-1), (x[1] ** 2).sum(-1)])[..., None]
    shapes = [(3, 6), (6,), (6, 1)]
    params = [0.5 * torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]

    def loss(k):
        return lambda p: (((x[k] @ p[0] + p[1]).tanh() @ p[2] - y[k]) ** 2).mean()

    return [loss(0), loss(1)], [p.requires_grad_(True) for p in params]


def mixture(losses, weights):
    return lambda p: sum(w * loss(p) for w, loss in zip(weights, losses, strict=True))


def train(losses, params, optimiser, weights):
    """Parameters after one step per row of weights; the stored window."""
    params = [p.detach().clone().requires_grad_(True) for p in params]
    kind, settings = OPTIMISERS[optimiser]
    chosen, window = kind(params, **settings), []
    for row in weights:
        loss = mixture(losses, row)
        window.append(optimiser_adjoint.stored(chosen, params, loss))
        chosen.zero_grad()
        loss(params).backward()
        chosen.step()
    return [p.detach() for p in params], window


@pytest.mark.parametrize("optimiser", list(OPTIMISERS))
def test_adjoint_is_the_gradient_through_unrolled_training(optimiser):
    """Oracle: central differences of the start of the window, with the optimiser's state as it was."""
    losses, params = domains(1)
    target = mixture(losses, (0.3, 0.7))
    start, _ = train(losses, params, optimiser, [])
    weights = [(0.5, 0.5)] * 5
    end, window = train(losses, start, optimiser, weights)
    found = optimiser_adjoint.adjoint(target, end, window)
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        v = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in start]
        moved = [[p + s * 1e-5 * u for p, u in zip(start, v, strict=True)] for s in (1, -1)]
        ends = [target(train(losses, m, optimiser, weights)[0]) for m in moved]
        slope = sum((a * b).sum() for a, b in zip(found, v, strict=True))
        assert float(slope) == pytest.approx(float(ends[0] - ends[1]) / 2e-5, rel=1e-5)
