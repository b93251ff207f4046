"""Law flow on Megatron-DeepSpeed: planned from the host's own scheduler, resumed as planned, refused at other rates; in mode
act made again from what is left, with a change of target while it goes on."""

import matrix
import numpy as np
import pytest
from flow_jobs import stream
from planned_jobs import CUT, Jobs

from megatron_commute.decide import control_file

ACT = "target: {russian: 1}\nprobe: {samples: 8, splits: 2}\ncontroller: {rate: 0.2}\n"  # the default law
CHANGE = "target: {code: 1}\nfrom: 90\n"  # holds from sample 96, a global batch
LAYOUTS = ("zero1", "tp2", "pp2")
LAW = "target: {russian: 1}\nprobe: {samples: 8, splits: 2}\ncontroller: {law: flow}\n"


def rates_of(lines):
    """Learning rate by sample of the loss lines."""
    return {line["sample"]: line["lr"] for line in lines if line["event"] == "loss"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_host_tells_its_rates_and_a_cut_run_goes_on_as_planned(scratch, tmp_path, layout):
    here = Jobs(scratch, tmp_path, layout)
    text = (here.data / "fixed.yaml").read_text()
    file = tmp_path / "flow.yaml"
    file.write_text(text[: text.index("probe:")] + LAW)
    style = ("--lr-decay-style", "cosine")
    here.add("whole", "--commute", file, *style)
    here.add("cut", "--commute", file, *style, *CUT)
    words = {f"--save {here.folder}/other": f"--save {here.folder}/cut"}
    here.add(
        "other",
        "--commute",
        file,
        "--lr-decay-style",
        "linear",
        "--override-opt_param-scheduler",
        load="cut",
        words=words,
    )
    words = {f"--save {here.folder}/again": f"--save {here.folder}/cut"}
    here.add("again", "--commute", file, *style, load="cut", words=words)
    here.run()
    assert "planned under other learning rates (" in here.log("other") and "--commute-accept" in here.log(
        "other"
    )
    assert here.record("again") == here.record("whole")
    start, *_, end = here.record("whole")
    assert list(end["served"].values()) == start["budgets"]
    curve = dict(zip(start["flow"]["curves"]["sample"], start["flow"]["curves"]["rate"], strict=True))
    told = rates_of(here.record("whole"))
    assert told and all(
        curve[sample] == pytest.approx(rate) for sample, rate in told.items() if sample in curve
    )
    weights = np.array(start["flow"]["segments"]["weights"])[:, 1]
    assert weights.max() > 2 * weights.min()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_target_changes_while_the_run_goes_on_and_a_cut_run_follows_it(scratch, tmp_path, layout):
    here = Jobs(scratch, tmp_path, layout)
    text = (here.data / "act.yaml").read_text()
    file = tmp_path / "act.yaml"
    file.write_text(text[: text.index("probe:")] + ACT)
    style = ("--lr-decay-style", "cosine")
    here.add("whole", "--commute", file, *style)
    here.add("cut", "--commute", file, *style, *CUT)
    words = {f"--save {here.folder}/again": f"--save {here.folder}/cut"}
    here.add("again", "--commute", file, *style, load="cut", words=words)
    for name in ("whole", "cut"):
        (here.folder / name / "save" / control_file.NAME).write_text(CHANGE)
    seen = here.run()
    lines = here.record("whole")
    assert here.record("again") == lines
    (control,) = (line for line in lines if line["event"] == "control")
    assert control["effective_sample"] == 96 and control["target"] == [0, 0, 1]
    assert list(lines[-1]["served"].values()) == lines[0]["budgets"]
    brought = matrix.stream(seen["whole"])
    assert [tuple(key) for key in brought] == stream(here.folder / "whole" / "save")
    decided = [line for line in lines if line["event"] in ("probe", "decision") and line.get("flow")]
    before, after = (
        [line["flow"]["target"] for line in decided if (line["effective_sample"] < 96) == early]
        for early in (True, False)
    )
    assert before and all(target == [0, 1, 0] for target in before)
    assert after and all(target == [0, 0, 1] for target in after)
    assert "UNCALIBRATED" not in here.log("whole") and "OTHER SAMPLES" not in here.log("whole")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_killed_in_a_probe_after_the_change_of_target(scratch, tmp_path, layout):
    """The restart skips that probe, and the law decides without it: budgets exact, the stream that of the record."""
    here = Jobs(scratch, tmp_path, layout)
    text = (here.data / "act.yaml").read_text()
    file = tmp_path / "act.yaml"
    file.write_text(text[: text.index("probe:")] + ACT)
    flags = ("--commute", file, "--lr-decay-style", "cosine", "--save-interval", "5")
    here.add("killed", *flags, fault={"rank": 1, "kind": "kill", "probe": 3})
    words = {f"--save {here.folder}/again": f"--save {here.folder}/killed"}
    here.add("again", *flags, load="killed", words=words)
    place = here.folder / "killed" / "save"
    (place / control_file.NAME).write_text(CHANGE)
    seen = here.run()
    lines = here.record("again")
    (skip,) = (line for line in lines if line["event"] == "skip")
    decided = [line["step"] for line in lines if line["event"] == "decision"]
    assert skip["step"] == 12 and decided.count(12) == 1
    assert list(lines[-1]["served"].values()) == lines[0]["budgets"]
    brought = [tuple(key) for key in matrix.stream(seen["again"])]
    assert brought == stream(place)[-len(brought) :] and len(brought) == 80
    assert "OTHER SAMPLES" not in here.log("again")
