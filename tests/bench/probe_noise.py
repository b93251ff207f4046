"""Error of the scores on a checkpoint of the quickstart: floors of the Adam metric, replicates against all pairs.

    python tests/bench/probe_noise.py quickstart [--step 200] [--out tests/bench/probe_noise.csv]

For every floor (in units of the mean of sqrt(v); none: metric identity) it prints the scores s with the standard error of
this product's estimate (mean over independent replicates), of the all-pairs estimate (products of means, jackknife over the
replicates, whose gradients and products must all be kept), and of replicates that share one direction, whose spread leaves
out the error of the direction. Gradients come from the plain GPT of the tests.
"""

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import oracles

from megatron_commute import bracket
from megatron_commute.data.indexed import TokenSequences

SPLITS, SAMPLES, DIRECTION, HELD_OUT = 8, 8, 4, 256
FLOORS = (None, 0.01, 0.1, 0.3)
WEIGHTS = {"english": 0.6, "code": 0.3, "russian": 0.1}


def checkpoint(folder):
    """(plain GPT in float32, parameter names, parameters, second moments) of a ZeRO-1 checkpoint of two ranks."""
    model_states = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=False)
    state = {name: value for name, value in model_states["module"].items() if torch.is_tensor(value)}
    model = oracles.gpt_from_megatron([state], heads=4).float()
    names, params = oracles.parameters(model)
    shards = [
        torch.load(path, weights_only=False) for path in sorted(folder.glob("zero_pp_rank_*optim_states.pt"))
    ]
    shards = [shard["optimizer_state_dict"]["base_optimizer_state"]["state"] for shard in shards]
    moments = {}
    for group, shapes in enumerate(model_states["param_shapes"]):
        flat = torch.cat([shard[group]["exp_avg_sq"] for shard in shards])
        flat = flat / (1 - 0.999 ** float(shards[0][group]["step"]))
        for name, shape in shapes.items():
            moments[oracles.plain_name(name)] = flat[: shape.numel()].view(shape)
            flat = flat[shape.numel() :]
    return model, params, [moments[name] for name in names]


def gradient(loss, params, along=None):
    """Gradient of a loss, or its Hessian-vector product along a vector."""
    leaves = [p.detach().requires_grad_(True) for p in params]
    slopes = torch.autograd.grad(loss(leaves), leaves, create_graph=along is not None)
    if along is None:
        return slopes
    return torch.autograd.grad(sum((g * u).sum() for g, u in zip(slopes, along, strict=True)), leaves)


def dot(a, b):
    return float(sum((x.double() * y.double()).sum() for x, y in zip(a, b, strict=True)))


def estimates(products, weights):
    """(scores, errors) of the two estimators from products[s, q, k, j] = h_k of split s . D g_j of split q."""
    splits = len(products)
    own = np.array([bracket.scores(bracket.pairwise(products[s, s]), weights) for s in range(splits)])
    left_out = []
    for out in range(splits):
        keep = [s for s in range(splits) if s != out]
        left_out.append(bracket.scores(bracket.pairwise(products[np.ix_(keep, keep)].mean((0, 1))), weights))
    left_out = np.array(left_out)
    jackknife = np.sqrt((splits - 1) / splits * ((left_out - left_out.mean(0)) ** 2).sum(0))
    pairs = bracket.scores(bracket.pairwise(products.mean((0, 1))), weights)
    return (own.mean(0), own.std(0, ddof=1) / np.sqrt(splits)), (pairs, jackknife)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--step", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    arguments = parser.parse_args()
    model, params, moments = checkpoint(arguments.folder / "run" / f"global_step{arguments.step}")
    data = [TokenSequences([str(arguments.folder / "data" / f"{name}_train")], 256) for name in WEIGHTS]
    weights, K = np.array(list(WEIGHTS.values())), len(WEIGHTS)

    def loss(k, first, count):
        begin = len(data[k]) - HELD_OUT + first
        tokens = torch.stack([data[k][begin + i]["tokens"] for i in range(count)])
        return oracles.language_loss(model, tokens[:, :-1], tokens[:, 1:])

    g = [[gradient(loss(k, s * SAMPLES, SAMPLES), params) for k in range(K)] for s in range(SPLITS)]
    start = SPLITS * SAMPLES
    toward = [
        [gradient(loss(k, start + s * DIRECTION, DIRECTION), params) for k in range(K)] for s in range(SPLITS)
    ]
    rows = []
    for floor in FLOORS:
        D = [torch.ones_like(p) for p in params]
        if floor is not None:
            roots = [v.sqrt() for v in moments]
            mean = sum(float(r.sum()) for r in roots) / sum(r.numel() for r in roots)
            D = [1 / (r + floor * mean) for r in roots]
        mixed = [
            [sum(w * v[i] for w, v in zip(weights, one, strict=True)) for i in range(len(D))]
            for one in toward
        ]
        scaled = [[[d * x for d, x in zip(D, v, strict=True)] for v in one] for one in g]
        own = [[d * x for d, x in zip(D, one, strict=True)] for one in mixed]
        shared = [sum(x) / SPLITS for x in zip(*own, strict=True)]
        found = []
        for u in (own, [shared] * SPLITS):
            h = [
                [gradient(loss(k, s * SAMPLES, SAMPLES), params, u[s]) for k in range(K)]
                for s in range(SPLITS)
            ]
            products = [[[[dot(x, y) for y in q] for x in s] for q in scaled] for s in h]
            found.append(estimates(np.array(products), weights))
        (replicates, pairs), (one_direction, _) = found
        for k, name in enumerate(WEIGHTS):
            numbers = (f"{part[k]:.4g}" for part in (*replicates, *pairs, *one_direction))
            ratios = (f"{replicates[1][k] / other[1][k]:.2f}" for other in (pairs, one_direction))
            rows.append(["none" if floor is None else floor, name, *numbers, *ratios])
            print(*rows[-1], sep="\t", flush=True)
    header = [
        "floor",
        "domain",
        "s",
        "s_se",
        "s_all_pairs",
        "s_se_all_pairs",
        "s_one_direction",
        "s_se_one_direction",
    ]
    header += ["error_over_all_pairs", "error_over_one_direction"]
    with arguments.out.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


if __name__ == "__main__":
    main()
