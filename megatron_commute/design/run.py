"""A design from beginning to end: record a proxy, differentiate it, try roads, prove the best on
fresh seeds. K domains, J losses.
"""

import dataclasses
import math
import os
import time

import numpy as np
import torch

from megatron_commute import reduce
from megatron_commute.decide import flow
from megatron_commute.design import adjoint, cells, plan, verify
from megatron_commute.design.model import parameters
from megatron_commute.design.proxy import Proxy, Run, rates_of, text_of
from megatron_commute.design.text import Source

PLANNING_SEED = 1001  # of the recorded run and of what is tried; those that prove are 1 and up
ATTEMPTS = 3  # proofs at most, at lower and lower strengths
LOWER = 0.5  # times the strength, where a domain lost more than it may
MORE_DATA = (1.2, 1.5)  # times the samples of the target's domains, at the cost of the others
LONGER = 1.25  # times the steps
COMPARED = 4  # seeds of these
MOST_MEMORY = 0.6  # part of the free memory that recorded states may take
SHORT = 3.0  # tokens a parameter, below which a proxy that sees no gain is too short to say so


@dataclasses.dataclass(frozen=True, kw_only=True)
class Design:
    """What is asked, from a mixture file, a run and the options of the proxy."""

    source: Source
    # text of the domains and of what only judges
    proxy: Proxy
    # in place of the run
    run_rates: tuple
    # learning rate of each step of the run itself
    target: tuple
    # f64[K] over the trained domains
    low: tuple
    # least weights f64[K]
    high: tuple
    # greatest weights
    harm: float
    # part of its loss that a trained domain may lose
    looks: tuple = verify.LOOKS
    # pairs of seeds after which the proof is read
    recompute: bool = False
    # states of a recorded run are kept at every sqrt(T)-th step only

    @property
    def names(self):
        return self.source.plan.names

    @property
    def kept(self):
        """First steps of the proxy at the planned mixture."""
        return flow.kept_steps(self.proxy.steps)


def _held(design, text, judging):
    return {name: text.held(name, judging) for name in design.source.names}


def recorded(design, folder, seed):
    """Cell: a run at the constant mixture and its influences {"influences": f64[J, B, K], "losses",
    "reached"}.
    """
    text = text_of(design.source, design.proxy)
    run = Run(proxy=design.proxy, seed=seed, text=text)
    weights = np.tile(design.proxy.shares, (design.proxy.steps, 1))
    found = adjoint.influences(run, weights, _held(design, text, False), recompute=design.recompute)
    return {
        "influences": plan.binned(found.values, design.proxy.steps).tolist(),
        "losses": dict(zip(found.names, found.losses.tolist(), strict=True)),
        "reached": found.reached,
    }


def tried(design, folder, seed, edges, weights):
    """Cell: final losses, on what plans, of a run under segments that act on the loss."""
    text = text_of(design.source, design.proxy)
    run = Run(proxy=design.proxy, seed=seed, text=text)
    state = run.advance(run.start(), plan.by_step(edges, weights, design.proxy.steps), 0, design.proxy.steps)
    return {"losses": _losses(run, state.theta, _held(design, text, False))}


def judged(design, folder, seed, edges, weights, more=1.0, longer=1.0, averaged=0.0):
    """Cell: final losses, on what judges, of a run whose batches Mixture serves, and those of the
    mean parameters of its last part `averaged`.

    weights: of segments, or None for the constant mixture. more: times the samples of the target's
    domains; longer: times the steps.
    """
    proxy, shares = design.proxy, np.array(design.proxy.shares)
    if more != 1:
        raised = np.where(np.array(design.target) > 0, shares * more, shares)
        wanted = np.array(design.target) > 0
        raised[~wanted] *= (1 - raised[wanted].sum()) / shares[~wanted].sum()
        proxy = dataclasses.replace(proxy, shares=tuple(raised))
    if longer != 1:
        steps = round(longer * proxy.steps)
        rates = tuple(rates_of(design.run_rates, steps, max(proxy.recipe.rates)).tolist())
        proxy = dataclasses.replace(proxy, recipe=dataclasses.replace(proxy.recipe, rates=rates))
    text = text_of(design.source, proxy)
    run = Run(proxy=proxy, seed=seed, text=text, weighted=False)
    changes = []
    if weights is not None:
        changes = plan.by_sample(edges, weights, proxy.steps * proxy.batch, proxy.batch)
    state, mean = run.sampled(changes, averaged)
    found = {"losses": _losses(run, state.theta, _held(design, text, True))}
    return found if mean is None else {**found, "averaged": _losses(run, mean, _held(design, text, True))}


def _losses(run, theta, held):
    return {name: run.model.mean_loss(theta, tokens.to(run.model.device)) for name, tokens in held.items()}


def measured_step(design):
    """Seconds of one training step of the proxy, the median of a few, those of the first rank on
    all; collective.
    """
    run = Run(proxy=design.proxy, seed=0, stream=_Random(design.proxy.shape))
    state, weights, spent = run.start(), np.tile(design.proxy.shares, (6, 1)), []
    for step in range(6):
        begun = time.perf_counter()
        run.advance(state, weights, step % design.proxy.steps, step % design.proxy.steps + 1)
        spent.append(time.perf_counter() - begun)
    median = np.array([np.median(spent[1:])])
    return float(reduce.broadcast_numbers(median, reduce.Groups(world=reduce.everyone()))[0])


class _Random:
    """Sequences of any tokens."""

    def __init__(self, shape):
        self.shape = shape

    def take(self, k, first, count):
        return torch.randint(0, self.shape.vocabulary, (count, self.shape.sequence + 1))


def cost(design, step_seconds, processes=1):
    """What a design will run: {"parts": [{"part", "runs", "seconds"}], "bytes", "seconds",
    "least_seconds"}. runs: in plain runs of the proxy.
    """
    J, a_run = len(design.source.names), design.proxy.steps * step_seconds
    first, last = design.looks[0], design.looks[-1]
    parts = [
        ("recorded run and sweep", (2 if design.recompute else 1) + 2 * J, 1),
        ("line search", 2 * len(plan.RANGES), processes),
        (f"proof, first look ({first} seeds)", 2 * first, processes),
        ("equal gains by data and length", COMPARED * (len(MORE_DATA) + LONGER), processes),
        (f"proof, to the last look ({last} seeds), where needed", 2 * (last - first), processes),
    ]
    rows = [{"part": name, "runs": runs, "seconds": runs * a_run / at_once} for name, runs, at_once in parts]
    seconds, size = [row["seconds"] for row in rows], parameters(design.proxy.shape)
    vectors = adjoint.vectors_held(design.proxy.steps, J, design.recompute)
    about = {"bytes": 4 * vectors * size, "parameters": size}
    return {"parts": rows, **about, "seconds": sum(seconds), "least_seconds": sum(seconds[:-1])}


def planned(design, folder, processes, say):
    """Record, differentiate, try: {"recorded": cell, "roads": [...], "chosen": index or None}.

    A road's entry has "road" (plan.Road), "strengths" f64[S], "target" f64[S] and "domains" f64[S,
    K] (changes by the parabolas; the latter as parts of the losses), "tried" [{"strength",
    "losses"}], "strength" and "gain".
    """
    seed, shares = PLANNING_SEED, np.array(design.proxy.shares)
    key = f"recorded/{seed}"
    base = cells.dealt(folder, design, [(key, recorded, {"seed": seed})], 1, say)[key]
    values = plan.of_target(base["influences"], design.target)
    rates = np.array(design.proxy.recipe.rates)
    roads = [
        plan.of_flow(values, shares, rates, design.kept),
        plan.free(values, shares, design.proxy.steps, design.kept),
    ]
    roads = [road for road in roads if road is not None and road.pattern.any()]
    jobs = []
    for road in roads:
        for strength in plan.RANGES:
            segments = plan.weights(road, strength, shares, np.array(design.low), np.array(design.high))
            arguments = {"seed": seed, "edges": road.edges.tolist(), "weights": segments.tolist()}
            jobs.append((f"tried/{road.name}/{strength:g}/{seed}", tried, arguments))
    found = cells.dealt(folder, design, jobs, processes, say)
    entries = [_entry(design, road, base, found) for road in roads]
    gains = [entry["gain"] for entry in entries]
    best = int(np.argmin(gains)) if gains and min(gains) < 0 else None
    return {"recorded": base, "roads": entries, "chosen": best}


def _entry(design, road, base, found):
    own = [found[f"tried/{road.name}/{strength:g}/{PLANNING_SEED}"] for strength in plan.RANGES]
    losses = np.array([[cell["losses"][name] for name in design.names] for cell in (base, *own)])
    strengths, moved = plan.curve(plan.RANGES, losses)
    of_target, parts = moved @ np.array(design.target), moved / losses[0]
    strength, gain = plan.strength_within(strengths, of_target, parts, design.harm)
    tries = [{"strength": s, "losses": c["losses"]} for s, c in zip(plan.RANGES, own, strict=True)]
    about = {"road": road, "strengths": strengths, "target": of_target, "domains": parts, "tried": tries}
    return {**about, "strength": strength, "gain": gain}


def proven(design, road, strength, folder, processes, say, attempt=0):
    """Prove a road at a strength on fresh pairs of seeds: {"verdict", "looks": [{"seeds",
    "changes": [verify.Change]}], "weights": f64[M, K], "attempt", "strength"}. changes: as of
    `changes_of`.
    """
    shares = np.array(design.proxy.shares)
    segments = plan.weights(road, strength, shares, np.array(design.low), np.array(design.high))
    ours = {"edges": road.edges.tolist(), "weights": segments.tolist()}
    looks = []
    for i, count in enumerate(design.looks):
        seeds = [100 * attempt + 1 + n for n in range(count)]
        jobs = []
        for seed in seeds:
            jobs.append((f"judged/constant/{seed}", judged, {"seed": seed, "edges": None, "weights": None}))
            jobs.append((f"judged/{road.name}/{strength:.6g}/{seed}", judged, {"seed": seed, **ours}))
        found = cells.dealt(folder, design, jobs, processes, say)
        pairs = [[found[key]["losses"] for key, _, _ in jobs[half::2]] for half in (1, 0)]
        changes = changes_of(design, pairs)
        last = i + 1 == len(design.looks)
        verdict = verify.verdict(changes[0], changes[1 : 1 + len(shares)], design.harm, last)
        looks.append({"seeds": count, "verdict": verdict, "changes": changes})
        if verdict != verify.OPEN:
            break
    return {"verdict": verdict, "looks": looks, "weights": segments, "attempt": attempt, "strength": strength}


def changes_of(design, pairs):
    """[verify.Change] of the target, of every domain, of the mixture and of what is untrained.

    pairs: ([losses of one run by name], [those of the constant mixture]), seeds in one order.
    """
    both = [np.array([[one[name] for name in design.source.names] for one in half]) for half in pairs]
    K, mixtures = len(design.names), {"target": design.target, "mixture": design.proxy.shares}
    read = {name: [half[:, :K] @ np.array(w) for half in both] for name, w in mixtures.items()}
    read |= {name: [half[:, j] for half in both] for j, name in enumerate(design.source.names)}
    order = ("target", *design.names, "mixture", *design.source.names[K:])
    return [verify.change(name, read[name][0], read[name][1], design.looks) for name in order]


def compared(design, gain, folder, processes, say):
    """What else would lower the target's loss by `gain` nats: {"data": part of extra samples of its
    domains or None beyond MORE_DATA, "steps": part of extra steps, "data_gains", "steps_gain"}.
    """
    seeds, jobs = range(1, COMPARED + 1), []
    asked = [
        change
        for change in (*({"more": m} for m in MORE_DATA), {"longer": LONGER})
        if _possible(design, **change)
    ]
    for change in ({}, *asked):
        for seed in seeds:
            name = "".join(f"{key}={value:g}/" for key, value in change.items()) or "constant/"
            arguments = {"seed": seed, "edges": None, "weights": None, **change}
            jobs.append((f"judged/{name}{seed}", judged, arguments))
    found = cells.dealt(folder, design, jobs, processes, say)

    def target(name):
        cells_of = [found[f"judged/{name}{seed}"]["losses"] for seed in seeds]
        return float(np.mean([[one[n] for n in design.names] @ np.array(design.target) for one in cells_of]))

    base = target("constant/")
    data = [(m["more"] - 1, base - target(f"more={m['more']:g}/")) for m in asked if "more" in m]
    steps = base - target(f"longer={LONGER:g}/") if {"longer": LONGER} in asked else 0.0
    share = verify.equivalent(gain, [x for x, _ in data], [y for _, y in data]) if data else None
    longer = math.exp(math.log(LONGER) * gain / steps) - 1 if steps > 0 else None
    return {"data": share, "steps": longer, "data_gains": data, "steps_gain": steps, "seeds": COMPARED}


def _possible(design, more=1.0, longer=1.0):
    """Whether the data is enough for so much more of the target's domains, or so many steps."""
    proxy, wanted = design.proxy, np.array(design.target) > 0
    if more > 1 and (wanted.all() or more * np.array(proxy.shares)[wanted].sum() > 0.9):
        return False
    need = np.array(proxy.budgets) * np.where(wanted, more, 1.0) * longer / np.array(proxy.epochs)
    pieces = design.source.seq_length // min(proxy.shape.sequence, design.source.seq_length)
    return bool((need + 1 <= np.array(design.source.plan.sizes) * pieces).all())


def carried_out(design, folder, processes, say, tell):
    """The whole design; tell(event, fields) gets each result as it is there. Returns {"outcome",
    "planned", "proofs", "compared"}; outcome: "gain", "nothing", "harm" or "short".
    """
    found = planned(design, folder, processes, say)
    tell("planned", found)
    proofs, other, outcome = [], None, verify.NOTHING
    if found["chosen"] is not None:
        entry = found["roads"][found["chosen"]]
        strength = entry["strength"]
        for attempt in range(ATTEMPTS):
            proofs.append(proven(design, entry["road"], strength, folder, processes, say, attempt))
            outcome = proofs[-1]["verdict"]
            tell("proof", proofs[-1])
            if outcome != verify.HARM:
                break
            strength *= LOWER
    if outcome == verify.GAIN:
        gain = -proofs[-1]["looks"][-1]["changes"][0].change
        other = compared(design, gain, folder, processes, say)
        tell("compared", other)
    elif outcome == verify.NOTHING and tokens_a_parameter(design) < SHORT:
        outcome = "short"
    return {"outcome": outcome, "planned": found, "proofs": proofs, "compared": other}


def tokens_a_parameter(design):
    """Tokens that the proxy trains on for each of its parameters."""
    shape = design.proxy.shape
    return design.proxy.steps * design.proxy.batch * shape.sequence / parameters(shape)


def within_memory(design, step_seconds, processes):
    """(design, its cost), with states recomputed where all of them do not fit. ValueError where
    neither does. Collective.
    """
    world = reduce.everyone()
    free = -float(
        reduce.max_of_numbers(np.array([-float(_free_bytes())]), world)[0]
    )  # the least of all ranks
    for recompute in (False, True):
        found = dataclasses.replace(design, recompute=recompute)
        told = cost(found, step_seconds, processes)
        if told["bytes"] <= MOST_MEMORY * free:
            return found, told
    raise ValueError(
        f"the proxy's states need {told['bytes'] / 2**30:.1f} GiB, {free / 2**30:.1f} are free: write a "
        "smaller --proxy, such as steps=250 or hidden=32"
    )


def _free_bytes():
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
