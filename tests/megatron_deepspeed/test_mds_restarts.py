"""Runs of Megatron-DeepSpeed cut, taken over, killed or full of faults of the plug-in's own, against runs without it."""

import matrix
import pytest
from planned_jobs import CUT, Jobs


@pytest.fixture
def jobs(scratch, tmp_path):
    return lambda layout: Jobs(scratch, tmp_path, layout)


def test_rotary_tables_of_training_stay_in_its_precision(jobs):
    """A probe before the first step of a resumed run comes to Megatron's global tables before training does."""
    here = jobs("bf16-rope")
    file = here.mixture("shadow", 5)
    here.add("stock", hooked=False)
    here.add("stock-cut", *CUT, hooked=False)
    here.add("stock-resumed", hooked=False, load="stock-cut")
    here.add("shadow", "--commute", file)
    here.add("cut", "--commute", file, *CUT)
    here.add(
        "resumed",
        "--commute",
        file,
        load="cut",
        words={f"--save {here.folder}/resumed": f"--save {here.folder}/cut"},
    )
    seen = here.run()
    assert matrix.same(seen["shadow"], seen["stock"])
    assert matrix.same(seen["resumed"], seen["stock-resumed"])
    assert here.record("resumed") == here.record("shadow")
    assert [line["step"] for line in here.record("shadow") if line["event"] == "probe"] == [5, 10, 15]


def test_a_run_measured_in_samples(jobs):
    here = jobs("zero1")
    words = {"--train-iters 20": "--train-samples 160", "--lr-warmup-iters 2": "--lr-warmup-samples 16"}
    here.add("steps", "--commute", here.data / "shadow.yaml")
    here.add("stock", hooked=False, words=words)
    here.add("shadow", "--commute", here.data / "shadow.yaml", words=words)
    here.add("fixed", "--commute", here.data / "fixed.yaml", words=words)
    seen = here.run()
    assert matrix.same(seen["shadow"], seen["stock"]) and matrix.same(seen["shadow"], seen["steps"])
    assert here.record("shadow") == here.record("steps")
    assert seen["fixed"][0] and matrix.stream(seen["fixed"]) == matrix.stream(seen["stock"])


def test_a_run_that_began_without_the_plug_in_is_taken_over(jobs):
    here = jobs("zero1")
    here.add("cut", *CUT)
    here.add("stock", load="cut")
    here.add("refused", "--commute", here.data / "shadow.yaml", load="cut")
    here.add("shadow", "--commute", here.data / "shadow.yaml", "--commute-attach", load="cut")
    here.add("fixed", "--commute", here.data / "fixed.yaml", "--commute-attach", load="cut")
    seen = here.run()
    assert matrix.same(seen["shadow"], seen["stock"])
    assert "add --commute-attach" in here.log("refused") and not seen["refused"][0]["losses"]
    for name in ("shadow", "fixed"):
        begun = here.record(name)[0]
        assert (
            begun["event"] == "start"
            and begun["sample"] == 80
            and "taken over at sample 80" in begun["news"][0]
        )
        assert "THE LOADER BROUGHT OTHER SAMPLES" not in here.log(name)
    served = here.record("fixed")[-1]["served"]
    assert list(served.values()) == [96, 16, 48]  # budgets count what the stock blend had served


@pytest.mark.parametrize("layout", ["zero1", "pp2"])
def test_a_rank_killed_in_a_probe(jobs, layout):
    """The survivor leaves word, the restart skips that probe and goes on; in mode shadow training sees nothing of it."""
    here = jobs(layout)
    file = here.mixture("shadow", 4)
    often = ("--save-interval", "5")
    here.add("stock", *often, hooked=False)
    here.add("killed", "--commute", file, *often, fault={"rank": 1, "kind": "kill", "probe": 2})
    words = {f"--save {here.folder}/again": f"--save {here.folder}/killed"}
    here.add("again", "--commute", file, *often, load="killed", words=words)
    seen = here.run()
    assert "has lost the others" in here.log("killed") and "inside the probe at step 8" in here.log("killed")
    assert "resumes at the beginning" in here.log("killed")  # it had no --load
    told = [
        (line["event"], line["step"]) for line in here.record("again") if line["event"] in ("probe", "skip")
    ]
    assert told == [("probe", 4), ("skip", 8), ("probe", 12), ("probe", 16)]
    assert [r["losses"] for r in seen["again"]] == [r["losses"][5:] for r in seen["stock"]]
    assert [r["model"] for r in seen["again"]] == [r["model"] for r in seen["stock"]]
    last = [line for line in here.record("again") if "fingerprint" in line][-1]
    assert last["sample"] == 160


@pytest.mark.parametrize("layout", ["zero1", "pp2"])
def test_faults_of_the_plug_in_s_own_never_touch_training(jobs, layout):
    here = jobs(layout)
    here.add("stock", hooked=False)
    board = ("--tensorboard-dir", str(here.folder / "board"))
    here.add("ours", "--commute", here.data / "shadow.yaml", *board, fault={"kind": "ours"})
    seen = here.run()
    assert matrix.same(seen["ours"], seen["stock"])
    told = here.log("ours") + here.log("ours", 1)
    for words in ("the decision log could not be written", "the report was not written", "losses of domains are not seen",
                  "samples are not checked", "NO STATE OF --commute IN THIS CHECKPOINT", "no more scalars"):  # fmt: skip
        assert words in told, words


def test_a_run_branches_into_another_folder(jobs):
    """--load A --save B, twice: training is that of a run that went on in A, the record of B begins where it came from."""
    here = jobs("zero1")
    file = ("--commute", here.data / "fixed.yaml")
    here.add("whole", *file)
    here.add("a", *file, *CUT)
    here.add("b", *file, "--exit-interval", "15", load="a")
    words = {f"--save {here.folder}/again": f"--save {here.folder}/b"}
    here.add("again", *file, load="b", words=words)
    seen = here.run()
    assert [r["model"] for r in seen["again"]] == [r["model"] for r in seen["whole"]]
    found, whole = here.record("b"), here.record("whole")
    assert found[0]["event"] == "start" and found[0]["sample"] == 80
    source = here.folder / "a/save"
    assert found[0]["news"] == [f"branched at sample 80 from {source}, whose record has what came before"]
    assert found[1:] == [line for line in whole[1:] if line["step"] > 10 or line["event"] == "end"]
    assert here.record("a")[-1]["left"]["samples"] == 80
    assert f"note: branched at sample 80 from {source}" in here.log("b")
