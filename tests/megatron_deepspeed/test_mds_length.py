"""How long a run is follows from whichever flag ends it, and a job that ends early says what is left."""

import json
from types import SimpleNamespace

import pytest
from planned_jobs import Jobs

from megatron_commute.adapters.megatron_deepspeed import length
from megatron_commute.config import ConfigError
from megatron_commute.record import lines

TOKENS = 160 * 32  # of 20 steps of 8 sequences


def arguments(**given):
    plain = {"train_iters": None, "train_samples": None, "train_tokens": None, "consumed_train_tokens": 0}
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


def test_flags_that_the_host_cannot_begin_with():
    with pytest.raises(ConfigError, match=r"--train-tokens: .*; add --train-samples 160$"):
        length.steps_of_run(arguments(train_tokens=TOKENS))
    with pytest.raises(ConfigError, match="--train-iters: missing"):
        length.steps_of_run(arguments())


def test_a_checkpoint_that_counted_other_tokens_is_refused_with_the_number_that_fits():
    args = arguments(train_iters=10**6, train_tokens=TOKENS, consumed_train_tokens=80 * 32)
    length.refuse_other_end(args, 20, 80)
    args.consumed_train_tokens = 80 * 16  # 80 samples of half the length
    with pytest.raises(
        ConfigError, match=f"end at step 25, not 20; write --train-tokens {80 * 16 + 80 * 32}"
    ):
        length.refuse_other_end(args, 20, 80)
    args.train_tokens = 80 * 16 + 80 * 32
    length.refuse_other_end(args, 20, 80)


def test_what_is_left_in_words():
    plan = SimpleNamespace(names=("en", "ru"), budgets=(96, None), samples=160)
    assert lines.left(plan, 160, [96, 64]) is None
    left = lines.left(plan, 80, [50, 30])
    assert left == {"samples": 80, "budgets": {"en": 46}}
    assert lines.left_words(left, plan, 80).endswith("sample 80 of 160; left of the budgets: en 46 of 96")


def test_a_run_ends_by_tokens_with_exact_budgets_and_its_report(scratch, tmp_path):
    here = Jobs(scratch, tmp_path, "zero1")
    samples = {"--lr-warmup-iters 2": "--lr-warmup-samples 16"}
    official = {**samples, "--train-iters 20": f"--train-samples 100000 --train-tokens {TOKENS}"}
    here.add("steps", "--commute", here.data / "fixed.yaml")
    here.add("tokens", "--commute", here.data / "fixed.yaml", words=official)
    alone = {**samples, "--train-iters 20": f"--train-tokens {TOKENS}"}
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
