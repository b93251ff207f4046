"""A design from beginning to end: record a proxy, differentiate it, try roads, prove the best on
fresh seeds. K domains, J losses.
"""

import dataclasses
import math

import numpy as np

from megatron_commute.decide import flow
from megatron_commute.design import adjoint, cells, plan, verify
from megatron_commute.design.model import parameters
from megatron_commute.design.proxy import Proxy, Run, rates_of, text_of
from megatron_commute.design.text import Source

PLANNING_SEED = 1001  # of the recorded run and of what is tried; those that prove are 1 and up
LINE_SEARCH = 4  # runs: the constant mixture, both roads, the better one once more
ATTEMPTS = 3  # proofs at most, at lower and lower strengths
LOWER = 0.5  # times the strength, where a domain lost more than it may
MORE_DATA = (1.2, 1.5)  # times the samples of the target's domains, at the cost of the others
LONGER = 1.25  # times the steps
COMPARED = 4  # seeds of these
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
    """Cell: final losses, on what plans, of a run whose batches Mixture serves under segments, None
    for the constant mixture.

    Weights that act on the loss would make of a strong schedule a noisy one: few sequences count
    much. Their runs see too little gain and twice the harm.
    """
    return {"losses": _served(design, design.proxy, seed, edges, weights, judging=False)[0]}


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
    last, mean = _served(design, proxy, seed, edges, weights, averaged=averaged)
    return {"losses": last} if mean is None else {"losses": last, "averaged": mean}


def _served(design, proxy, seed, edges, weights, judging=True, averaged=0.0):
    """(final losses, those of the mean of the last parameters or None) of a run with sampled
    batches.
    """
    text = text_of(design.source, proxy)
    run = Run(proxy=proxy, seed=seed, text=text, weighted=False)
    changes = []
    if weights is not None:
        changes = plan.by_sample(edges, weights, proxy.steps * proxy.batch, proxy.batch)
    state, mean = run.sampled(changes, averaged)
    held = _held(design, text, judging)
    return _losses(run, state.theta, held), None if mean is None else _losses(run, mean, held)


def _losses(run, theta, held):
    return {name: run.model.mean_loss(theta, tokens.to(run.model.device)) for name, tokens in held.items()}


def planned(design, folder, processes, say):
    """Record, differentiate, search along the roads: {"recorded": cell, "roads": [...], "chosen":
    index or None}.

    A road's entry has "road" (plan.Road), "strengths" f64[S], "target" f64[S] and "domains" f64[S,
    K] (changes between what was tried; the latter as parts of the losses), "tried" [{"strength",
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
    if not roads:
        return {"recorded": base, "roads": [], "chosen": None}
    jobs = [("tried/constant", tried, {"seed": seed, "edges": None, "weights": None})]
    jobs += [_job(design, road, plan.FIRST) for road in roads]
    found = cells.dealt(folder, design, jobs, processes, say)
    entries = [_entry(design, road, found, (plan.FIRST,)) for road in roads]
    best = int(np.argmin([entry["gain"] or entry["target"][-1] for entry in entries]))
    asked = plan.second_strength(entries[best]["target"][-1], entries[best]["domains"][-1], design.harm)
    found = cells.dealt(folder, design, [_job(design, roads[best], asked)], 1, say)
    entries[best] = _entry(design, roads[best], found, (plan.FIRST, asked))
    return {"recorded": base, "roads": entries, "chosen": best if entries[best]["gain"] < 0 else None}


def segments_of(design, road, strength):
    """Weights f64[M, K] of a road at a strength on the proxy."""
    about = (design.proxy.shares, design.low, design.high)
    return plan.weights(road, strength, *(np.array(each) for each in about))


def _job(design, road, strength):
    weights = segments_of(design, road, strength).tolist()
    arguments = {"seed": PLANNING_SEED, "edges": road.edges.tolist(), "weights": weights}
    return f"tried/{road.name}/{strength:g}/sampled", tried, arguments


def _entry(design, road, found, strengths):
    base, *own = (
        found[key]["losses"]
        for key in ("tried/constant", *(f"tried/{road.name}/{s:g}/sampled" for s in strengths))
    )
    start = np.array([base[name] for name in design.names])
    moved = np.array([[losses[name] for name in design.names] for losses in own]) - start
    at, moved = plan.curve(strengths, moved)
    of_target, parts = moved @ np.array(design.target), moved / start
    strength, gain = plan.strength_within(at, of_target, parts, design.harm)
    tries = [{"strength": s, "losses": losses} for s, losses in zip(strengths, own, strict=True)]
    about = {"road": road, "strengths": at, "target": of_target, "domains": parts, "tried": tries}
    return {**about, "strength": strength, "gain": gain}


def proven(design, road, strength, folder, processes, say, attempt=0):
    """Prove a road at a strength on fresh pairs of seeds: {"verdict", "looks": [{"seeds",
    "changes": [verify.Change]}], "weights": f64[M, K], "attempt", "strength"}. changes: as of
    `changes_of`.
    """
    segments = segments_of(design, road, strength)
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
        verdict = verify.verdict(changes[0], changes[1 : 1 + len(design.names)], design.harm, last)
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
