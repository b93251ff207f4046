"""Law flow on Megatron-DeepSpeed: planned from the host's own scheduler, resumed as planned, refused at other rates."""

import numpy as np
import pytest
from planned_jobs import CUT, Jobs

LAW = "target: {russian: 1}\nprobe: {samples: 8, splits: 2}\ncontroller: {law: flow}\n"


def rates_of(lines):
    """Learning rate by sample of the loss lines."""
    return {line["sample"]: line["lr"] for line in lines if line["event"] == "loss"}


def test_the_host_tells_its_rates_and_a_cut_run_goes_on_as_planned(scratch, tmp_path):
    here = Jobs(scratch, tmp_path, "zero1")
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
