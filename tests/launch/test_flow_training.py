"""Law flow in whole training jobs on two gloo ranks: killed and resumed, refused at other rates, attached on the way."""

import jobs
import numpy as np
import pytest
import ranks

from megatron_commute.record import log as record

FLOW = "target: {russian: 1}\nprobe: {samples: 16, splits: 4}\ncontroller: {law: flow}"
ITERS = 24


def lines(folder):
    return [{key: value for key, value in line.items() if key != "timing"} for line in record.read(folder)]


def test_a_killed_run_goes_on_as_planned_and_another_rate_is_refused(tmp_path):
    jobs.write_data(tmp_path)
    mixture = jobs.write_mixture(tmp_path, mode="fixed", iters=ITERS, extra=FLOW)

    def argv(name, *more):
        kept = ["--save", tmp_path / name, "--load", tmp_path / name, "--save-interval", 6]
        wsd = ["--lr-decay-style", "WSD", "--lr-wsd-decay-iters", 5]
        return jobs.flags(tmp_path, "--commute", mixture, *kept, *wsd, *more, iters=ITERS)

    with pytest.raises(RuntimeError, match="died without a word"):
        ranks.run(jobs.train, 2, [argv("whole"), argv("killed")], 15, timeout=300)
    outcome = ranks.run(
        jobs.outcomes, 2, [(argv("killed", "--lr", "2e-3"), None), (argv("killed"), None)], timeout=300
    )
    assert outcome == [[2, "finished"]] * 2
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    end = lines(tmp_path / "whole")[-1]
    assert end["event"] == "end" and end["served"] == {"english": 115, "russian": 19, "code": 58}
    weights = [line["weights"]["russian"] for line in lines(tmp_path / "whole") if line["event"] == "loss"]
    assert max(weights) > 2 * min(weights) and np.argmax(weights) == 4  # the decay begins at step 19


def test_a_run_of_the_stock_blend_is_taken_over_by_law_flow(tmp_path):
    jobs.write_data(tmp_path)
    mixture = jobs.write_mixture(tmp_path, mode="fixed", iters=ITERS, extra=FLOW)
    save = ["--save", tmp_path / "run", "--load", tmp_path / "run", "--save-interval", 6]
    stock = jobs.flags(tmp_path, *save, iters=ITERS)
    flow = jobs.flags(tmp_path, *save, "--commute", mixture, "--commute-attach", iters=ITERS)
    assert (
        ranks.run(jobs.outcomes, 2, [(stock, 12), (flow, None)], timeout=300) == [["stopped", "finished"]] * 2
    )
    start, *_, end = lines(tmp_path / "run")
    assert start["flow"]["begin"] == 12 and sum(start["flow"]["used"]) == 96
    assert list(end["served"].values()) == start["budgets"]
