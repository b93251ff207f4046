"""Does the order of domains change the variance of the final loss? (open point of arXiv 2501.15556, section 6.1)

    python tests/bench/order_variance.py       # seconds; rewrites order_variance.csv

Two quadratic domains (n = 20, spectrum 0.8^j, 20 problems), half of the run each: 1 then 2, 2 then 1, and the even mixture.
Gradient noise of small constant power drives d theta = -g_w dt + C^1/2 dW with C the identity or the Hessian of what is
being trained; mean m and covariance S of theta at the end are exact (linear stochastic flow). With g the target's gradient
and H its Hessian at m the loss there has mean L(m) + tr(H S)/2 and variance g'Sg + tr(HSHS)/2: the second part counts when
the noise is large. Columns: median over problems of |log ratio| between the two orders, and of 1-then-2 to the mixture.
"""

import csv
from pathlib import Path

import numpy as np

from megatron_commute.experiments.quadratic_domains import growth, sample

PROBLEMS, STEPS, TARGET = 20, 16, np.array([0.5, 0.5])
ORDERS = {
    "first": np.repeat(np.eye(2), STEPS // 2, 0),
    "second": np.repeat(np.eye(2)[::-1], STEPS // 2, 0),
    "mixture": np.full((STEPS, 2), 0.5),
}


def end(problem, theta, weights, time, kind):
    """(g'Sg, tr(H S)/2, tr(HSHS)/2) at the end under weights f64[steps, 2]."""
    h, S = time / len(weights), np.zeros((len(theta), len(theta)))
    for w in weights:
        A = np.tensordot(w, problem.A, 1)
        rates, V = np.linalg.eigh(A)
        theta = problem.flow(w)(theta, h)
        power = V.T @ (A if kind == "hessian" else np.eye(len(theta))) @ V
        E = (V * np.exp(-rates * h)) @ V.T
        S = E @ S @ E + V @ (power * growth(rates[:, None] + rates, h)) @ V.T
    g, H = TARGET @ problem.gradients(theta), np.tensordot(TARGET, problem.A, 1)
    return g @ S @ g, np.trace(H @ S) / 2, np.trace(H @ S @ H @ S) / 2


def main():
    rows = []
    for kind in ("identity", "hessian"):
        for time in (1.0, 4.0, 16.0):
            logs = []
            for seed in range(PROBLEMS):
                problem, theta = sample(seed, n=20, domains=2, base=0.8)
                found = {name: np.log(end(problem, theta, w, time, kind)) for name, w in ORDERS.items()}
                logs.append([*(found["first"] - found["second"]), *(found["first"] - found["mixture"])])
            names = [
                f"{what}_{part}"
                for what in ("orders", "to_mixture")
                for part in ("variance", "mean", "large")
            ]
            rows.append(
                {"noise": kind, "time": time} | dict(zip(names, np.median(np.abs(logs), 0), strict=True))
            )
            print(rows[-1])
    with open(Path(__file__).with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: v if isinstance(v, str) else f"{v:.4g}" for k, v in row.items()} for row in rows)


if __name__ == "__main__":
    main()
