"""--rampup-batch-size of Megatron-DeepSpeed itself: steps of 4, 6 and then 8 samples, on one rank and two, killed and
resumed across a change of the batch size."""

import re

import layouts
import matrix
import numpy as np
import pytest
from planned_jobs import Jobs

from megatron_commute.settings.batches import Batches

BATCHES = Batches(layouts.BATCH, layouts.RAMP)
STEPS = 22
FLOW = "target: {russian: 1}\ncontroller: {law: flow}\n"


@pytest.fixture
def here(scratch, tmp_path):
    assert BATCHES.of_steps(7).tolist() == [4, 4, 4, 6, 6, 8, 8] and BATCHES.begin(STEPS) == 160
    return Jobs(scratch, tmp_path, "rampup")


def drawn(seen):
    return matrix.stream(seen, 1)


def test_killed_across_a_change_of_the_batch_size_the_run_is_one(here):
    """The checkpoint is of step 4, of 6 samples as the next one; from step 5 on they are 8."""
    act, often = ("--commute", here.mixture("act", 3)), ("--save-interval", "4")
    here.add("whole", *act, *often)
    here.add("killed", *act, *often, fault={"rank": 1, "kind": "killed", "step": 6})
    words = {f"--save {here.folder}/again": f"--save {here.folder}/killed"}
    here.add("again", *act, *often, load="killed", words=words)
    here.add(
        "other",
        *act,
        *often,
        load="killed",
        words={"--rampup-batch-size 4": "--rampup-batch-size 6"},
    )
    here.layout = "rampup-single"
    here.add("alone", "--commute", here.data / "fixed.yaml")
    here.layout = "rampup"
    here.add("fixed", "--commute", here.data / "fixed.yaml")
    seen = here.run()
    assert [rank["model"] for rank in seen["again"]] == [rank["model"] for rank in seen["whole"]]
    assert [rank["losses"] for rank in seen["again"]] == [rank["losses"][4:] for rank in seen["whole"]]
    assert here.record("again") == here.record("whole")
    assert drawn(seen["again"]) == drawn(seen["whole"])[BATCHES.begin(4) :]
    assert drawn(seen["alone"]) == drawn(seen["fixed"]) and len(drawn(seen["fixed"])) == 160
    for name in ("whole", "alone", "fixed"):
        end = here.record(name)[-1]
        assert end["step"] == STEPS and list(end["served"].values()) == [96, 16, 48] and "left" not in end
        assert "OTHER SAMPLES" not in here.log(name)
    for line in here.record("whole"):
        assert line.get("sample", 0) == BATCHES.begin(line.get("step", 0))
    assert "the checkpoint stands at sample 160 after 22 steps, which take 168 now" in here.log("other")


def test_law_flow_plans_by_the_rate_of_every_step(here):
    """Rates are those that the host logs; weights change where steps begin; one rank and two draw the same."""
    file = here.folder / "flow.yaml"
    text = (here.data / "fixed.yaml").read_text()
    file.write_text(text[: text.index("controller:")] + FLOW)
    here.add("two", "--commute", file, "--log-interval", "1")
    here.layout = "rampup-single"
    here.add("one", "--commute", file, "--log-interval", "1")
    seen = here.run()
    assert drawn(seen["one"]) == drawn(seen["two"]) and len(drawn(seen["one"])) == 160
    start, *lines = here.record("two")
    assert list(lines[-1]["served"].values()) == [96, 16, 48]
    begins = {BATCHES.begin(step) for step in range(STEPS)}
    assert (
        set(start["flow"]["segments"]["sample"]) <= begins and len(start["flow"]["segments"]["sample"]) > 10
    )
    curves = start["flow"]["curves"]
    assert curves["sample"] == sorted(begins)
    told = [
        float(rate)
        for rate in re.findall(r"learning rate: ([\d.E+-]+)", here.log("two", 1) + here.log("two"))
    ]
    assert len(told) == STEPS  # after a step the host tells the rate of the next one
    np.testing.assert_allclose(curves["rate"][1:], told[:-1], rtol=1e-3)
    assert lines[0]["lr"] == pytest.approx(curves["rate"][1], rel=1e-12)
    assert np.ptp(start["flow"]["segments"]["weights"], axis=0).max() > 0.05
