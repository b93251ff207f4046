"""What the criterion sees along a run beside the influences of its samples (parts `curvature` and
`criterion` of study `design`).

In flow time the slope of an influence is minus the score whose direction is the adjoint; a live run
knows the local gradient only. Its curvature along a gradient, u . H u / g . u with u = D g, is the
forgetting that a probe can see, in 1 / flow time.
"""

import numpy as np
import torch

from megatron_commute import bracket
from megatron_commute.design import plan
from megatron_commute.design import run as work
from megatron_commute.design.adjoint import STEP
from megatron_commute.design.proxy import Run, text_of

POINTS = 12  # of a run, after its first tenth
READ = 256  # held-out sequences of every domain


def measured(design, folder, seed):
    """Cell: at POINTS of the recorded run {"steps", "curvature": f64[N, K + 1] along the gradient
    of every domain and of the mixture, "local", "end": scores f64[N, K] of the target by its
    gradient there and at the end of the run}.
    """
    text = text_of(design.source, design.proxy)
    steps = design.proxy.steps
    weights = np.tile(design.proxy.shares, (steps, 1))
    run = Run(proxy=design.proxy, seed=seed, text=text)
    held = {name: text.held(name, False)[:READ] for name in design.names}
    end = run.advance(run.start(), weights, 0, steps)
    last = sum(
        share * run.model.mean_gradient(end.theta, held[name])
        for name, share in zip(held, design.target, strict=True)
    )
    at = np.linspace(0.1, 0.97, POINTS) * steps
    state, before = run.start(), 0
    found = {"steps": [int(step) for step in at], "curvature": [], "local": [], "end": []}
    for step in found["steps"]:
        state = run.advance(state, weights, before, step)
        before = step
        D = metric(run, state, step)
        gradients = torch.stack([run.model.mean_gradient(state.theta, tokens) for tokens in held.values()])
        target = torch.tensor(design.target, dtype=gradients.dtype) @ gradients
        found["local"].append(_scores(run, state, held, design, D, gradients, D * target))
        found["end"].append(_scores(run, state, held, design, D, gradients, D * last))
        own = [*gradients, torch.tensor(design.proxy.shares, dtype=gradients.dtype) @ gradients]
        found["curvature"].append([_curvature(run, state, held, design, D, g) for g in own])
    return found


def metric(run, state, step):
    """D [P] of Adam after `step` steps."""
    root = (state.second / (1 - run.proxy.recipe.betas[1] ** step)).sqrt_()
    return (root + run.proxy.recipe.eps).reciprocal_()


def products(run, state, held, u):
    """H_k u f32[K, P], by a central difference."""
    h = STEP / float(u.norm())
    above = [run.model.mean_gradient(state.theta + h * u, tokens) for tokens in held.values()]
    below = [run.model.mean_gradient(state.theta - h * u, tokens) for tokens in held.values()]
    return torch.stack([(a - b) / (2 * h) for a, b in zip(above, below, strict=True)])


def _scores(run, state, held, design, D, gradients, u):
    M = (products(run, state, held, u) @ (D * gradients).T).double().numpy()
    return bracket.scores(bracket.pairwise(M), np.array(design.proxy.shares)).tolist()


def _curvature(run, state, held, design, D, g):
    u = D * g
    product = torch.tensor(design.proxy.shares, dtype=u.dtype) @ products(run, state, held, u)
    return float(u @ product) / float(g @ u)


def curvature_rows(design, cell, about, fitted):
    """Rows: memory by the curvature (times the run's flow) beside the one that fits influences."""
    flow = sum(design.proxy.recipe.rates)
    values = np.array(cell["curvature"]) * flow
    names = [*design.names, "mixture"]
    return [
        {
            **about,
            "along": name,
            "measured": float(np.median(own)),
            "least": float(own.min()),
            "greatest": float(own.max()),
            "fitted": fitted,
        }
        for name, own in zip(names, values.T, strict=True)
    ]


def slopes(design, values):
    """-dJ_k/dt f64[N, K] of influences f64[B, K] on the target at the points of `measured`, in flow
    time: by least squares over a tenth of the run on either side.
    """
    rates = np.array(design.proxy.recipe.rates)
    bins = len(values)
    mean_rate = np.add.reduceat(rates, np.arange(bins) * len(rates) // bins) / (len(rates) / bins)
    J = values / mean_rate[:, None]
    time = (np.cumsum(rates) - rates / 2)[np.arange(bins) * len(rates) // bins]
    found = []
    for part in np.linspace(0.1, 0.97, POINTS):
        away = np.abs((np.arange(bins) + 0.5) / bins - part)
        away[: int(0.1 * bins)] = np.inf  # not differentiated
        near = np.argsort(away, kind="stable")[: max(3, int((away <= 0.1).sum()))]
        found.append(-np.polyfit(time[near], J[near], 1)[0])
    return np.array(found)


def criterion_rows(design, cell, recorded, about):
    """Rows: agreement of the scores of either direction with the slopes of influences, differences
    between domains that budgets leave free.
    """
    from scipy.stats import spearmanr

    values = plan.of_target(recorded["influences"], design.target)
    free = slopes(design, values)
    rows = []
    for direction in ("local", "end"):
        own = np.array(cell[direction])
        pairs = [(i, j) for i in range(own.shape[1]) for j in range(i)]
        ours = np.array([own[:, i] - own[:, j] for i, j in pairs])
        theirs = np.array([free[:, i] - free[:, j] for i, j in pairs])
        rank = [float(spearmanr(a, b).statistic) for a, b in zip(ours, theirs, strict=True)]
        rows.append(
            {
                **about,
                "direction": direction,
                "signs": float((np.sign(ours) == np.sign(theirs)).mean()),
                "rank_over_time": float(np.mean(rank)),
                "rank_of_all": float(spearmanr(ours.ravel(), theirs.ravel()).statistic),
                "size": float(np.median(np.abs(ours)) / np.median(np.abs(theirs))),
                "points": int(ours.size),
            }
        )
    return rows


def recorded_jobs(seeds):
    """Jobs of the cells that both parts need."""
    jobs = []
    for seed in seeds:
        jobs.append((f"recorded/{seed}", work.recorded, {"seed": seed}))
        jobs.append((f"measured/{seed}", measured, {"seed": seed}))
    return jobs


def fitted_memory(design, recorded):
    """(memory of law flow that explains a recorded cell's influences best, how much of them)."""
    shares = np.array(design.proxy.shares)
    values = plan.of_target(recorded["influences"], design.target)
    road = plan.of_flow(values, shares, np.array(design.proxy.recipe.rates), design.kept)
    return road.memory, road.explained
