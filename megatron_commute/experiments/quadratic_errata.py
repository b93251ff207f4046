"""The paper's formulas as printed (arXiv 2501.15556), each against what its own toy problem does:
`errata`.

Printed formulas are spelled out here in matrices and vectors and never used; the package's sign and
constant are in bracket.py. A ratio is measured over printed: 1 means that the formula holds as
printed.
"""

from __future__ import annotations

import numpy as np

from megatron_commute.experiments.quadratic_domains import sample
from megatron_commute.experiments.quadratic_tables import HALF, Swap

WINDOW = 1e-4  # so short that a ratio is within 0.001 of its limit
START = 1.0

# The same checkpoints at steps 2000, 8000, 14000, 20000: P_2,1;1 of Tables 2 and 3, P_2,1;2 of
# Table 3 ...
TABLES_2_3 = (
    0.0195,
    -0.002,
    0.0014,
    0.0049,
    0.0225,
    0.0053,
    0.0027,
    0.002,
    -0.1454,
    -0.0076,
    -0.0048,
    -0.0317,
)
# ... and P_12;1 of Table 4 (a) and (b), P_12;2 of Table 4 (b).
TABLE_4 = (0.0195, -0.002, 0.0014, 0.0049, 0.0225, 0.0053, 0.0027, 0.002, -0.1454, -0.0076, -0.0048, -0.0317)


def errata(seeds):
    """One row a printed formula: place, printed, median, lowest, highest measured / printed, what
    holds.
    """
    ratios = [_ratios(seed) for seed in range(seeds)]
    rows = []
    for (place, printed, holds), cells in zip(FORMULAS, np.array(ratios).T, strict=True):
        low, middle, high = float(cells.min()), float(np.median(cells)), float(cells.max())
        rows.append(
            {
                "place": place,
                "printed": printed,
                "ratio": middle,
                "lowest": low,
                "highest": high,
                "holds": holds,
            }
        )
    labels = np.divide(TABLE_4, TABLES_2_3)
    row = {"place": "Table 4", "printed": "P_12 where Tables 2 and 3 print P_21"}
    ratio = {"ratio": float(np.median(labels)), "lowest": float(labels.min()), "highest": float(labels.max())}
    return [*rows, row | ratio | {"holds": "P_21 throughout (P_12 = -P_21, so equal numbers cannot be both)"}]


FORMULAS = (
    (
        "eq. 4",
        "Phi1 o Phi2 - Phi2 o Phi1 = t1 t2 ([A1,A2] theta - A1 A2 b2 + A2 A1 b1)",
        "as printed (2 first minus 1 first)",
    ),
    ("eqs. 5, 6", "the same difference = t1 t2 R,  R = H2 g1 - H1 g2", "R is 1 first minus 2 first"),
    ("app. D.1", "the same difference = t1 t2 (H1 g2 - H2 g1)", "as printed"),
    ("eq. 7", "P = <R, g> = g'(H1 g2 - H2 g1)", "P = <R, g> = g'(H2 g1 - H1 g2), eq. 6"),
    ("eq. 8", "dL = 1/2 delta e^2 P(Li - Lj, Lw; L), P of eq. 6", "constant 1"),
    ("eq. 8", "dL = 1/2 delta e^2 P(Li - Lj, Lw; L), P of eq. 7", "constant 1, sign of eq. 6"),
    ("proof of (b)", "dL = -1/2 delta e^2 P, P of eq. 6", "dL = +delta e^2 P: take delta < 0"),
    ("sec. 3.2, end", "P of eq. 6 > 0 forbids 1 then 2: trading delta gives -delta e^2 P", "as printed"),
    ("sec. 4.1", "L(12) - L(base) = 1/8 Dt^2 P, P of eq. 6", "constant 1/2"),
    ("sec. 4.1", "L(base) - L(21) = 1/8 Dt^2 P, P of eq. 6", "constant 1/2"),
    (
        "sec. 4.1, expanded",
        "1/8 Dt^2 ((theta-b1)'A1 + (theta-b2)'A2) (A1 A2 (theta-b2) - A2 A1 (theta-b1))",
        "constant -1/4 (the first bracket is 2 g, the second has eq. 7's sign)",
    ),
    ("app. D.2, 1st order", "theta(t0+tau) - theta(t0) = + sum_k int w_k g_k", "minus"),
    ("app. D.2, 2nd order", "+ sum int int w_k1 w_k2 H_k1 g_k2, k1 later", "as printed"),
)


def _ratios(seed):
    """Measured over printed for every row of FORMULAS, on one random problem."""
    problem, theta0 = sample(seed)
    swap = Swap(problem)
    theta = swap.mixture(theta0, START)
    A, b, (g1, g2) = problem.A, problem.b, problem.gradients(theta)
    g, e = (g1 + g2) / 2, WINDOW
    one_two = swap.second(swap.first(theta, e), e)
    two_one = swap.first(swap.second(theta, e), e)
    swapped = two_one - one_two  # Phi1 after Phi2, minus Phi2 after Phi1
    equation4 = e * e * ((A[0] @ A[1] - A[1] @ A[0]) @ theta - A[0] @ A[1] @ b[1] + A[1] @ A[0] @ b[0])
    R = A[1] @ g1 - A[0] @ g2
    P6, P7 = g @ R, g @ (A[0] @ g2 - A[1] @ g1)
    expanded = ((theta - b[0]) @ A[0] + (theta - b[1]) @ A[1]) @ (A[0] @ g2 - A[1] @ g1)
    excess, excess21 = swap.excess(theta, e)
    delta = 0.25
    tilt = np.array([delta, -delta])
    moved = _two_windows(problem, theta, HALF + tilt, HALF - tilt, e)
    shifted = swap.difference(moved, swap.mixture(theta, 2 * e))
    blended = _two_windows(problem, theta, np.array([1 - delta, delta]), np.array([delta, 1 - delta]), e)
    switched = swap.difference(blended, one_two)
    first_order = e * (g1 + g2)
    second_order = e * e * (A[0] @ g1 / 2 + A[1] @ g2 / 2 + A[1] @ g1)
    return [
        _along(swapped, equation4),
        _along(swapped, e * e * R),
        _along(swapped, e * e * (A[0] @ g2 - A[1] @ g1)),
        P6 / P7,
        shifted / (delta * e * e * P6 / 2),
        shifted / (delta * e * e * P7 / 2),
        shifted / (-delta * e * e * P6 / 2),
        switched / (-delta * e * e * P6),
        excess / (e * e * P6 / 8),
        -excess21 / (e * e * P6 / 8),
        excess / (e * e * expanded / 8),
        _along(one_two - theta, first_order),
        _along(one_two - theta + first_order, second_order),
    ]


def _two_windows(problem, theta, first, second, time):
    return problem.flow(second)(problem.flow(first)(theta, time), time)


def _along(measured, printed):
    """The multiple of `printed` nearest to `measured`."""
    return (measured @ printed) / (printed @ printed)
