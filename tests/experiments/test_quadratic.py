"""The quadratic experiment: flows against matrix exponentials, the paper's numbers, orders by brute force."""

import csv
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from scipy.linalg import expm

from megatron_commute import bracket
from megatron_commute.experiments import (
    quadratic,
    quadratic_domains,
    quadratic_errata,
    quadratic_search,
    quadratic_tables,
)

RESULTS = Path(__file__).parents[1] / "bench" / "results" / "quadratic"


def flow_by_expm(problem, theta, weights, time, decay=0.0):
    """The affine flow as the exponential of one larger matrix: independent of eigenvectors."""
    n = len(theta)
    generator = np.zeros((n + 1, n + 1))
    generator[:n, :n] = -np.tensordot(weights, problem.A, 1) - decay * np.eye(n)
    generator[:n, n] = sum(w * A @ b for w, A, b in zip(weights, problem.A, problem.b, strict=True))
    return (expm(generator * time) @ np.append(theta, 1.0))[:n]


@pytest.mark.parametrize("decay", [0.0, 0.2])
@pytest.mark.parametrize("time", [0.01, 1.0, 20.0])
def test_flow_is_the_matrix_exponential(time, decay):
    problem, theta = quadratic_domains.sample(0, n=30, domains=3)  # 0.7^29: rates of almost zero
    weights = np.array([0.2, 0.5, 0.3])
    expected = flow_by_expm(problem, theta, weights, time, decay)
    assert np.abs(problem.flow(weights, decay)(theta, time) - expected).max() < 1e-11


def test_measure_gives_the_closed_form_of_section_4_1():
    """P_12 = u . (A2 A1 (theta - b1) - A1 A2 (theta - b2)): the sign of equation 6."""
    for seed in range(5):
        problem, theta = quadratic_domains.sample(seed)
        (A1, A2), (b1, b2) = problem.A, problem.b
        u = (A1 @ (theta - b1) + A2 @ (theta - b2)) / 2
        M, u_g = problem.measure(theta, u)
        P = bracket.pairwise(M)
        expected = u @ (A2 @ A1 @ (theta - b1) - A1 @ A2 @ (theta - b2))
        assert abs(P[0, 1] - expected) < 1e-12 * np.abs(M).max()
        assert u_g == pytest.approx([u @ A1 @ (theta - b1), u @ A2 @ (theta - b2)])


def arguments(seed=0, domains=2, n=8, steps=6, time=3.0):
    problem, theta0 = quadratic_domains.sample(seed, n=n, domains=domains, base=0.8)
    share = np.full(domains, 1 / domains)
    names = ("A", "b", "theta0", "budgets", "time", "steps", "target")
    return dict(zip(names, (problem.A, problem.b, theta0, share, time, steps, share), strict=True))


def test_run_follows_its_schedule_flow_by_flow():
    """Constant weights are one flow; a schedule is one for each step."""
    given, even = arguments(domains=3), np.tile([0.5, 0.25, 0.25], (6, 1))
    problem = quadratic_domains.quadratic(given["A"], given["b"])
    for schedule, rows in (("constant", even), (np.eye(3)[[2, 0, 1, 1, 2, 0]],) * 2):
        given["budgets"], theta = rows.mean(0), given["theta0"]
        for weights in rows:
            theta = flow_by_expm(problem, theta, weights, 0.5)
        found = quadratic.run(**given, schedule=schedule)
        np.testing.assert_allclose(found.theta, theta, atol=1e-12)
        losses = [x @ A @ x / 2 for x, A in zip(theta - problem.b, problem.A, strict=True)]
        np.testing.assert_allclose(found.losses, losses)
        assert found.loss == pytest.approx(np.mean(losses), rel=1e-12) and isinstance(found.loss, float)
        assert (found.weights == rows).all()


def keeps(budgets, weights):
    np.testing.assert_allclose(weights.sum(1), 1)
    np.testing.assert_allclose(weights.sum(0), np.multiply(budgets, len(weights)), atol=1e-9)
    assert weights.min() >= 0


@pytest.mark.parametrize("budgets", [(0.5, 0.3, 0.2), (0.9, 0.05, 0.05), (1.0, 0.0, 0.0)])
def test_tilt_keeps_every_budget_and_leans_against_the_scores(budgets):
    given = arguments(domains=3, steps=20, time=1.0) | {"budgets": budgets}
    found = quadratic.run(**given, schedule="tilt")
    keeps(budgets, found.weights)
    problem = quadratic_domains.quadratic(given["A"], given["b"])
    u = problem.gradients(given["theta0"]).mean(0)
    s = bracket.scores(bracket.pairwise(problem.measure(given["theta0"], u)[0]), budgets)
    lean = np.log(found.weights[0, :2] / budgets[:2]) if budgets[1] else np.zeros(2)
    assert (lean[0] - lean[1]) * (s[0] - s[1]) <= 0


@pytest.mark.parametrize(("time", "budgets"), [(1.0, (1 / 3, 1 / 3, 1 / 3)), (16.0, (0.6, 0.3, 0.1))])
def test_commute_keeps_every_budget_and_gains_most_of_what_a_search_gains(time, budgets):
    """Over the horizon at which tilt harms it must not; the search is the optimum, found with the exact adjoint."""
    for seed in range(2):
        given = arguments(seed, domains=3, n=12, steps=16, time=time) | {"budgets": budgets}
        constant = quadratic.run(**given, schedule="constant").loss
        found = quadratic.run(**given, schedule="commute")
        keeps(budgets, found.weights)
        problem = quadratic_domains.quadratic(given["A"], given["b"])
        best = quadratic_search.search(
            problem, given["theta0"], np.array(budgets), time, 16, given["target"]
        )[1]
        assert constant - found.loss > 0.8 * (constant - best) > 0
        again = quadratic.run(**given, schedule="commute")
        assert (again.weights == found.weights).all(), "the same problem, the same decisions"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": "best"}, "'constant', 'tilt', 'commute'"),
        ({"schedule": np.full((5, 2), 0.5)}, r"pass weights\[6, 2\]"),
        ({"schedule": np.full((6, 2), 0.6)}, "sum to 1"),
        ({"schedule": np.tile([0.6, 0.4], (6, 1))}, "make the column sums equal"),
        ({"schedule": np.tile([[1.5, -0.5], [-0.5, 1.5]], (3, 1))}, "non-negative"),
        ({"budgets": [0.5, 0.6]}, "summing to 1"),
        ({"target": [1.0, 0.0, 0.0]}, "target has shape"),
        ({"A": np.zeros((2, 8, 7))}, r"pass A\[K, n, n\]"),
        ({"time": 0.0}, "positive flow time"),
    ],
)
def test_run_refuses_what_does_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        quadratic.run(**({"schedule": "constant"} | arguments() | change))


def test_sampled_matrices_have_the_paper_spectrum_and_no_preferred_direction():
    tops = []
    for seed in range(200):
        problem, _ = quadratic_domains.sample(seed, n=4)
        values, vectors = np.linalg.eigh(problem.A[0])
        assert values[::-1] == pytest.approx(0.7 ** np.arange(4))
        tops.append(np.outer(vectors[:, -1], vectors[:, -1]))
    assert np.abs(np.mean(tops, 0) - np.eye(4) / 4).max() < 0.07


def test_table1_agrees_with_flows_by_matrix_exponentials():
    problem, theta0 = quadratic_domains.sample(0, n=12)
    swap = quadratic_tables.Swap(problem)
    half, one, two = np.array([0.5, 0.5]), np.array([1.0, 0.0]), np.array([0.0, 1.0])

    def loss(theta):
        return sum((theta - b) @ A @ (theta - b) for A, b in zip(problem.A, problem.b, strict=True)) / 4

    theta = flow_by_expm(problem, theta0, half, 0.3)
    base = loss(flow_by_expm(problem, theta, half, 0.2))
    one_two = loss(flow_by_expm(problem, flow_by_expm(problem, theta, one, 0.1), two, 0.1))
    two_one = loss(flow_by_expm(problem, flow_by_expm(problem, theta, two, 0.1), one, 0.1))
    np.testing.assert_allclose(swap.excess(theta, 0.1), [one_two - base, two_one - base], rtol=1e-9)
    many = swap.ratio(np.stack([theta, theta0]), 0.1)
    assert many[0] == pytest.approx(swap.ratio(theta, 0.1))


def test_table1_tends_to_one_and_stays_near_the_paper():
    rows = quadratic_tables.table1(60)
    assert [(r["t"], r["dt"]) for r in rows] == list(
        itertools.product((0.1, 0.3, 1.0, 3.0), (0.001, 0.01, 0.1))
    )
    for row in rows:
        assert abs(row["median"] - 1) < 2.2 * row["dt"] + 1e-4
        assert abs(row["median"] - row["paper"]) < 0.09
    assert all(abs(row["median"] - 1) < 0.003 for row in rows if row["dt"] == 0.001)


def test_search_is_no_worse_than_the_best_of_all_pure_orders():
    steps, time = 8, 3.0
    for seed in (6, 9):
        problem, theta0 = quadratic_domains.sample(seed, n=6, base=0.8)
        share = np.array([0.5, 0.5])
        orders = [np.eye(2)[list(o)] for o in set(itertools.permutations([0] * 4 + [1] * 4))]
        losses = [quadratic_search.gradient(problem, theta0, o, time, share)[0] for o in orders]
        weights, loss = quadratic_search.search(problem, theta0, share, time, steps, share)
        assert loss <= min(losses) + 1e-9
        np.testing.assert_allclose(weights.sum(0), [4, 4], atol=1e-8)
        np.testing.assert_allclose(weights.sum(1), 1, atol=1e-8)


def test_corollary_holds_on_what_the_search_finds():
    rows = quadratic_search.corollary(3)
    assert [(r["domains"], r["seed"]) for r in rows] == list(itertools.product((2, 3), range(3)))
    for row in rows:
        assert row["found"] < row["constant"] and row["gain_percent"] > 0
        assert row["mixed_constant"] == 1 and row["improvable_constant"] > 0.9
        assert row["improvable_found"] < 0.06 and row["gap_found"] < 0.01
        assert row["allowed"] == row["switches"]


def test_study_writes_and_returns_everything(tmp_path):
    found = quadratic.study(tmp_path / "new", seeds=3)
    json.dumps(found)
    tables = ("table1", "readings", "one_problem", "errata", "full_loss", "corollary")
    assert set(found) == {*tables, "text", "files", "seeds", "seconds"}
    for name in tables:
        with open(tmp_path / "new" / f"{name}.csv", newline="") as file:
            assert len(list(csv.DictReader(file))) == len(found[name])
    for path in map(Path, found["files"]):
        assert 0 < path.stat().st_size < 200_000
    assert sum(path.endswith(".png") for path in found["files"]) == 4
    for title in ("Table 1", "the paper", "Printed formulas", "Corollary 3.2(b)"):
        assert title in found["text"]


def test_committed_results_are_what_the_command_gives():
    with open(RESULTS / "errata.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row, fresh in zip(rows, quadratic_errata.errata(100), strict=True):
        assert row["printed"] == fresh["printed"] and row["holds"] == fresh["holds"]
        assert float(row["ratio"]) == pytest.approx(fresh["ratio"], rel=1e-3)
    with open(RESULTS / "table1.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 12
