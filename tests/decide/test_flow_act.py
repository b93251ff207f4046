"""Law flow in mode act: what is left is planned again at every decision; people change its mind half-way."""

import itertools
import json

import flow_jobs
import numpy as np
import pytest
from flow_jobs import (
    ACT,
    BATCH,
    FREE,
    NAMES,
    SHARES,
    STEPS,
    attached,
    closed_form,
    cosine,
    decisions,
    pieces,
    stream,
    trained,
    weights_by_step,
)

from megatron_commute.config import ConfigError
from megatron_commute.decide import control_file, flow, replay
from megatron_commute.decide.steering import Aim
from megatron_commute.record import log as record


@pytest.fixture
def folder(tmp_path):
    flow_jobs.write_data(tmp_path)
    return tmp_path


def test_an_unchanged_run_makes_the_weights_of_its_plan_again(folder):
    fixed = weights_by_step(attached(folder, place="fixed")[0])
    plugin, said = attached(folder, FREE, place="act")
    act = weights_by_step(plugin)
    assert np.abs(act - fixed)[:-1].max() < 1e-9  # in the last step budgets run out sample by sample
    assert plugin.hook.stream.served.tolist() == [360, 60, 180]
    told = decisions(folder / "act")
    assert [line["step"] for line in told] == [0, 10, 20, 30, 40, 50]
    assert not any("UNCALIBRATED" in line for line in said)
    assert stream(folder / "act") == plugin.seen


def test_a_decision_says_what_it_expects_and_by_which_constants(folder):
    plugin, _ = attached(folder, FREE)
    seen = weights_by_step(plugin)
    first, *_, last = decisions(folder / "run")
    rates = np.array([cosine(step) for step in range(STEPS)])
    for line in (first, last):
        told = line["flow"]
        assert told["memory"] == 2.5 and told["ranges"] == pytest.approx([-0.35, 3.15, -0.35])
        assert told["target"] == [0, 1, 0] and told["strength"] == 1.0
        assert told["scale"]["peak"] == pytest.approx(rates.max())
        at = line["effective_sample"] // BATCH
        assert told["flow_left"] == pytest.approx(rates[at:].sum())
        assert (
            told["expected"]["sample"][0] == line["effective_sample"]
            and len(told["expected"]["sample"]) <= 12
        )
    expected = first["flow"]["expected"]
    early = [sample < 540 for sample in expected["sample"]]  # at the end budgets run out sample by sample
    for sample, weights in itertools.compress(
        zip(expected["sample"], expected["weights"], strict=True), early
    ):
        assert seen[int(sample) // BATCH] == pytest.approx(weights, abs=1e-9)  # and so it came
    assert "profile" in first["reason"]


@pytest.mark.parametrize("rate", [0.01, 0.05])
def test_no_weight_moves_further_than_the_rate_in_one_decision_and_budgets_are_exact(folder, rate):
    plugin, _ = attached(folder, ACT.replace("law: flow", f"law: flow, rate: {rate}"))
    weights_by_step(plugin)
    assert plugin.hook.stream.served.tolist() == [360, 60, 180]
    limited = 0
    for line in decisions(folder / "run"):
        before = np.array(line["situation"]["weights"])
        moved = np.abs(np.array([w for _, w in pieces(line)]) - before).max()
        limited += "limited by the rate" in line["reason"]
        if "budgets win" not in line["reason"]:
            assert moved <= rate + 1e-9
    assert limited and stream(folder / "run") == plugin.seen


def test_bounds_hold_and_the_law_stops_where_it_is_told_to(folder):
    text = FREE.replace("rate: 1", "rate: 1, floors: {ru: 0.06}, caps: {ru: 0.15}, freeze: 0.7")
    plugin, _ = attached(folder, text)
    seen = weights_by_step(plugin)
    assert seen[:-3, 1].min() > 0.06 - 1e-9 and seen[:-3, 1].max() < 0.15 + 1e-9
    assert plugin.hook.stream.served.tolist() == [360, 60, 180]
    assert "the law stops at 0.7 of the run" in decisions(folder / "run", everything=True)[-1]["reason"]


def test_a_failed_probe_and_probing_that_is_off_do_not_stop_the_law(folder):
    expected = weights_by_step(attached(folder, FREE, place="whole")[0])
    plugin, _ = attached(folder, FREE, place="failing")
    plugin.hook.draw = lambda *_: (_ for _ in ()).throw(OSError("a disk went away"))
    assert np.array_equal(weights_by_step(plugin), expected)
    lines = record.read(folder / "failing")
    assert [line["step"] for line in lines if line["event"] == "skip"] == [10, 20, 30] and plugin.hook.off
    assert [line["step"] for line in lines if line["event"] == "decision"] == [0, 10, 20, 30, 40, 50]


@pytest.mark.parametrize("stop", [1, 12, 34, 59])
def test_resumed_anywhere_the_record_is_that_of_one_run(folder, stop):
    text = "target: {code: 1}\nfrom: 305\n"
    whole, _ = attached(folder, ACT, place="whole")
    parted, _ = attached(folder, ACT, place="parted")
    for place in ("whole", "parted"):
        (folder / place / control_file.NAME).write_text(text)
    trained(whole)
    trained(parted, end=stop)
    again, _ = attached(folder, ACT, place="parted", state=json.dumps(parted.hook.state_dict()))
    trained(again, begin=stop)
    assert parted.seen + again.seen == whole.seen
    same = [
        [{**line, "timing": None} for line in record.read(folder / place)] for place in ("whole", "parted")
    ]
    assert same[0] == same[1] and stream(folder / "parted") == whole.seen


def test_a_change_of_target_plans_the_rest_as_flow_would(folder):
    """At half of the run: closed form for what is left of every budget, the profile scaled by the planned run."""
    plugin, _ = attached(folder, FREE)
    (folder / "run" / control_file.NAME).write_text("target: {code: 1}\nstrength: 0.5\nfrom: 300\n")
    before = weights_by_step(plugin, end=30)
    owed = np.array([360, 60, 180]) - before.sum(0) * BATCH
    after = weights_by_step(plugin, begin=30)
    expected = closed_form(owed, [0, 0, 1], strength=0.5, begin=30)
    assert np.abs(after - expected)[:-1].max() < 1e-6
    assert plugin.hook.stream.served.tolist() == [360, 60, 180] and stream(folder / "run") == plugin.seen
    (control,) = (line for line in record.read(folder / "run") if line["event"] == "control")
    assert (
        control["effective_sample"] == 300 and control["target"] == [0, 0, 1] and control["strength"] == 0.5
    )
    told = [line for line in decisions(folder / "run") if line["effective_sample"] >= 300]
    assert all(line["flow"]["target"] == [0, 0, 1] for line in told)
    probes = [line for line in record.read(folder / "run") if line["event"] == "probe"]
    assert [line["target"] for line in probes] == [[0, 1, 0]] * 2 + [[0, 0, 1]] * 3


@pytest.mark.parametrize("part", [0.7, 1.3])
def test_another_length_needs_no_plan_and_keeps_budgets_exact(folder, part):
    plugin, _ = attached(folder, FREE)
    trained(plugin, end=30)
    last, steps = plugin.hook.stream.weights, round(STEPS * part)
    state = json.dumps(plugin.hook.state_dict())
    budgets = [round(n * part) for n in (360, 60, 180)]
    text = FREE
    for old, new in zip((360, 60, 180), budgets, strict=True):
        text = text.replace(f"budget: {old},", f"budget: {new},")
    rates = {"rates": lambda step: cosine(step, steps=steps), "steps": steps}
    with pytest.raises(ConfigError, match="the run had 600 samples"):
        attached(folder, text, state=state, **rates)
    owed = np.array(budgets) - np.array(plugin.hook.stream.consumed.target)
    again, _ = attached(folder, text, state=state, accept=True, **rates)
    start = record.read(folder / "run")[0]
    assert start["flow"]["scale"] == json.loads(state)["flow"]["scale"]
    first = decisions(folder / "run")[0]
    assert first["situation"]["weights"] == pytest.approx(last)
    seen = weights_by_step(again, begin=30, end=steps)
    assert again.hook.stream.served.tolist() == budgets
    planned = [cosine(step) for step in range(STEPS)]
    expected = closed_form(owed, [0, 1, 0], begin=30, steps=steps, scale=planned, rates=rates["rates"])
    whole = seen.min(1) > 0  # no budget has run out before its last samples
    assert whole[: len(whole) // 2].all() and np.abs(seen - expected)[whole][:-1].max() < 1e-6


def test_other_rates_need_no_consent_and_are_followed_from_the_next_decision_on(folder):
    plugin, _ = attached(folder, FREE)
    trained(plugin, end=30)
    state = json.dumps(plugin.hook.state_dict())
    again, _ = attached(folder, FREE, state=state, rates=lambda step: 2 * cosine(step) if step < 45 else 1e-5)
    trained(again, begin=30)
    assert again.hook.stream.served.tolist() == [360, 60, 180]
    assert plugin.seen + again.seen == stream(folder / "run")


def test_a_domain_that_joins_by_consent_is_part_of_the_next_decision(folder):
    text = FREE.replace("  code: {path: code, budget: 180, holdout: 64}\n", "").replace(
        "budget: 360", "budget: 540"
    )
    plugin, _ = attached(folder, text)
    trained(plugin, end=30)
    joined = FREE.replace("budget: 360", "budget: 440").replace("budget: 180", "budget: 100")
    again, _ = attached(folder, joined, state=json.dumps(plugin.hook.state_dict()), accept=True)
    trained(again, begin=30)
    assert again.hook.stream.served.tolist() == [440, 60, 100]


def test_freeze_holds_the_weights_at_once(folder):
    plugin, _ = attached(folder, FREE)
    weights_by_step(plugin, end=10)
    (folder / "run" / control_file.NAME).write_text("freeze: true\n")
    seen = weights_by_step(plugin, begin=10)
    assert np.ptp(seen[4:30], axis=0).max() < 1e-12  # at the end budgets win
    assert plugin.hook.stream.served.tolist() == [360, 60, 180]


def test_a_target_of_before_comes_back_with_a_version_without_one(folder):
    plugin, _ = attached(folder, FREE)
    path = folder / "run" / control_file.NAME
    path.write_text("target: {code: 1}\nfrom: 150\n")
    trained(plugin, end=10)
    path.write_text("caps: 1\n")  # before it came into force
    trained(plugin, begin=10)
    expected, _ = attached(folder, FREE, place="other")
    trained(expected)
    assert plugin.seen == expected.seen and stream(folder / "run") == plugin.seen


def test_a_schedule_of_people_takes_the_place_of_the_law_until_a_version_without_it(folder):
    (folder / "late.csv").write_text("at,en,ru,code\n200,0.8,0.1,0.1\n400,0.4,0.1,0.5\n")
    text = FREE.replace("budget: 360", "weight: 0.6").replace("budget: 180", "weight: 0.3")
    plugin, _ = attached(folder, text.replace("budget: 60", "weight: 0.1"))
    path = folder / "run" / control_file.NAME
    path.write_text("schedule: ../late.csv\nfrom: 180\n")
    seen = weights_by_step(plugin, end=50)
    assert seen[20:40] == pytest.approx(np.tile([0.8, 0.1, 0.1], (20, 1)))
    assert seen[40:50] == pytest.approx(np.tile([0.4, 0.1, 0.5], (10, 1)))
    path.write_text("strength: 1\n")
    trained(plugin, begin=50)
    told = decisions(folder / "run", everything=True)
    assert "weights follow the schedule of the control file" in {line["reason"] for line in told}
    assert "flow of what is left" in told[-1]["reason"] and told[-1]["effective_sample"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("schedule: past.csv", "schedule: it names sample 20, before it can hold; write points from sample 140 on"),
        ("schedule: wide.csv", "schedule: from sample 140 on, the schedule asks for "),
        ("schedule: gone.csv", "gone.csv: cannot be read: No such file or directory; name a CSV file"),
        ("schedule: late.csv\nweights: {en: 1}", "schedule: there are weights beside it; write one of the two"),
        ("target: {xx: 1}", "target.xx: there is no such domain; the domains are en, ru, code"),
        ("strength: 11", "strength: got 11; write a number above 0, at most 10"),
        ("strength: 0", "strength: got 0; write a number above 0, at most 10"),
        ("target: {ru: 0.5}", "these sum to 0.5, write shares of the domains that sum to 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_reported_once_and_ignored(folder, content, told):
    (folder / "run").mkdir()
    for name, row in (("past", "20,0.6,0.1,0.3"), ("wide", "400,0.1,0.1,0.8"), ("late", "400,0.6,0.1,0.3")):
        (folder / "run" / f"{name}.csv").write_text(f"at,en,ru,code\n{row}\n")
    plugin, said = attached(folder, FREE)
    trained(plugin, end=10)
    (folder / "run" / control_file.NAME).write_text(content)
    trained(plugin, begin=10)
    (line,) = (line for line in record.read(folder / "run") if line["event"] == "control")
    assert (
        told in line["error"] and "\n" not in line["error"] and sum("IGNORED" in word for word in said) == 1
    )
    expected, _ = attached(folder, FREE, place="other")
    trained(expected)
    assert plugin.seen == expected.seen


def test_a_target_without_held_out_data_and_one_without_samples_are_refused(tmp_path):
    path = tmp_path / control_file.NAME
    path.write_text("target: {ru: 1}")
    limits = {"names": NAMES, "feeds": True}
    with pytest.raises(
        ConfigError, match=r"target.ru: it has no held-out data.*or give the domain a holdout"
    ):
        control_file.read(path, control_file.Limits(**limits, holdouts=(8, 0, 8)))
    with pytest.raises(ConfigError, match=r"target.ru: no samples of it are planned; take it out"):
        control_file.read(path, control_file.Limits(**limits, shares=(0.5, 0.0, 0.5)))
    with pytest.raises(
        ConfigError, match=r"target: no law moves the weights of this run; leave it out, or run in mode act"
    ):
        control_file.read(path, control_file.Limits(**limits, acts=False))


def test_a_complaint_is_not_told_again_after_a_restart_and_a_record_repeats_its_decisions(folder):
    slow = ACT.replace("law: flow", "law: flow, rate: 0.05")
    plugin, _ = attached(folder, slow)
    (folder / "run" / control_file.NAME).write_text("strength: 11\n")
    trained(plugin, end=30)
    again, said = attached(folder, slow, state=json.dumps(plugin.hook.state_dict()))
    trained(again, begin=30)
    assert [line["step"] for line in record.read(folder / "run") if line["event"] == "control"] == [0]
    assert not any("IGNORED" in line for line in said)
    assert replay.told(folder / "run").repeated == (6, 6)
    slower = replay.told(folder / "run", texts=["rate=0.01"])
    moved = [np.abs(np.array(row.weights) - row.before).max() for row in slower.decisions if row.weights]
    assert len(moved) > 3 and max(moved[:4]) < 0.01 + 1e-9


@pytest.mark.parametrize("seed", range(30))
def test_budgets_and_bounds_hold_in_any_run(seed):
    """Random shares, endless domains, bounds, rates of change, intervals and changes of target: driven to the end."""
    rng = np.random.default_rng(seed)
    K, steps, every = int(rng.integers(2, 6)), int(rng.integers(20, 200)), int(rng.integers(3, 40))
    shares, endless = rng.dirichlet(2 * np.ones(K)), rng.random(K) < 0.3
    minimum = shares * rng.choice([0.0, 0.3, 0.6])
    maximum = np.minimum(shares * rng.choice([1.5, 3.0, 100.0]), 1.0)
    steering = flow_jobs.steering(
        shares, endless, minimum, maximum, steps, every, rate=rng.choice([0.01, 0.05, 1.0])
    )
    stream, batch = steering.stream, steering.stream.batches.full
    outcomes = steering.begin()
    for step in range(steps):
        if step == steps // 2:
            steering.later = (steering.effective(), Aim(tuple(np.eye(K)[int(rng.integers(K))])))
        if step and step % every == 0:
            outcomes += steering.decide(None)
        stream.take()
    budgets = steering.plan.budgets
    served = stream.served
    assert (
        all(b is None or n == b for b, n in zip(budgets, served, strict=True))
        and served.sum() == steps * batch
    )
    for decision, _, _ in outcomes:
        assert "failed" not in decision.reason
        for weights in [] if decision.pieces is None else decision.pieces:
            assert (weights > minimum - 1e-2).all() and (
                weights < maximum + 1e-2
            ).all()  # a sample's rounding
            assert weights.sum() == pytest.approx(1, abs=1e-9)


def test_shares_as_target_keep_the_planned_mixture(folder):
    plugin, _ = attached(folder, FREE.replace("target: {ru: 1}\n", ""))
    seen = weights_by_step(plugin)
    assert np.abs(seen[:-1] - SHARES).max() < 1e-12
    assert all(flow.SAME_TARGET in line["reason"] for line in decisions(folder / "run", everything=True))
