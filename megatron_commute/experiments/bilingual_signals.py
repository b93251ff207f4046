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
TRUTH, AFFORDABLE = 0.9, 0.2  # amplitudes as parts of the smallest weight
ROLLOUTS = (101, 104, 105)  # seeds of the affordable pairs whose mean is the signal
BLOCKS = 6  # of the wave, each a window of either sign and a tail


@dataclasses.dataclass(frozen=True)
class Window:
    """Steps of a window and of the common tail after which an order is judged, and where it is measured: runs by name,
    states (steps), paired seeds of the truth, and whether the lock-in wave is run as well (it takes as many steps as six
    pairs)."""

    steps: int
    tail: int
    runs: tuple
    states: tuple
    seeds: int
    waves: bool


@dataclasses.dataclass(frozen=True)
class Size:
    """plan: windows, shortest first, the long ones in fewer places, for what they cost; blocks: of a wave; rollouts:
    affordable pairs in a place, their mean is the signal; stretch: how many times longer everything is (windows, tails,
    states) than the plan says."""

    plan: tuple = (
        Window(8, 64, tuple(RUNS), (300, 800, 1600, 2400), 3, True),
        Window(32, 64, tuple(RUNS), (300, 800, 1600, 2400), 3, True),
        Window(128, 128, ("even", "skewed"), (800, 2400), 8, True),
        Window(512, 256, ("even",), (800,), 5, False),
    )
    blocks: int = BLOCKS
    rollouts: int = len(ROLLOUTS)
    stretch: int = 1

    @property
    def windows(self):
        """The windows of the plan at their full length."""
        long = self.stretch
        return tuple(
            dataclasses.replace(
                w, steps=long * w.steps, tail=long * w.tail, states=tuple(long * step for step in w.states)
            )
            for w in self.plan
        )

    @property
    def runs(self):
        return tuple(dict.fromkeys(run for window in self.plan for run in window.runs))

    def states(self, run):
        """All states of a run at which something is measured."""
        return sorted({state for window in self.windows if run in window.runs for state in window.states})


QUICK = Size((Window(2, 4, ("even",), (10, 20), 2, True),), 2, 2)


def parts(settings, size):
    """[(settings, base job, jobs)] of every run of the study."""
    return [(settings_of(settings, run), base_job(size, run), jobs(size, run)) for run in size.runs]


def settings_of(settings, run):
    return dataclasses.replace(settings, **RUNS[run][1])


def base_job(size, run):
    """Key, function and arguments of the run that all states come from."""
    arguments = {"name": run, "weights": list(RUNS[run][0]), "states": size.states(run)}
    return f"{run}/base", cells.base, {**arguments, "read_every": 100 * size.stretch}


def jobs(size, run):
    """Everything measured from the states of one run, [(key, function, arguments)]; the expensive first."""
    weights = list(RUNS[run][0])
    truth, small = (share * min(weights) for share in (TRUTH, AFFORDABLE))
    found = []
    places = [(window, step) for window in size.windows[::-1] if run in window.runs for step in window.states]
    for w, step in places:
        place = {"name": run, "step": step, "weights": weights, "window": w.steps}
        prefix = f"{run}/{step}/{w.steps}"
        for seed in range(1, w.seeds + 1):
            order = {"delta": truth, "tails": [w.tail], "seed": seed, "orders": ["12", "21"]}
            found.append((f"{prefix}/truth/{seed}", cells.pair, {**place, **order}))
        for seed in ROLLOUTS[: size.rollouts]:
            order = {"delta": small, "tails": [w.tail], "seed": seed, "orders": ["12", "21"]}
            key = f"{prefix}/rollout" + (f"/{seed}" if seed != ROLLOUTS[0] else "")
            found.append((key, cells.pair, {**place, **order}))
        if w.waves:
            blocks = {"delta": small, "tail": w.tail, "blocks": size.blocks, "seed": 102}
            found.append((f"{prefix}/wave", cells.wave, {**place, **blocks}))
    for step in size.states(run):
        place = {"name": run, "step": step, "weights": weights}
        steps = min(8 * size.stretch, 4 * size.windows[0].steps)
        short = {"delta": small, "steps": steps, "seed": 103}
        found.append((f"{run}/{step}/tilt", cells.tilt, {**place, **short}))
        for metric in ("identity", "adam"):
            found.append((f"{run}/{step}/P/{metric}", cells.criterion, {**place, "metric": metric}))
    return found
