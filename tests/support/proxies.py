"""Tiny proxies over made-up text, and their data on disk."""

import json

import torch

from megatron_commute.design.model import Shape
from megatron_commute.design.proxy import Proxy, Recipe, Run, rates_of
from megatron_commute.settings.rates import RateSchedule, rates

STEPS = 60


class Sentences:
    """Three domains of random walks over 16 tokens, each with its own habit."""

    def __init__(self, length):
        generator = torch.Generator().manual_seed(3)
        steps = torch.randint(0, 3, (3, 4000, length + 1), generator=generator)
        habits = torch.tensor([1, 3, 5])[:, None, None]
        self.tokens = ((steps * habits).cumsum(-1) + torch.arange(4000)[None, :, None]) % 16

    def take(self, k, first, count):
        return self.tokens[k, first : first + count]

    def held(self, k):
        return self.tokens[k, 3900:]


def run_of(flavour="gpt2", style="cosine", clip=1.0, dtype=torch.float64, decay=0.1):
    """A Run of one layer, 60 steps and three domains."""
    shape = Shape(flavour=flavour, layers=1, hidden=16, heads=2, sequence=8, vocabulary=16)
    wsd = {"lr_wsd_decay_iters": STEPS // 5} if style == "WSD" else {}
    own = RateSchedule(
        lr=3e-3, min_lr=3e-4, train_iters=STEPS, lr_warmup_iters=6, lr_decay_style=style, **wsd
    )
    peak = tuple(rates_of(rates(own), STEPS, 3e-3).tolist())
    recipe = Recipe(rates=peak, clip=clip, weight_decay=decay)
    proxy = Proxy(shape=shape, recipe=recipe, batch=12, shares=(0.6, 0.1, 0.3), epochs=(1.0, 1.0, 1.0))
    return Run(proxy=proxy, seed=1, stream=Sentences(shape.sequence), dtype=dtype)


def mixture_file(folder, domains, **keys):
    """mixture.yaml over {name: (prefix, budget, holdout prefix)}."""
    path = folder / "mixture.yaml"
    told = {n: {"path": str(p), "budget": b, "holdout": str(h)} for n, (p, b, h) in domains.items()}
    path.write_text(json.dumps({"domains": told, "mode": "fixed", **keys}), encoding="utf-8")  # JSON is YAML
    return path
