"""Study `signals`: which signal predicts the effect of an order, judged after a common tail, on a small language model.

The truth of a state and window is the half difference of the two orders after the tail, over paired seeds. Every signal is
measured at the state itself on sequences of its own, at an amplitude a running job could afford.
"""

import dataclasses

from megatron_commute.experiments import bilingual_cells as cells

RUNS = {  # name: (weights, optimiser settings)
    "even": ((0.5, 0.5), {}),
    "skewed": ((0.9, 0.1), {}),
    "even-cosine": ((0.5, 0.5), {"optimizer": "adamw", "decay": "cosine", "weight_decay": 0.1}),
    "skewed-cosine": ((0.9, 0.1), {"optimizer": "adamw", "decay": "cosine", "weight_decay": 0.1}),
}
TAIL = {2: 4, 8: 64, 32: 64, 128: 128, 512: 256}  # common steps after the window at which an order is judged
TRUTH, AFFORDABLE = 0.9, 0.2  # amplitudes as parts of the smallest weight
BLOCKS = 6  # of the wave, each a window of either sign and a tail


@dataclasses.dataclass(frozen=True)
class Size:
    """states: steps at which everything is measured; long_states: those where the longest window is; seeds: of the truth."""

    runs: tuple = tuple(RUNS)
    states: tuple = (300, 800, 1600, 2400)
    windows: tuple = (8, 32, 128)
    long_states: tuple = (800,)
    long_window: int = 512
    seeds: int = 3
    long_seeds: int = 2
    blocks: int = BLOCKS


QUICK = Size(("even",), (10, 20), (2,), (), 0, 2, 0, 2)


def settings_of(settings, run):
    return dataclasses.replace(settings, **RUNS[run][1])


def base_job(size, run):
    """Key, function and arguments of the run that all states come from."""
    states = sorted({*size.states, *size.long_states})
    arguments = {"name": run, "weights": list(RUNS[run][0]), "states": states, "read_every": 100}
    return f"{run}/base", cells.base, arguments


def jobs(size, run):
    """Everything measured from the states of one run, [(key, function, arguments)]; the expensive first."""
    weights = list(RUNS[run][0])
    plan = [(step, size.long_window, size.long_seeds, False) for step in size.long_states]
    plan += [(step, window, size.seeds, True) for window in size.windows[::-1] for step in size.states]
    found = []
    for step, window, seeds, waves in plan:
        place = {"name": run, "step": step, "weights": weights, "window": window}
        truth, small = (share * min(weights) for share in (TRUTH, AFFORDABLE))
        tail = TAIL[window]
        for seed in range(1, seeds + 1):
            order = {"delta": truth, "tails": [tail], "seed": seed, "orders": ["12", "21"]}
            found.append((f"{run}/{step}/{window}/truth/{seed}", cells.pair, {**place, **order}))
        order = {"delta": small, "tails": [tail], "seed": 101, "orders": ["12", "21"]}
        found.append((f"{run}/{step}/{window}/rollout", cells.pair, {**place, **order}))
        if waves:
            blocks = {"delta": small, "tail": tail, "blocks": size.blocks, "seed": 102}
            found.append((f"{run}/{step}/{window}/wave", cells.wave, {**place, **blocks}))
    for step in sorted({*size.states, *size.long_states}):
        place = {"name": run, "step": step, "weights": weights}
        short = {"delta": AFFORDABLE * min(weights), "steps": min(8, 4 * min(size.windows)), "seed": 103}
        found.append((f"{run}/{step}/tilt", cells.tilt, {**place, **short}))
        for metric in ("identity", "adam"):
            found.append((f"{run}/{step}/P/{metric}", cells.criterion, {**place, "metric": metric}))
    return found
