"""Can a probe foretell the memory of law flow? A few Lanczos steps along a run, beside the memory
that fits the influences (part `memory` of study `online`).

With D frozen, an influence J_k falls along the flow time t that is left as g_k . D exp(-t H D) g,
g the target's gradient at the end. Lanczos from D^1/2 g on B = D^1/2 H D^1/2 gives nodes and
weights with sum(w exp(-t nodes)) = g . D exp(-t H D) g / g . D g: its logarithm over t, times the
run's flow, is a memory. One step is the curvature along a gradient, u . H u / g . u.
"""

import numpy as np
import torch

from megatron_commute.design import cells
from megatron_commute.design import run as work
from megatron_commute.design.proxy import Run, text_of
from megatron_commute.experiments import bilingual_criterion as criterion
from megatron_commute.experiments.bilingual_design import STYLES, designed
from megatron_commute.experiments.bilingual_design import Size as DesignSize

POINTS = (0.3, 0.5, 0.7, 0.9)  # of a run
STEPS = 5  # of Lanczos
SEEDS = (101, 102)


def lanczos(product, start, steps):
    """[(nodes f64[m], weights f64[m])] after m = 1 to `steps` steps on a symmetric map, product:
    v [P] -> B v [P], with full orthogonalisation; fewer where the space is exhausted.
    """
    basis, diagonal, beside, found = [], [], [], []
    v, length = start, float(start.norm())
    while length > 1e-6 * float(start.norm()) and len(basis) < steps:
        basis.append(v / length)
        v = product(basis[-1])
        diagonal.append(float(v @ basis[-1]))
        for _ in range(2):
            for other in basis:
                v = v - (v @ other) * other
        T = np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)
        nodes, vectors = np.linalg.eigh(T)
        found.append((nodes, vectors[0] ** 2))
        length = float(v.norm())
        beside.append(length)
    return found


def memory(nodes, weights, left, total):
    """Memory of law flow by nodes and weights f64[m], for the flow that is left of all of it."""
    exponents = np.log(np.maximum(weights, 1e-300)) - np.asarray(nodes) * left
    top = exponents.max()
    return float(-(top + np.log(np.exp(exponents - top).sum())) * total / left)


def measured(design, folder, seed):
    """Cell: {"steps", "quadratures": for every point of the run the nodes and weights after 1 to
    STEPS steps, along the target's gradient there}.
    """
    text = text_of(design.source, design.proxy)
    steps = design.proxy.steps
    weights = np.tile(design.proxy.shares, (steps, 1))
    run = Run(proxy=design.proxy, seed=seed, text=text)
    held = {name: text.held(name, False)[: criterion.READ] for name in design.names}
    state, before = run.start(), 0
    found = {"steps": [max(1, int(part * steps)) for part in POINTS], "quadratures": []}
    shares = torch.tensor(design.proxy.shares)
    for step in found["steps"]:
        state = run.advance(state, weights, before, step)
        before = step
        root = criterion.metric(run, state, step).sqrt()
        target = sum(
            share * run.model.mean_gradient(state.theta, held[name])
            for name, share in zip(held, design.target, strict=True)
        )

        def product(v, state=state, root=root):
            products = criterion.products(run, state, held, root * v)
            return root * (shares.to(products.dtype) @ products)

        quadrature = lanczos(product, root * target, STEPS)
        found["quadratures"].append([[nodes.tolist(), w.tolist()] for nodes, w in quadrature])
    return found


def part(settings, folder, size, processes, tell):
    """Rows: memory by 1 to STEPS steps at every point, beside the one that fits the influences."""
    rows = []
    for style in STYLES:
        design = designed(settings, folder, DesignSize(steps=size.steps), style, untrained=False)
        rates = np.array(design.proxy.recipe.rates)
        jobs = []
        for seed in SEEDS[: size.choosing]:
            jobs += [(f"recorded/{seed}", work.recorded, {"seed": seed})]
            jobs += [(f"lanczos/{seed}", measured, {"seed": seed})]
        found = cells.fill(folder / style, design, jobs, processes, tell)
        for seed in SEEDS[: size.choosing]:
            fitted, explained = criterion.fitted_memory(design, found[f"recorded/{seed}"])
            cell = found[f"lanczos/{seed}"]
            for step, quadratures in zip(cell["steps"], cell["quadratures"], strict=True):
                for m, (nodes, weights) in enumerate(quadratures, 1):
                    value = memory(nodes, weights, rates[step:].sum(), rates.sum())
                    row = {"style": style, "seed": seed, "step": step, "lanczos_steps": m}
                    rows.append({**row, "measured": value, "fitted": fitted, "explained": explained})
    return rows
