"""Law flow beside another law, and with another memory: what it would decide is logged, and nothing of it acts."""

import json

import numpy as np
import pytest
from flow_jobs import (
    ACT,
    BATCH,
    FREE,
    SHARES,
    STEPS,
    attached,
    closed_form,
    trained,
    weights_by_step,
    write_data,
)

from megatron_commute.config import ConfigError
from megatron_commute.decide import replay
from megatron_commute.record import log as record


@pytest.fixture
def folder(tmp_path):
    write_data(tmp_path)
    return tmp_path


def test_other_laws_are_shown_beside_it(folder):
    plugin, _ = attached(folder, FREE.replace("law: flow", "law: flow, compare: [tilt, hold]"))
    trained(plugin, end=25)
    probes = [line for line in record.read(folder / "run") if line["event"] == "probe"]
    assert len(probes) == 2 and all(set(line["laws"]) == {"flow", "tilt", "hold"} for line in probes)


@pytest.mark.parametrize("mode", ["shadow", "act", "fixed"])
def test_flow_is_shown_beside_another_law(folder, mode):
    """At every probe what flow would decide for what is left then, by the closed form; nothing of it acts."""
    text = ACT.replace("mode: act", f"mode: {mode}").replace(
        "law: flow", "law: hold, rate: 1, compare: [flow]"
    )
    if mode == "shadow":  # the host's own blend knows no budgets
        text = text.replace("budget: 360", "weight: 0.6").replace("budget: 60", "weight: 0.1")
        text = text.replace("budget: 180", "weight: 0.3")
    plugin, _ = attached(folder, text)
    alone, _ = attached(folder, text.replace(", compare: [flow]", ""), place="alone")
    trained(plugin, end=45)
    trained(alone, end=45)
    assert plugin.seen == alone.seen
    (line,) = (
        line for line in record.read(folder / "run") if line["event"] == "probe" and line["step"] == 30
    )
    assert plugin.hook.state_dict()["flow"] is None and set(line["laws"]) == {"hold", "flow"}
    step = (line["sample"] + plugin.plan.lead) // BATCH
    owed = np.array(SHARES) * (STEPS - step) * BATCH
    expected = closed_form(owed, [0, 1, 0], begin=step)
    assert line["laws"]["flow"]["weights"] == pytest.approx(expected[0], abs=2e-3)
    row = replay.replay(record.read(folder / "run"), "flow")[2]
    assert row.weights == line["laws"]["flow"]["weights"]
    with pytest.raises(ValueError, match=r"rates to come; run with compare: \[flow\]"):
        replay.replay(record.read(folder / "alone"), "flow")


def test_another_memory_holds_by_consent_from_where_the_run_stands(folder):
    plugin, _ = attached(folder, FREE)
    before = weights_by_step(plugin, end=30)
    state = json.dumps(plugin.hook.state_dict())
    other = FREE.replace("law: flow", "law: flow, memory: 5")
    with pytest.raises(ConfigError, match=r"the memory of flow was 2.5, it is 5; put it back"):
        attached(folder, other, state=state)
    again, _ = attached(folder, other, state=state, accept=True)
    after = weights_by_step(again, begin=30)
    owed = np.array([360, 60, 180]) - before.sum(0) * BATCH
    expected = closed_form(owed, [0, 1, 0], begin=30, memory=5.0)
    whole = after.min(1) > 0  # the last sample of a budget leaves nothing of it to the steps that follow
    assert whole[:20].all() and np.abs(after - expected)[whole].max() < 1e-6
    assert again.hook.state_dict()["flow"]["memory"] == 5.0
