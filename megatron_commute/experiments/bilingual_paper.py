"""Study `paper`: sections 4.2 and 4.3 of Rukhovich et al. (arXiv 2501.15556) at a size that fits
the machine.

Base runs under (0.5, 0.5) and (0.9, 0.1); from four states both orders of eq. 9 and eq. 10 at three
strengths; P at checkpoints along the runs. The paper reads losses when the second window ends; here
every effect is read again after a common tail of base weights, because most of what is read at the
window's end is recency.
"""

import dataclasses
import math

import numpy as np

from megatron_commute.experiments import bilingual_cells as cells
from megatron_commute.experiments.bilingual_tables import loss_of, mean_and_error, targets

RUNS = {"even": ((0.5, 0.5), (0.15, 0.3, 0.45)), "skewed": ((0.9, 0.1), (0.03, 0.06, 0.09))}
# The paper's Tables 2 and 3: step, L_1, L_2, EL_1^12, EL_2^12, EL_1^21, EL_2^21, gamma^2 P_21;1,
# gamma^2 P_21;2. The last column of Table 2 is cut off in our copy after two digits; its rows from
# 8000 on are completed from Table 4.
PRINTED = {
    "even": (
        (2000, 3.44, 3.04, -0.0191, 0.0286, 0.0352, -0.0289, 0.0195, -0.02),
        (8000, 3.32, 2.92, -0.0201, 0.0179, 0.0129, -0.0211, -0.0020, -0.0074),
        (14000, 3.25, 2.86, -0.0065, 0.0169, 0.0168, -0.0151, 0.0014, -0.0048),
        (20000, 3.21, 2.81, -0.0038, 0.0049, 0.0131, -0.0079, 0.0049, -0.0072),
    ),
    "skewed": (
        (2000, 3.26, 3.70, -0.0006, 0.0352, 0.0037, -0.0394, 0.0225, -0.1454),
        (8000, 3.18, 3.48, -0.0010, 0.0216, 0.0023, -0.0297, 0.0053, -0.0076),
        (14000, 3.12, 3.33, -0.0012, 0.0174, 0.0009, -0.0233, 0.0027, -0.0048),
        (20000, 3.09, 3.22, -0.0017, 0.0144, 0.0007, -0.0199, 0.0020, -0.0317),
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """How large the study is. The paper: starts 2000 ... 20000 of 28000 steps, window 4000."""

    starts: tuple = (200, 600, 1000, 1400)
    # states of the interventions
    window: int = 200
    # steps of each half
    tail: int = 200
    # common steps afterwards
    seeds: int = 2
    # paired
    checkpoints: tuple = (400, 800, 1200, 1600)
    # states at which P alone is measured


QUICK = Size(starts=(10, 20), window=5, tail=5, seeds=2, checkpoints=(15,))
METRICS = ("identity", "adam")


def parts(settings, size):
    """[(settings, base job, jobs)] of both runs."""
    return [(settings, base_job(size, run), jobs(size, run)) for run in RUNS]


def base_job(size, run):
    states = sorted({*size.starts, *size.checkpoints})
    last = max(states) + 2 * size.window
    arguments = {"name": run, "weights": list(RUNS[run][0]), "states": [*states, last]}
    return f"{run}/base", cells.base, {**arguments, "read_every": max(1, size.window // 4)}


def jobs(size, run):
    """Interventions and measurements of P of one run, [(key, function, arguments)]."""
    weights, strengths = RUNS[run]
    found = []
    for step in size.starts:
        for seed in range(1, size.seeds + 1):
            for delta in sorted(strengths, reverse=True):
                # the base run is the same for every strength
                orders = ["12", "21", "base"] if delta == max(strengths) else ["12", "21"]
                arguments = {
                    "name": run,
                    "step": step,
                    "weights": list(weights),
                    "delta": delta,
                    "window": size.window,
                }
                arguments |= {"tails": [size.tail], "seed": seed, "orders": orders}
                found.append((f"{run}/{step}/{delta}/{seed}", cells.pair, arguments))
    for step in sorted({*size.starts, *size.checkpoints}):
        for metric in METRICS:
            place = {"name": run, "step": step, "weights": list(weights), "metric": metric}
            found.append((f"{run}/{step}/P/{metric}", cells.criterion, place))
    return found


def effects(found, settings, size, run):
    """One row for each state, strength, order and target: excess loss over the base run at the
    window's end and after the tail, with standard errors over paired seeds (nats).
    """
    rows, strengths = [], RUNS[run][1]
    for step in size.starts:
        for delta in strengths:
            pairs = [
                (
                    found.get(f"{run}/{step}/{delta}/{seed}"),
                    found.get(f"{run}/{step}/{max(strengths)}/{seed}"),
                )
                for seed in range(1, size.seeds + 1)
            ]
            pairs = [pair for pair in pairs if None not in pair]
            for order in ("12", "21") if pairs else ():
                for target in targets(settings):
                    row = {"run": run, "step": step, "delta": delta, "order": order, "target": target}
                    for reading, name in ((0, "end"), (-1, "tail")):
                        values = [_excess(*pair, order, target, settings, reading) for pair in pairs]
                        row[name], row[f"{name}_se"] = mean_and_error(values)
                    rows.append({**row, "seeds": len(pairs)})
    return rows


def _excess(cell, with_base, order, target, settings, reading):
    weights = cell["weights"]
    moved, base = cell[order][reading][1], with_base["base"][reading][1]
    return loss_of(moved, target, settings, weights) - loss_of(base, target, settings, weights)


def brackets(found, settings, size, run):
    """One row for each checkpoint, metric and target: P_12 with its error, and gamma^2 P_21 as the
    paper prints it.

    gamma^2 with the learning rate gamma; under the Adam metric the flow time of a step is the same
    rate.
    """
    rows = []
    for step in sorted({*size.starts, *size.checkpoints}):
        for metric in METRICS:
            cell = found.get(f"{run}/{step}/P/{metric}")
            for t, target in enumerate(cell["targets"]) if cell else ():
                p, error, square = cell["P"][t], cell["P_se"][t], cell["rate"] ** 2
                row = {
                    "run": run,
                    "step": step,
                    "metric": metric,
                    "target": target,
                    "P_12": p,
                    "P_12_se": error,
                }
                rows.append({**row, "gamma2_P_21": -square * p, "gamma2_P_21_se": square * error})
    return rows


def beside(found, effect_rows, bracket_rows, settings, size, run):
    """Tables 2 and 3: our numbers at the strongest intervention beside the paper's, one row for
    each of the four states.

    EL: excess losses at the window's end in nats; g2P: gamma^2 P_21 under the Adam metric for
    either language as the target.
    """
    rows, (first, second) = [], settings.domains[:2]
    excess = {(r["step"], r["delta"], r["order"], r["target"]): r for r in effect_rows if r["run"] == run}
    P = {(r["step"], r["target"]): r for r in bracket_rows if (r["run"], r["metric"]) == (run, "adam")}
    for step, printed in zip(size.starts, PRINTED[run], strict=False):
        row = {"run": run, "step": step, "paper's step": printed[0]}
        for i, (order, name) in enumerate(((o, n) for o in ("12", "21") for n in (first, second)), 3):
            r = excess.get((step, max(RUNS[run][1]), order, name))
            row[f"EL {name} {order}"] = f"{r['end']:+.4f} ± {r['end_se']:.4f}" if r else None
            row[f"paper's EL {name} {order}"] = printed[i]
        for i, name in enumerate((first, second), 7):
            r = P.get((step, name))
            row[f"g2P {name}"] = f"{r['gamma2_P_21']:+.4f} ± {r['gamma2_P_21_se']:.4f}" if r else None
            row[f"paper's g2P {name}"] = printed[i]
        rows.append(row)
    return rows


def agreement(effect_rows, bracket_rows, settings, reading):
    """Sign agreement of the strongest intervention with P and with "the domain trained last gains",
    on trained domains.

    reading: "end" or "tail". P_12 > 0 predicts that order 12 ends higher than 21. Rows: predictor,
    run, hits, of, and how many of the effects are outside their error (|effect| > 2 standard errors
    of the half difference).
    """
    rows = []
    for run in RUNS:
        strongest = max(RUNS[run][1])
        truths = {}
        for row in effect_rows:
            if row["run"] == run and row["delta"] == strongest and row["target"] in settings.domains:
                truths.setdefault((row["step"], row["target"]), {})[row["order"]] = (
                    row[reading],
                    row[f"{reading}_se"],
                )
        halves = {place: (both["12"][0] - both["21"][0]) / 2 for place, both in truths.items()}
        errors = {place: math.hypot(both["12"][1], both["21"][1]) / 2 for place, both in truths.items()}
        clear = {place for place in halves if abs(halves[place]) > 2 * errors[place]}
        last = {place: 1.0 if place[1] == settings.domains[0] else -1.0 for place in halves}
        predictors = {"the domain trained last gains": last}
        for metric in METRICS:
            predictors[f"P {metric}"] = {
                (r["step"], r["target"]): r["P_12"]
                for r in bracket_rows
                if (r["run"], r["metric"]) == (run, metric)
            }
        for name, signs in predictors.items():
            hits = [place for place in halves if place in signs and signs[place] * halves[place] > 0]
            count = {
                "hits": len(hits),
                "of": len(halves),
                "hits_clear": len(clear & set(hits)),
                "clear": len(clear),
            }
            rows.append({"run": run, "reading": reading, "predictor": name, **count})
    return rows


def who_gains(effect_rows, settings, run):
    """Whether order 12 ends lower on the second domain (trained last) than the base, per state:
    what the text says, and the paper's tables deny (their EL_2^12 are positive).
    """
    strongest = max(RUNS[run][1])
    found = [r for r in effect_rows if (r["run"], r["delta"], r["order"]) == (run, strongest, "12")]
    second = [r for r in found if r["target"] == settings.domains[1]]
    return {
        "run": run,
        "lower": sum(r["end"] < 0 for r in second),
        "of": len(second),
        "printed_lower": sum(row[4] < 0 for row in PRINTED[run]),
        "printed_of": len(PRINTED[run]),
    }


def base_readings(found, run):
    """(steps i64[n], losses {name: f64[n]}) along the base run."""
    readings = found[f"{run}/base"]["readings"]
    steps = np.array([step for step, _ in readings])
    return steps, {name: np.array([losses[name] for _, losses in readings]) for name in readings[0][1]}
