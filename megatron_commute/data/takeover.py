"""Runs that are already running: a changed mixture file, or a checkpoint that began with the
stock blend.

Nothing here decides that a change is welcome: `differences` names it, and the caller goes on
only when the user said so. Then `changed` carries the counters over from the next sample on: a
domain that stays goes on at its position, a new one begins at 0, one that left is remembered, so
that it goes on where it stood if it comes back.
"""

from typing import NamedTuple

import numpy as np

from megatron_commute.mixture import Mixture


class Ledger(NamedTuple):
    """Which domain is which over the life of a run; plain JSON values.

    names: domains in the mixture's order. keys: the number that stands for each of them in the
    permutation, never used again for another. gone: name -> (key, samples served) of domains
    that left. fingerprints: of each one's data.
    """

    names: list[str]
    keys: list[int]
    gone: dict[str, tuple[int, int]]
    fingerprints: list[str]


def ledger(names, fingerprints) -> Ledger:
    """The ledger of a run that begins."""
    return Ledger(list(names), list(range(len(names))), {}, list(fingerprints))


def differences(
    state: dict, book: Ledger, names, fingerprints, budgets, samples, minimum, maximum
) -> list[str]:
    """What a checkpoint's mixture and today's file do not share, one sentence each; empty when
    they agree.

    state: Mixture.state_dict() of the checkpoint, book: its ledger; the rest describes the
    file's domains.
    """
    found = [f"domain {name} is new" for name in names if name not in book.names]
    found += [f"domain {name} is gone" for name in book.names if name not in names]
    if not found and list(names) != book.names:
        found.append(f"the order of the domains was {', '.join(book.names)}, it is {', '.join(names)}")
    for new, name in enumerate(names):
        if name not in book.names:
            continue
        old = book.names.index(name)
        if book.fingerprints[old] != fingerprints[new]:
            found.append(
                f"the data of {name} had fingerprint {book.fingerprints[old]}, it is {fingerprints[new]}"
            )
        pairs = (("budget", budgets), ("minimum", minimum), ("maximum", maximum))
        for what, values in pairs:
            was = state[f"{what}s" if what == "budget" else what][old]
            if was != values[new]:
                found.append(f"the {what} of {name} was {_said(was)}, it is {_said(values[new])}")
    if state["samples"] != samples:
        found.append(f"the run had {_said(state['samples'])} samples, it has {_said(samples)}")
    return found


def _said(value) -> str:
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def changed(state: dict, book: Ledger, names, fingerprints, weights, budgets, samples, minimum, maximum):
    """(mixture, ledger) that go on at the checkpoint's sample with the file's domains, weights
    and budgets.

    Arguments as for `differences`; weights f64[K] of the file. With the same domains, targets go
    on and what was scheduled stays scheduled; with others, targets begin anew at what is served
    (at most K - 1 samples each) and scheduled changes, which named other domains, are dropped. A
    budget counts all the domain ever served. ValueError when that is more than the budget, or
    the rest of the run cannot hold the budgets.
    """
    before = dict(zip(book.names, zip(book.keys, state["served"], strict=True), strict=True))
    known = {**{name: tuple(entry) for name, entry in book.gone.items()}, **before}
    for name in names:
        known.setdefault(name, (len(known), 0))
    keys, served = [known[name][0] for name in names], [known[name][1] for name in names]
    gone = {name: known[name] for name in known if name not in names}
    same = sorted(names) == sorted(book.names)
    order = [book.names.index(name) for name in names] if same else []
    mixture = Mixture(
        weights,
        budgets,
        samples=samples,
        minimum=minimum,
        maximum=maximum,
        served=served,
        credit=Mixture.from_state(state).credit[order] if same else None,
        retired=state["index"] - sum(served),
    )
    for sample, wish in state["pending"] if same else []:
        mixture.schedule([wish[d] for d in order], sample)
    return mixture, Ledger(list(names), keys, gone, list(fingerprints))


def stock_weights(shares) -> np.ndarray:
    """The weights f64[K] of Megatron-DeepSpeed's blend from the numbers of --data-path, in its own
    rounding."""
    total = 0.0
    for share in shares:
        total += float(share)
    weights = np.array([float(share) / total for share in shares])
    return weights / np.sum(weights)


def attached(stock, consumed: int, weights, budgets=None, **limits) -> Mixture:
    """The mixture of a run whose first `consumed` samples came from the stock blend with weights
    `stock` f64[K].

    What each domain has served is replayed by the stock rule. From then on weights, budgets and
    limits (samples, minimum, maximum) hold. The stock blend shuffled each domain in another
    order, so positions go on in a new permutation: samples of the epoch that is under way may
    come twice or not at all, and the caller must say so.
    """
    if len(stock) != len(weights):
        raise ValueError(
            f"{len(stock)} stock domains, {len(weights)} in the mixture file: name the same domains"
        )
    past = Mixture(stock)
    past.skip(consumed)
    return Mixture(weights, budgets, served=past.served, credit=past.credit, **limits)
