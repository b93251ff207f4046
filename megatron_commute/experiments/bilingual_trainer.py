"""A small GPT, its text and its training: what the language-model studies run, on one CPU core or
several GPUs.

Plain PyTorch, so that a cell of a study starts in a second. Every rank of a distributed run trains
its slice of each batch and gradients are summed, so the same flags scale the study up.
"""

import copy
import dataclasses
import functools
import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Subset

from megatron_commute import reduce
from megatron_commute.data.indexed import TokenSequences
from megatron_commute.data.sampler import items

WORDS = {"optimizer": ("adam", "adamw"), "decay": ("constant", "cosine"), "dtype": ("float32", "bfloat16")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Model, text and optimiser of a study. Raises ValueError for a word that a field does not
    take.
    """

    data: str
    # folder of prepare_data.py
    domains: tuple = ("english", "russian")
    # trained, by name
    others: tuple = ("code", "handbook_english", "handbook_russian")
    # only evaluated
    layers: int = 2
    # of the model
    hidden: int = 48
    # width of the model
    heads: int = 2
    # of attention
    sequence: int = 32
    # tokens
    vocabulary: int = 512
    # tokens that the model knows
    batch: int = 32
    # sequences in a step, split evenly over the domains
    micro: int = 32
    # sequences in one forward pass
    optimizer: str = "adam"
    # or "adamw"
    lr: float = 1e-3
    # peak rate
    warmup: int = 50
    # steps until the peak
    decay: str = "constant"
    # or "cosine", which falls to a tenth at `steps`
    weight_decay: float = 0.0
    # of matrices
    steps: int = 3000
    # of the schedule
    held: int = 256
    # sequences of each domain whose loss is read
    probe: int = 128
    # sequences of each domain for one measurement of P
    seed: int = 1234
    # of weights and sequences
    dtype: str = "float32"
    # of training's passes, or "bfloat16"; weights, optimiser, readings and probes are float32

    def __post_init__(self):
        for field, words in WORDS.items():
            if getattr(self, field) not in words:
                raise ValueError(f"{field}={getattr(self, field)}: write {' or '.join(words)}")


class Block(nn.Module):
    """Pre-norm attention and GELU, as in GPT-2."""

    def __init__(self, *, hidden, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x):
        b, t, hidden = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(b, t, hidden))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """GPT-2 without dropout, output tied to the word embedding. tokens i64[b, t] -> logits [b, t,
    vocabulary].
    """

    def __init__(self, settings):
        super().__init__()
        hidden = settings.hidden
        self.words = nn.Embedding(settings.vocabulary, hidden)
        self.positions = nn.Embedding(settings.sequence, hidden)
        self.blocks = nn.ModuleList(
            Block(hidden=hidden, heads=settings.heads) for _ in range(settings.layers)
        )
        self.norm = nn.LayerNorm(hidden)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                scale = (
                    0.02 / math.sqrt(2 * settings.layers)
                    if name.endswith(("out.weight", "down.weight"))
                    else 0.02
                )
                nn.init.normal_(parameter, std=scale)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens):
        x = self.words(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ self.words.weight.T


def sequence_losses(model, tokens):
    """Mean loss in nats per token of every sequence, f32[b]; tokens i64[b, t + 1]."""
    logits = model(tokens[:, :-1]).float()
    losses = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return losses.view(len(tokens), -1).mean(1)


def mean_loss(model, tokens):
    """Mean loss in nats per token; tokens i64[b, t + 1]."""
    return sequence_losses(model, tokens.to(next(model.parameters()).device)).mean()


def team(splits):
    """(reduce.Groups, reduce.Team) of all ranks, each of which holds the whole model, for a probe
    of `splits` replicates.

    Made once, since a team may need process groups of its own; collective.
    """
    return _team(reduce.everyone(), splits)


@functools.cache
def _team(world, splits):
    groups = reduce.Groups(data=world, world=world)
    return groups, reduce.team(groups, splits)


class Text:
    """Sequences of every domain: NAME_train to train on, the first half of NAME_valid to read
    losses, the rest to probe.

    A name NAME:2/3 is the second third of NAME. limits: {name: sequences at most to train on,
    spread over the domain}. Raises DataError where files are missing, ValueError where a domain is
    too small for `held` or the vocabulary too large.
    """

    def __init__(self, settings, limits=None):
        self.settings, self.train, self.valid = settings, {}, {}
        for name in (*settings.domains, *settings.others):
            stem, _, piece = name.partition(":")
            for part, into in (("train", self.train), ("valid", self.valid)):
                into[name] = TokenSequences([f"{settings.data}/{stem}_{part}"], settings.sequence)
                if piece:
                    into[name] = _piece(into[name], piece)
            if name in (limits or {}):
                self.train[name] = _spread(self.train[name], limits[name])
            if len(self.valid[name]) < settings.held + settings.probe:
                raise ValueError(
                    f"{name}_valid has {len(self.valid[name])} sequences of {settings.sequence} tokens, "
                    f"{settings.held} to read and {settings.probe} to probe are asked: give a larger "
                    "--valid-share to prepare_data.py"
                )
            largest = int(self._stack(self.valid[name], range(settings.held)).max())
            if largest >= settings.vocabulary:
                raise ValueError(
                    f"{name}_valid has token {largest}: prepare the data with --vocab-size "
                    f"{settings.vocabulary}"
                )

    def batch(self, domain, positions, seed):
        """Training sequences i64[n, t + 1] of `domain` (an index) at `positions` i64[n] of its
        endless, shuffled stream.
        """
        data = self.train[self.settings.domains[domain]]
        _, chosen = items(np.asarray(positions), len(data), seed, domain)
        return self._stack(data, chosen)

    def held(self, name):
        """The fixed sequences i64[held, t + 1] on which the loss of `name` is read."""
        return self._stack(self.valid[name], range(self.settings.held))

    def probe(self, name, numbers):
        """Sequences for probes, disjoint from those of `held`; numbers wrap around."""
        first, data = self.settings.held, self.valid[name]
        return self._stack(data, [first + int(n) % (len(data) - first) for n in numbers])

    @staticmethod
    def _stack(data, chosen):
        return torch.stack([data[int(i)]["tokens"] for i in chosen])


def _piece(data, piece):
    """Sequences of the i-th of n equal pieces of `data`; piece: "i/n", from 1."""
    i, n = (int(number) for number in piece.split("/"))
    return Subset(data, range(len(data) * (i - 1) // n, len(data) * i // n))


def _spread(data, most):
    return Subset(data, range(0, len(data) // most * most, len(data) // most)) if most < len(data) else data


class Trainer:
    """A model in training: `step` trains, `state` and `load` copy everything that training depends
    on.

    Weights act on the loss: every step reads batch / K sequences of each of the K domains and
    weighs their mean losses, so counts are never rounded and two orders see the same sequences at
    the same steps. `sampled=True` gives a step the counts per domain instead, as a mixture does.
    rates f64[T]: learning rate of every step, in place of the settings'.
    """

    def __init__(self, settings, text, *, seed=None, rates=None):
        self.settings, self.text, self.rates = settings, text, rates
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.seed = settings.seed if seed is None else seed
        torch.manual_seed(self.seed)
        self.model = GPT(settings).to(self.device)
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.optimizer]
        decayed = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [
            {"params": decayed, "weight_decay": settings.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = kind(groups, lr=settings.lr, betas=(0.9, 0.999))
        self.taken = np.zeros(len(settings.domains), dtype=np.int64)  # position of every domain in its stream
        self.done = 0
        self.held = {name: text.held(name).to(self.device) for name in (*settings.domains, *settings.others)}

    def rate(self, step):
        """Learning rate of a 0-based step."""
        s = self.settings
        if self.rates is not None:
            return float(self.rates[min(step, len(self.rates) - 1)])
        if step < s.warmup:
            return s.lr * (step + 1) / s.warmup
        if s.decay == "constant":
            return s.lr
        progress = min(1.0, (step - s.warmup) / max(1, s.steps - s.warmup))
        return s.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))

    def step(self, weights, counts=None):
        """One optimiser step under weights f64[K] of the loss, or with counts i64[K] sequences of
        each domain.

        Sequences are dealt to the ranks in turn, so they need at least as many as there are ranks.
        """
        s, K = self.settings, len(self.taken)
        rank, size = reduce.rank(), reduce.size(reduce.everyone())
        sizes = [s.batch // K] * K if counts is None else [int(c) for c in counts]
        shares = (
            [w / n for w, n in zip(weights, sizes, strict=True)] if counts is None else [1 / sum(sizes)] * K
        )
        rows, scale, dealt = [], [], 0
        for k, n in enumerate(sizes):
            mine = np.arange(self.taken[k], self.taken[k] + n)[(rank - dealt) % size :: size]
            if len(mine) and shares[k]:
                rows.append(self.text.batch(k, mine, self.seed))
                scale.append(torch.full((len(mine),), shares[k]))
            self.taken[k] += n
            dealt += n if shares[k] else 0
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(self.done)
        self.optimizer.zero_grad()
        tokens, scale = torch.cat(rows).to(self.device), torch.cat(scale).to(self.device)
        for part, share in zip(tokens.split(s.micro), scale.split(s.micro), strict=True):
            with torch.autocast(tokens.device.type, torch.bfloat16, enabled=s.dtype == "bfloat16"):
                loss = (sequence_losses(self.model, part) * share).sum()
            loss.backward()
        if size > 1:
            reduce.sum_of_vectors([p.grad for p in self.model.parameters()], reduce.everyone())
        self.optimizer.step()
        self.done += 1

    def run(self, weights, steps):
        """`steps` steps under the same weights f64[K]."""
        for _ in range(steps):
            self.step(weights)

    @torch.no_grad()
    def losses(self):
        """{name: held-out loss in nats per token} of trained and other domains, on the same
        sequences every time.

        Every rank reads its share of them; collective.
        """
        world, totals = reduce.everyone(), np.zeros(len(self.held))
        for i, tokens in enumerate(self.held.values()):
            mine = tokens[reduce.rank() :: reduce.size(world)]
            parts = mine.split(4 * self.settings.micro) if len(mine) else ()
            totals[i] = float(sum(sequence_losses(self.model, part).double().sum() for part in parts))
        totals = reduce.sum_of_numbers(totals, world)
        return {
            name: float(total) / len(tokens)
            for (name, tokens), total in zip(self.held.items(), totals, strict=True)
        }

    def state(self):
        """A copy of all that training depends on; plain tensors and numbers, which torch.load reads
        with weights_only.
        """
        return {
            "model": {name: value.clone() for name, value in self.model.state_dict().items()},
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "taken": self.taken.tolist(),
            "done": self.done,
            "seed": self.seed,
        }

    def load(self, state, seed=None):
        """Go on from `state`; another `seed` gives other sequences from there on."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.taken = np.array(state["taken"], dtype=np.int64)
        self.done = state["done"]
        self.seed = state["seed"] if seed is None else seed
        return self
