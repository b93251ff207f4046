"""Law flow in a run: planned at the start, kept in the state, the same wherever it resumes, refused with its cure."""

import json

import numpy as np
import pytest
from flow_jobs import BATCH, MIXTURE, SHARES, STEPS, attached, cosine, trained, write_data

from megatron_commute.config import ConfigError
from megatron_commute.decide import flow
from megatron_commute.record import log as record


@pytest.fixture
def folder(tmp_path):
    write_data(tmp_path)
    return tmp_path


def start_line(folder, place="run"):
    return next(line for line in record.read(folder / place) if line["event"] == "start")


def test_the_run_follows_the_planned_schedule_to_the_last_sample(folder):
    plugin, said = attached(folder)
    expected = flow.planned(
        rates=[cosine(step) for step in range(STEPS)], batches=[BATCH] * STEPS, budgets=[360, 60, 180], weights=SHARES,
        target=[0, 1, 0], low=[0.0] * 3, high=[1.0] * 3,
    )  # fmt: skip
    for (at, weights), (when, other) in zip(plugin.plan.schedule, expected.changes, strict=True):
        assert at == when and weights == pytest.approx(other, abs=1e-12)
    seen = np.array(trained(plugin))
    assert plugin.hook.stream.served.tolist() == [360, 60, 180]
    assert (seen[:60] == 1).sum() == 6  # kept at its share
    expected = np.repeat(expected.weights[:, 1], np.diff(expected.edges) * BATCH)
    assert np.abs(np.cumsum(seen == 1) - np.cumsum(expected)).max() <= 2
    assert any(line.startswith("law flow: weights en ") for line in said)
    told = start_line(folder)["flow"]
    assert told["ranges"] == pytest.approx([-0.35, 3.15, -0.35]) and told["notes"] == []
    assert len(told["segments"]["weights"]) == len(told["segments"]["sample"])
    assert told["curves"]["rate"] == pytest.approx([cosine(step) for step in range(STEPS)])
    assert max(told["curves"]["profile"]) == 1.0
    probes = [line for line in record.read(folder / "run") if line["event"] == "probe"]
    assert len(probes) == 2 and all(line["effective_sample"] is None for line in probes)
    assert probes[0]["laws"]["flow"] == {"weights": None, "reason": "weights follow the plan of law flow"}


@pytest.mark.parametrize("stop", [1, 4, 31, 59])
def test_a_resumed_run_makes_the_same_weights_and_samples(folder, stop):
    whole = attached(folder)[0]
    seen = trained(whole)
    parted = attached(folder, place="parted")[0]
    first = trained(parted, end=stop)
    state = json.dumps(parted.hook.state_dict())
    assert len(json.dumps(json.loads(state)["flow"])) < 1000
    again = attached(folder, state=state, place="parted")[0]
    for (at, weights), (when, other) in zip(again.plan.schedule, whole.plan.schedule, strict=True):
        assert at == when and np.abs(weights - other).max() < 1e-9
    assert first + trained(again, begin=stop) == seen
    assert record.read(folder / "parted")[0]["flow"] == start_line(folder)["flow"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rates": lambda step: cosine(step, lr=2e-3)}, r"other learning rates \(peak 0.001, now 0.002\); put it back"),
        ({"rates": lambda step: cosine(step, steps=90)}, r"other learning rates \(their sum "),
        ({"text": MIXTURE.replace("{ru: 1}", "{code: 1}")}, "the target of flow was 0 1 0, it is 0 0 1; put it back"),
        ({"text": MIXTURE.replace("flow}", "flow, strength: 0.5}")}, "the strength of flow was 1, it is 0.5"),
        ({"text": MIXTURE.replace("flow}", "flow, memory: 5}")}, "the memory of flow was 2.5, it is 5; put it back"),
        ({"text": MIXTURE.replace("flow}", "hold}")}, "the law was flow, it is hold"),
        ({"text": MIXTURE.replace("budget: 360", "budget: 340").replace("budget: 60", "budget: 80")}, "budget of en"),
    ],
)  # fmt: skip
def test_another_run_than_the_planned_one_is_refused_and_planned_anew_by_consent(folder, change, told):
    plugin = attached(folder)[0]
    trained(plugin, end=30)
    served, state = plugin.hook.stream.served, json.dumps(plugin.hook.state_dict())
    with pytest.raises(ConfigError, match=told) as error:
        attached(folder, state=state, **change)
    assert "--commute-accept" in str(error.value) and "\n" not in str(error.value)
    again = attached(folder, state=state, accept=True, **change)[0]
    trained(again, begin=30)
    assert again.hook.stream.served.tolist() == list(again.plan.budgets)
    if again.flow is None:  # what is left of every budget, evenly
        left = (np.array([360, 60, 180]) - served) / 300
        lines = [line for line in record.read(folder / "run") if line["event"] == "loss"]
        for line in lines[:-2]:  # at the end budgets run out sample by sample
            assert list(line["weights"].values()) == pytest.approx(left, abs=1e-9)
        return
    assert again.plan.schedule[0][0] == 300 and start_line(folder)["flow"]["begin"] == 30
    assert start_line(folder)["flow"]["used"] == served.tolist()
    parted = attached(folder, state=state, accept=True, place="parted", **change)[
        0
    ]  # and it resumes as it was planned
    trained(parted, begin=30, end=40)
    after = attached(folder, state=json.dumps(parted.hook.state_dict()), place="parted", **change)[0]
    for (at, weights), (when, other) in zip(after.plan.schedule, again.plan.schedule, strict=True):
        assert at == when and np.abs(weights - other).max() < 1e-9


def test_a_schedule_file_takes_the_place_of_the_plan_by_consent(folder):
    plugin = attached(folder)[0]
    trained(plugin, end=30)
    (folder / "late.csv").write_text("at,en,ru,code\n540,0.6,0.1,0.3\n")
    text = MIXTURE.replace("mode: fixed", "mode: fixed\nschedule: late.csv").replace("flow}", "schedule}")
    again = attached(folder, text, state=json.dumps(plugin.hook.state_dict()), accept=True)[0]
    trained(again, begin=30, end=36)
    lines = [line["weights"] for line in record.read(folder / "run") if line["event"] == "loss"]
    assert len(lines) == 6 and all(list(weights.values()) == pytest.approx(SHARES) for weights in lines)


def test_a_run_under_another_law_takes_flow_up_by_consent(folder):
    plugin = attached(folder, MIXTURE.replace("flow}", "hold}"))[0]
    trained(plugin, end=30)
    state = json.dumps(plugin.hook.state_dict())
    with pytest.raises(ConfigError, match="the law was not flow; put it back"):
        attached(folder, state=state)
    again = attached(folder, state=state, accept=True)[0]
    seen = np.array(trained(again, begin=30))
    assert again.hook.stream.served.tolist() == [360, 60, 180] and (seen == 1).sum() == 30
    assert (seen[:100] == 1).sum() > 12  # under a cosine a sample of the second half counts most at its start


def test_domains_that_come_and_go_are_planned_from_what_is_left(folder):
    plugin = attached(folder)[0]
    trained(plugin, end=30)
    state = json.dumps(plugin.hook.state_dict())
    gone = MIXTURE.replace("  code: {path: code, budget: 180, holdout: 64}\n", "").replace(
        "budget: 360", "weight: 0.9"
    )
    again = attached(folder, gone, state=state, accept=True)[0]
    trained(again, begin=30)
    assert again.hook.stream.served[1] == 60 and again.hook.stream.index == 600


def test_the_budget_shares_as_target_change_nothing_and_say_so(folder):
    plugin, said = attached(folder, MIXTURE.replace("target: {ru: 1}\n", ""))
    ((at, weights),) = plugin.plan.schedule
    assert at == 0 and weights == pytest.approx(SHARES, abs=1e-15)
    assert f"note: {flow.SAME_TARGET}" in said
    line = start_line(folder)
    assert line["flow"]["notes"] == [flow.SAME_TARGET] and flow.SAME_TARGET in line["warnings"]


def test_floors_and_caps_bound_the_plan(folder):
    text = MIXTURE.replace("flow}", "flow, floors: {ru: 0.06}, caps: {ru: 0.15}}")
    weights = np.array([w for _, w in attached(folder, text)[0].plan.schedule])[:, 1]
    assert weights.min() == pytest.approx(0.06, abs=1e-12) and weights.max() == pytest.approx(0.15, abs=1e-12)


def untold(step):
    raise RuntimeError("no scheduler")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rates": lambda step: None}, "controller.law: flow needs the learning rate of every step, the host does not tell"),
        ({"rates": untold}, "that of step 0: RuntimeError: no scheduler; give it --lr and --lr-"),
        ({"rates": lambda step: float("nan") if step == 7 else 1.0}, "does not tell that of step 7; give it --lr"),
        ({"rates": lambda step: 1e-3 * (step + 1)}, "still rises at the last of 60 steps: the run is shorter than its warm"),
        ({"rates": lambda step: 0.0}, "all learning rates are 0, so no step counts; set --lr, or choose law hold"),
        ({"text": MIXTURE.replace("{law: flow}", "{law: flow, strength: 11}")}, "strength 11.0; write a number above 0"),
        ({"text": MIXTURE.replace("{law: flow}", "{law: flow, caps: {ru: 0.05}}")}, "controller.caps: 0.05 leaves out"),
        ({"text": MIXTURE.replace("{ru: 1}", "each")}, "target: law flow plans for one target; write shares"),
        ({"text": MIXTURE.replace("mode: fixed", "mode: shadow")}, "controller.law: flow plans weights, which"),
        ({"text": MIXTURE.replace("mode: fixed", "mode: fixed\nschedule: s.csv")}, "schedule: law flow plans the weights;"),
        ({"text": MIXTURE.replace("law: flow", "law: hold, compare: [flow]"), "rates": untold},
            "controller.compare: flow needs the learning rate of every step, the host does not tell that of step 0: "
            "RuntimeError: no scheduler; give it --lr and --lr-decay-style, or take flow out of compare"),
        ({"text": MIXTURE.replace("budget: 60", "weight: 0").replace("budget: 360", "weight: 0.7")
            .replace("budget: 180", "weight: 0.3")}, "has a target but no samples; give it a budget"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_refused_before_anything_is_written(folder, change, told):
    (folder / "s.csv").write_text("at,en,ru,code\n0,0.6,0.1,0.3\n")
    with pytest.raises(ConfigError) as error:
        attached(folder, **change)
    assert told in str(error.value) and "\n" not in str(error.value) and not (folder / "run").exists()
