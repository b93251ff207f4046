"""The stream of a mixture against Megatron's own table, rational arithmetic and its docstring's promises."""

import importlib.util
import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_commute import mixture as module
from megatron_commute.mixture import Mixture, stretch_python

PATHS = [stretch_python] + ([module.stretch] if module.stretch is not None else [])


@pytest.fixture(params=PATHS, ids=["python", "compiled"][: len(PATHS)])
def path(request, monkeypatch):
    """Every test that uses it runs on the plain and on the compiled stretch."""
    monkeypatch.setattr(module, "stretch", request.param)


def megatron_helpers():
    """megatron-core's compiled helpers, without the imports (and warnings) of the package around them."""
    folder = Path(
        next(iter(importlib.util.find_spec("megatron").submodule_search_locations)), "core", "datasets"
    )
    (library,) = folder.glob("helpers_cpp*.so")
    spec = importlib.util.spec_from_file_location("helpers_cpp", library)
    helpers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(helpers)
    return helpers


def megatron_blend(weights, n):
    domain, position = np.zeros(n, dtype=np.int16), np.zeros(n, dtype=np.int64)
    megatron_helpers().build_blending_indices(domain, position, weights, len(weights), n, False)
    return domain, position


def exact_stream(weights, changes, budgets, n):
    """The rule in rational numbers, sample by sample: an oracle that shares no arithmetic with the code."""
    K = len(weights)
    wish, target, served, stream = [Fraction(float(w)) for w in weights], [Fraction(0)] * K, [0] * K, []
    total = sum(wish)
    wish = [w / total for w in wish]
    for i in range(n):
        if i in changes:
            wish = [Fraction(float(w)) for w in changes[i]]
        alive = [d for d in range(K) if budgets[d] is None or served[d] < budgets[d]]
        share = sum(wish[d] for d in alive)
        now = [wish[d] / share if d in alive else Fraction(0) for d in range(K)]
        ahead = now if i == 0 else [0] * K
        d = max((d for d in alive if now[d] > 0), key=lambda d: (target[d] + ahead[d] - served[d], -d))
        stream.append((d, served[d]))
        served[d] += 1
        target = [t + w for t, w in zip(target, now, strict=True)]
    return stream


def pairs(taken):
    return list(zip(taken[0].tolist(), taken[1].tolist(), strict=True))


def shares(K):
    return np.random.default_rng(K).dirichlet(np.ones(K))


@pytest.mark.parametrize(
    ("weights", "n"),
    [(shares(1), 1000), (shares(2), 20_000), (shares(10), 2_000_000), (shares(100), 50_000), ([1, 1], 3000),
     ([0.5, 0.25, 0.25], 3000), ([30, 70], 3000), ([1 / 3] * 3, 3000)],
    ids=["1", "2", "10", "100", "ties", "half", "not normalised", "thirds"],
)  # fmt: skip
def test_constant_weights_give_megatrons_table_bit_for_bit(weights, n, path):
    n = n if module.stretch is not stretch_python else min(n, 20_000)
    domain, position = Mixture(weights).take(n)
    want = megatron_blend(np.array(weights, dtype=np.float64) / np.sum(weights), n)
    assert np.array_equal(domain, want[0]) and np.array_equal(position, want[1])


@pytest.mark.parametrize("seed", range(60))
def test_changes_and_budgets_follow_the_rule_in_rational_numbers(seed, path):
    rng = np.random.default_rng(seed)
    K, n = int(rng.integers(1, 7)), int(rng.integers(1, 250))
    counts = rng.multinomial(n, rng.dirichlet(np.ones(K)))
    budgets = [None] * K if seed % 3 == 0 else counts.tolist()
    weights = rng.dirichlet(np.ones(K)) + 0.001
    changes = {int(at): rng.dirichlet(np.ones(K)) for at in rng.integers(1, n + 1, size=rng.integers(0, 6))}
    for wish in changes.values() if seed % 3 == 0 and K > 1 else ():
        wish[rng.integers(K)] = 0.0  # obeyed at once
    stream = Mixture(weights, budgets)
    for at in sorted(changes):
        stream.schedule(changes[at], at)
    assert pairs(stream.take(n)) == exact_stream(weights, changes, budgets, n)


@st.composite
def histories(draw):
    """(arguments of Mixture, changes, length): budgets, endless domains, bounds, zero weights, changes."""
    K = draw(st.integers(1, 6))
    n = draw(st.integers(1, 120))
    weight = st.one_of(st.just(0.0), st.integers(1, 20).map(float), st.floats(1e-6, 1.0))
    weights = st.lists(weight, min_size=K, max_size=K).filter(any)
    cuts = sorted(draw(st.lists(st.integers(0, n), min_size=K - 1, max_size=K - 1)))
    counts = np.diff([0, *cuts, n])
    endless = draw(st.lists(st.booleans(), min_size=K, max_size=K))
    budgets = [None if e else int(c) for e, c in zip(endless, counts, strict=True)]
    limits = {"budgets": budgets, "samples": n}
    if draw(st.booleans()):
        share = counts / n
        limits["minimum"] = share * draw(st.floats(0, 1))
        limits["maximum"] = share + (1 - share) * draw(st.floats(0, 1))
        assume(limits["maximum"].sum() >= 1)
    changes = draw(st.lists(st.tuples(st.integers(0, n), weights), max_size=6))
    return {"weights": draw(weights), **limits}, sorted(changes, key=lambda change: change[0]), n


def begun(arguments, changes):
    stream = Mixture(**arguments)
    for at, weights in changes:
        stream.schedule(weights, at)
    return stream


@settings(max_examples=150, deadline=None)
@given(histories(), st.data())
def test_stream_does_not_depend_on_how_it_is_cut_saved_or_compiled(history, data):
    arguments, changes, n = history
    whole = pairs(begun(arguments, changes).take(n))
    cut, found = begun(arguments, changes), []
    while cut.index < n:
        found += pairs(cut.take(data.draw(st.integers(0, n - cut.index))))
        if data.draw(st.booleans()):
            cut = Mixture.from_state(json.loads(json.dumps(cut.state_dict())))
        elif cut.index < n:
            found += pairs(cut.take(1))
    assert found == whole
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "stretch", None)
        assert pairs(begun(arguments, changes).take(n)) == whole


@settings(max_examples=150, deadline=None)
@given(histories())
def test_budgets_are_exact_positions_count_up_and_zero_means_zero(history):
    arguments, changes, n = history
    stream = begun(arguments, changes)
    K, budgets = len(arguments["weights"]), arguments["budgets"]
    weights, target = [], np.zeros(K)
    for i in range(n):
        weights.append(stream.weights)
        assert math.isclose(math.fsum(weights[-1]), 1.0, rel_tol=1e-9)
        served = stream.served
        (domain,), (position,) = stream.take(1)
        assert position == served[domain] and weights[-1][domain] > 0
        target += weights[-1]
        assert np.allclose(stream.target, target, atol=1e-9)
        assert np.abs(stream.served - target).max() <= max(K - 1, 0) + 1e-9, i
    assert all(b is None or stream.served[d] == b for d, b in enumerate(budgets))
    assert stream.index == n == stream.served.sum()


def test_the_harmonic_bound_is_reached_and_never_passed():
    """The adversary of the cup game: all weight goes to the domains in play but the one about to win."""
    K = 8
    stream = Mixture(np.ones(K))
    stream.take(K)
    left = list(range(K))
    while len(left) > 1:
        winner = max(left, key=lambda d: (stream.credit[d], -d))
        stream.schedule([1.0 if d in left and d != winner else 1e-12 for d in range(K)], stream.index)
        left.remove(int(stream.take(1)[0][0]))
        assert stream.credit.min() > -1 - 1e-9
    assert stream.credit.max() == pytest.approx(sum(1 / k for k in range(1, K)), abs=1e-6)


@settings(max_examples=100, deadline=None)
@given(histories())
def test_bounds_hold_until_rounding_ends_them(history):
    arguments, changes, n = history
    assume("minimum" in arguments)
    stream, low, high = begun(arguments, changes), arguments["minimum"], arguments["maximum"]
    budgeted = np.array([b is not None for b in arguments["budgets"]])
    budgets = np.array([b or 0 for b in arguments["budgets"]])
    K = len(low)
    while stream.index < n:
        owed, left = (budgets - stream.served)[budgeted], n - stream.index
        # served and target differ by up to K - 1: the last samples of a budget may come that much early
        if (owed > K).all() and (left - owed.sum() > K or budgeted.all()):
            assert (stream.weights >= low - 1e-6).all() and (stream.weights <= high + 1e-6).all()
        stream.take(1)


def test_a_wish_that_would_break_a_budget_is_projected_and_told():
    stream = Mixture([0.5, 0.5], [600, None], samples=1000)
    domain, _ = stream.take(1000)
    assert (domain[:799] == 1).sum() == 400 or (domain[:800] == 1).sum() == 400
    assert (domain[801:] == 0).all()
    (told,) = stream.projections
    assert 798 <= told.sample <= 801
    assert told.wished.tolist() == [0.5, 0.5] and told.used.tolist() == [1.0, 0.0]


def test_the_rounding_at_the_end_of_a_run_is_not_told():
    stream = Mixture([0.5, 0.3, 0.2], [500, 300, 200])
    stream.take(1000)
    assert stream.served.tolist() == [500, 300, 200] and stream.projections == []
    endless = Mixture([0.5, 0.5], [10, None])
    endless.take(100)
    assert [told.sample for told in endless.projections] == [19]


def test_schedule_drops_later_changes_and_refuses_the_past():
    stream = Mixture([1, 1])
    stream.schedule([1, 0], 50)
    stream.schedule([0, 1], 20)
    domain, _ = stream.take(100)
    assert (domain[20:] == 1).all()
    with pytest.raises(ValueError, match="99, but 100 samples are served: schedule at 100 or later"):
        stream.schedule([1, 1], 99)
    stream.schedule([1, 0], 100)
    stream.schedule([0, 1], 100)
    assert stream.weights.tolist() == [0, 1]
    stream.schedule([1, 0], 10**15)


def test_the_end_is_named_and_nothing_is_taken():
    stream = Mixture([1, 1], [3, 4])
    stream.take(5)
    with pytest.raises(
        ValueError, match=r"passes the end of the run at 7: take 2 or fewer, raise the budgets"
    ):
        stream.take(3)
    assert stream.index == 5
    stream.take(2)
    assert stream.served.tolist() == [3, 4] and not stream.weights.any()
    assert stream.take(0)[0].size == 0


@pytest.mark.parametrize(
    "arguments,cure",
    [
        ({"weights": []}, "one number for each domain"),
        ({"weights": [1, -1]}, "finite numbers >= 0"),
        ({"weights": [1, math.nan]}, "finite numbers >= 0"),
        ({"weights": [0, 0]}, "at least one of them above 0"),
        ({"weights": [1, 1], "budgets": [1]}, "one budget"),
        ({"weights": [1, 1], "budgets": [1.5, 2]}, "whole number"),
        ({"weights": [1, 1], "budgets": [5, 6], "samples": 10}, "lower them or train longer"),
        ({"weights": [1, 1], "budgets": [4, 5], "samples": 10}, "one domain the budget null"),
        ({"weights": [1, 1], "budgets": [4, None], "samples": 3}, "lower them or train longer"),
        ({"weights": [1, 1], "minimum": [0.6, 0.6]}, "minimum must sum to at most 1"),
        ({"weights": [1, 1], "maximum": [0.6]}, "give 2 numbers"),
        ({"weights": [1, 1], "budgets": [90, 10], "maximum": [0.8, 1]}, "change the budget or the bounds"),
        ({"weights": [1, 1], "budgets": [9, None], "minimum": [0.1, 0]}, "give `samples`"),
        ({"weights": [1, 1], "budgets": [9, None], "samples": 100, "minimum": [0.2, 0]}, "change the budget"),
    ],
)
def test_contradictions_name_the_cure(arguments, cure):
    with pytest.raises(ValueError, match=cure):
        Mixture(**arguments)


def test_state_is_small_json_and_damage_is_named():
    stream = Mixture(np.ones(5), [10**9, None, 7, None, 0], samples=10**10, minimum=[0.01, 0, 0, 0, 0])
    stream.schedule([1, 2, 3, 4, 5], 5000)
    stream.take(2000)
    state = stream.state_dict()
    assert len(json.dumps(state)) < 2000
    damages = {
        "version": 2,
        "index": 1999,
        "served": [1, 2],
        "pending": [[10, [1, 1, 1, 1, 1]]],
        "credit": [math.nan] * 5,
        "start": -1,
    }
    for key, value in damages.items():
        with pytest.raises(ValueError, match="load an intact checkpoint, or start a new mixture"):
            Mixture.from_state({**state, key: value})
        with pytest.raises(ValueError, match="intact checkpoint"):
            Mixture.from_state({k: v for k, v in state.items() if k != key})


def test_copies_are_independent_and_skip_is_take_without_words():
    stream = Mixture([1, 2, 3], [20, 30, None], samples=100)
    stream.schedule([3, 2, 1], 30)
    stream.take(10)
    twin, other = stream.copy(), stream.copy()
    want = pairs(stream.take(60))
    twin.schedule([1, 1, 1], 11)
    assert pairs(other.take(60)) == want
    other = Mixture.from_state(twin.state_dict())
    twin.skip(70)
    other.take(70)
    assert twin.state_dict() == other.state_dict()


@pytest.mark.skipif(module.stretch is None, reason="installed without a C++ compiler")
def test_compiled_stretch_refuses_arrays_it_would_misread():
    f, i, out = np.ones(3), np.zeros(3, dtype=np.int64), np.zeros(4, dtype=np.int64)
    good = [f, f * 0, 0, True, i.copy(), i, i - 1, 10, out, out.copy(), 4]
    assert module.stretch(*good) == 4
    for place, bad in [(1, f[:2]), (4, i[:1]), (8, i), (0, f * 0), (8, None)]:
        with pytest.raises(ValueError, match="give"):
            module.stretch(*(bad if k == place else value for k, value in enumerate(good)))
    with pytest.raises(TypeError):
        module.stretch(*(f.astype(np.float32) if k == 0 else value for k, value in enumerate(good)))
