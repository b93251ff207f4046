"""How long a run is follows from whichever flag ends it, and a job that ends early says what is left."""

import json
from types import SimpleNamespace

import pytest
from planned_jobs import Jobs

from megatron_commute.adapters.megatron_deepspeed import length
from megatron_commute.config import ConfigError, Run
from megatron_commute.record import lines

TOKENS = 160 * 32  # of 20 steps of 8 sequences
ITERS = "--train-iters 20 --lr-warmup-iters 2"


def arguments(**given):
    plain = {"train_iters": None, "train_samples": None, "train_tokens": None, "consumed_train_tokens": 0}
    plain |= {"rampup_batch_size": None, "iteration": 0}
    return SimpleNamespace(**{**plain, "global_batch_size": 8, "seq_length": 32, "save": None, **given})


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({"train_iters": 20}, 20),
        ({"train_samples": 167}, 20),  # the host drops a part of a batch
        ({"train_samples": 10**9, "train_tokens": TOKENS}, 20),
        ({"train_samples": 10**9, "train_tokens": TOKENS - 1}, 20),  # a step begun is a step done
        ({"train_samples": 10**9, "train_tokens": TOKENS + 1}, 21),
        ({"train_iters": 20, "train_tokens": 10**12}, 20),
    ],
)
def test_the_steps_that_the_host_will_take(given, steps):
    """Against the condition of the host's loop, counted step by step."""
    args = arguments(**given)
    assert length.steps_of_run(args) == steps
    iters, taken, tokens = args.train_iters or args.train_samples // 8, 0, 0
    while taken < iters and (args.train_tokens is None or tokens < args.train_tokens):
        taken, tokens = taken + 1, tokens + 8 * 32
    assert taken == steps


@pytest.mark.parametrize("samples", [160, 167, 161, 90])
@pytest.mark.parametrize("tokens", [None, 100 * 32, 99 * 32 + 1, 3 * 32])
def test_the_steps_under_a_ramp_up(samples, tokens):
    """Against the host's count of steps and the condition of its loop: 4, 4, 4, 6, 6, then 8 samples."""
    args = arguments(train_samples=samples, train_tokens=tokens, rampup_batch_size=["4", "2", "24"])
    sizes = [4, 4, 4, 6, 6] + [8] * 40
    counted = next(n for n in range(40) if sum(sizes[:n]) > 24)
    iters = counted + (samples - sum(sizes[:counted])) // 8
    taken = 0
    while taken < iters and (tokens is None or sum(sizes[:taken]) * 32 < tokens):
        taken += 1
    assert length.steps_of_run(args) == taken


def test_a_checkpoint_of_other_batches_is_refused():
    run = Run(seq_length=32, global_batch=8, micro_batch=2, data_parallel=2, train_iters=20)
    with pytest.raises(
        ConfigError, match="at sample 64 after 10 steps, which take 80 now; write it, and --ramp"
    ):
        length.refuse_other_steps(arguments(iteration=10), run, 64)


def test_flags_that_the_host_cannot_begin_with():
    with pytest.raises(ConfigError, match=r"--train-tokens: .*; add --train-samples 160$"):
        length.steps_of_run(arguments(train_tokens=TOKENS))
    with pytest.raises(ConfigError, match="--train-iters: missing"):
        length.steps_of_run(arguments())


def test_a_checkpoint_that_counted_other_tokens_is_refused_with_the_number_that_fits():
    args = arguments(train_iters=10**6, train_tokens=TOKENS, consumed_train_tokens=80 * 32, iteration=10)
    run = Run(seq_length=32, global_batch=8, micro_batch=2, data_parallel=2, train_iters=20)
    length.refuse_other_steps(args, run, 80)
    args.consumed_train_tokens = 80 * 16  # 80 samples of half the length
    with pytest.raises(
        ConfigError, match=f"end at step 25, not 20; write --train-tokens {80 * 16 + 80 * 32}"
    ):
        length.refuse_other_steps(args, run, 80)
    args.train_tokens = 80 * 16 + 80 * 32
    length.refuse_other_steps(args, run, 80)


def test_what_is_left_in_words():
    plan = SimpleNamespace(names=("en", "ru"), budgets=(96, None), samples=160)
    assert lines.left(plan, 160, [96, 64]) is None
    left = lines.left(plan, 80, [50, 30])
    assert left == {"samples": 80, "budgets": {"en": 46}}
    assert lines.left_words(left, plan, 80).endswith("sample 80 of 160; left of the budgets: en 46 of 96")


def test_a_run_ends_by_tokens_with_exact_budgets_and_its_report(scratch, tmp_path):
    here = Jobs(scratch, tmp_path, "zero1")
    samples = "--lr-warmup-samples 16"
    official = {ITERS: f"--train-samples 100000 --train-tokens {TOKENS} {samples}"}
    here.add("steps", "--commute", here.data / "fixed.yaml")
    here.add("tokens", "--commute", here.data / "fixed.yaml", words=official)
    alone = {ITERS: f"--train-tokens {TOKENS} {samples}"}
    here.add("alone", "--commute", here.data / "fixed.yaml", words=alone)
    early = ("--exit-interval", "6")
    here.add("early", "--commute", here.data / "fixed.yaml", *early, words=official)
    late = {**official, f"--save {tmp_path}/again": f"--save {tmp_path}/early"}
    here.add("again", "--commute", here.data / "fixed.yaml", load="early", words=late)
    here.run()
    end = here.record("tokens")[-1]
    assert end["event"] == "end" and list(end["served"].values()) == [96, 16, 48] and "left" not in end
    assert [line for line in here.record("tokens") if line["event"] == "loss"][-1]["fingerprint"] == [
        line for line in here.record("steps") if line["event"] == "loss"
    ][-1]["fingerprint"]
    assert (tmp_path / "tokens/save/report.html").exists()
    assert json.loads((tmp_path / "alone/codes.json").read_text()) == [2, 2]
    assert "add --train-samples 160" in here.log("alone")

    told = here.log("early")
    assert "THE RUN ENDED EARLY, at sample 48 of 160; left of the budgets: english 67 of 96" in told
    assert f"start the same command with --load {tmp_path}/early/save to go on" in told
    assert (tmp_path / "early/save/report.html").exists()
    discarded = (tmp_path / "early/save/commute.jsonl.discarded-1").read_text()
    assert json.loads(discarded.splitlines()[-1])["left"]["samples"] == 112
    assert here.record("again") == here.record("tokens")
