"""fp16 with a dynamic loss scale: steps that overflow consume their samples, the record says so, probes are in float32;
and why Megatron's sequence parallelism is refused."""

import agreement
import matrix
import numpy as np
import pytest
from planned_jobs import CUT, Jobs

from megatron_commute.adapters.megatron_deepspeed import model as models
from megatron_commute.record.tally import Tally
from megatron_commute.settings.batches import Batches

FP16 = [row for row in agreement.ROWS if row[0].startswith("fp16")]


def test_skipped_steps_are_counted_for_one_line_and_kept_by_checkpoints():
    tally, again = (
        Tally(domains=1, global_batch=1, micro_batch=1, data_rank=0, data_size=1, group=None)
        for _ in range(2)
    )
    assert tally.skips() == {} and "skipped" not in tally.state_dict()
    tally.skipped += 2
    again.load_state_dict(tally.state_dict())
    assert again.skips() == tally.skips() == {"skipped": 2} and tally.skips() == {}


def test_the_rate_follows_a_scheduler_that_counts_fewer_steps():
    class Scheduler:
        num_steps = num_tokens = 0

        def get_lr(self):
            return self.num_steps + 1e-6 * self.num_tokens

    rate = models.learning_rate(Scheduler(), Batches(8), 32, lambda: 16)
    assert rate(5) == 24 + 1e-6 * 1280 and rate(1) == 0 + 1e-6 * 256


def test_overflowed_steps_on_the_host(scratch, tmp_path):
    here = Jobs(scratch, tmp_path, "fp16")
    here.add("stock", hooked=False)
    here.add("shadow", "--commute", here.data / "shadow.yaml")
    here.add("fixed", "--commute", here.data / "fixed.yaml")
    here.add("cut", "--commute", here.data / "fixed.yaml", *CUT)
    words = {f"--save {tmp_path}/again": f"--save {tmp_path}/cut"}
    here.add("again", "--commute", here.data / "fixed.yaml", load="cut", words=words)
    seen = here.run()
    assert matrix.same(seen["shadow"], seen["stock"], ("losses", "valid", "model"))
    told = [line for line in here.record("shadow") if line["event"] == "loss"][
        :4
    ]  # the last is of the last validation
    log = here.log("stock", 1)
    counts = [int(part.split("|")[0]) for part in log.split("number of skipped iterations:")[1:]]
    assert sum(counts) >= 2 and sum(line.get("skipped", 0) for line in told) == sum(counts)
    assert [line.get("skipped", 0) for line in told] == counts
    rates = [float(part.split("|")[0]) for part in log.split("learning rate:")[1:]]
    np.testing.assert_allclose([line["lr"] for line in told], rates, rtol=1e-3)
    events = [line["event"] for line in here.record("shadow")]
    assert events.count("probe") + events.count("skip") == 4 and events.count("probe") >= 3
    assert list(here.record("fixed")[-1]["served"].values()) == [96, 16, 48]
    assert matrix.stream(seen["fixed"]) == matrix.stream(seen["stock"])
    assert here.record("again") == here.record("fixed")


@pytest.mark.parametrize("mode", ["fixed", "act"])
def test_law_flow_makes_its_plan_again_though_steps_were_left_out(scratch, tmp_path, mode):
    """The scheduler does not count them, so a restart is told of other rates to come."""
    here = Jobs(scratch, tmp_path, "fp16")
    text = (here.data / f"{mode}.yaml").read_text()
    file = tmp_path / "flow.yaml"
    law = "target: {russian: 1}\nprobe: {samples: 8, splits: 2}\ncontroller: {law: flow}\n"
    file.write_text(text[: text.index("probe:")] + law)
    here.add("whole", "--commute", file)
    here.add("cut", "--commute", file, *CUT)
    words = {f"--save {tmp_path}/again": f"--save {tmp_path}/cut"}
    here.add("again", "--commute", file, load="cut", words=words)
    seen = here.run()
    assert any(line.get("skipped") for line in here.record("whole"))
    assert None not in seen["again"] and here.record("again") == here.record("whole")


def test_all_layouts_in_fp16_measure_the_same(scratch):
    wrong = [row for row in agreement.rows(scratch, FP16) if not row["within"]]
    assert len(FP16) == 5 and not wrong


@pytest.mark.parametrize("layout", ["sequence-parallel", "sequence-parallel-pipe"])
def test_why_sequence_parallelism_is_refused(scratch, tmp_path, layout):
    """The untouched host: a GPTModel does not train, a pipeline parts from plain tensor parallelism after a step."""
    here = Jobs(scratch, tmp_path, layout)
    here.add("split", "--exit-interval", "3", hooked=False, seeded=True)
    here.layout = "tp2-pipe"
    here.add("plain", "--exit-interval", "3", hooked=False, seeded=True)
    seen = here.run()
    plain = [float.fromhex(step["lm loss"]) for step in seen["plain"][0]["losses"]]
    if layout == "sequence-parallel":
        assert seen["split"] == [None, None] and "Error: " in here.log("split")
        return
    split = [float.fromhex(step["lm loss"]) for step in seen["split"][0]["losses"]]
    assert split[0] == pytest.approx(plain[0], abs=1e-6)
    assert abs(split[2] - plain[2]) > 1e-4
