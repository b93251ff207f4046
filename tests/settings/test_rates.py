"""Learning rates against megatron-core's own scheduler, stepped through whole runs; what makes no schedule is refused."""

import itertools
import logging
import types

import numpy as np
import pytest

from megatron_commute.settings import rates
from megatron_commute.settings.rates import RateSchedule

STEPS, BATCH = 60, 24
WARMUPS = (
    {},
    {"lr_warmup_iters": 7},
    {"lr_warmup_fraction": 0.13},
    {"lr_warmup_iters": 9, "lr_warmup_init": 1e-4},
)
DECAYS = ({}, {"lr_decay_iters": 40}, {"lr_decay_iters": 90})
WAYS = [{"lr_decay_style": style} for style in rates.STYLES[:-1]] + [
    {"lr_decay_style": "WSD", "lr_wsd_decay_style": way, "lr_wsd_decay_iters": 11} for way in rates.WSD_STYLES
]


def megatrons(schedule, batches):
    """Rates that a run of these global batches is trained at: Megatron-LM's construction of the scheduler, one step each."""
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    group, batch = {"params": []}, schedule.global_batch_size
    decay = (schedule.lr_decay_iters or schedule.train_iters) * batch
    warmup = schedule.lr_warmup_iters * batch
    if schedule.lr_warmup_fraction is not None:
        warmup = schedule.lr_warmup_fraction * decay
    wsd = schedule.lr_wsd_decay_iters
    scheduler = OptimizerParamScheduler(
        types.SimpleNamespace(param_groups=[group]),
        init_lr=schedule.lr_warmup_init,
        max_lr=schedule.lr,
        min_lr=schedule.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=decay,
        lr_decay_style=schedule.lr_decay_style,
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=decay,
        wd_incr_style="constant",
        wsd_decay_steps=None if wsd is None else wsd * batch,
        lr_wsd_decay_style=schedule.lr_wsd_decay_style,
    )
    found = []
    for samples in batches:
        found.append(group["lr"])
        scheduler.step(int(samples))
    return np.array(found)


@pytest.mark.filterwarnings("ignore")  # the framework's notes about its own optional parts
@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(str(value) for value in way.values()))
def test_every_schedule_is_megatrons_over_a_whole_run(way):
    for warmup, decay, least, batch in itertools.product(WARMUPS, DECAYS, (0.0, 1e-4), (1, BATCH)):
        flags = {**way, **warmup, **decay}
        schedule = RateSchedule(lr=1e-3, min_lr=least, train_iters=STEPS, global_batch_size=batch, **flags)
        expected = megatrons(schedule, [batch] * STEPS)
        found = rates.rates(schedule)
        assert found.shape == (STEPS,) and found == pytest.approx(expected, rel=1e-12, abs=1e-12 * 1e-3)
        one_by_one = [rates.rate(schedule, step) for step in range(STEPS)]
        assert one_by_one == pytest.approx(found, rel=1e-13, abs=1e-19)


@pytest.mark.filterwarnings("ignore")
def test_under_batch_ramp_up_the_schedule_goes_by_samples():
    batches = np.repeat([8, 16, 24], 20)
    begun = np.cumsum(batches) - batches
    for way in WAYS:
        schedule = RateSchedule(lr=2e-3, train_iters=40, global_batch_size=24, lr_warmup_iters=5, **way)
        assert rates.after(schedule, begun) == pytest.approx(
            megatrons(schedule, batches), rel=1e-12, abs=1e-15
        )


def test_the_first_step_of_a_warm_up_has_the_rate_it_begins_with():
    schedule = RateSchedule(lr=2.0, min_lr=0.5, lr_warmup_iters=4, train_iters=24)
    found = rates.rates(schedule)
    assert found[:5].tolist() == [0.0, 0.5, 1.0, 1.5, 2.0] and rates.rate(schedule, 14) == pytest.approx(1.25)
    assert [rates.rate(schedule, step) for step in (24, 25, 1000)] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"lr": -1.0}, "--lr -1.0: write a finite number >= 0"),
        ({"lr": float("nan")}, "--lr nan"),
        ({"min_lr": 2.0}, "--min-lr 2: above --lr 1; lower it or raise --lr"),
        ({"lr_warmup_init": 2.0}, "--lr-warmup-init 2: above --lr 1"),
        ({"train_iters": 0}, "--train-iters 0: write a positive number"),
        ({"lr_decay_iters": -5}, "--lr-decay-iters -5: write a positive number"),
        ({"lr_decay_style": "sine"}, "--lr-decay-style sine: write one of constant, linear"),
        ({"lr_wsd_decay_style": "sine"}, "--lr-wsd-decay-style sine: write one of exponential"),
        ({"lr_warmup_iters": 2, "lr_warmup_fraction": 0.1}, "write one of them"),
        ({"lr_warmup_fraction": 1.0}, "--lr-warmup-fraction 1.0: write a number from 0 to below 1"),
        ({"lr_warmup_iters": 20}, "a warm-up of 20 steps leaves nothing of --train-iters 20; shorten"),
        ({"lr_warmup_iters": 9, "lr_decay_iters": 9}, "leaves nothing of --lr-decay-iters 9; shorten"),
        ({"lr_warmup_iters": 25, "lr_decay_iters": 90}, "it never reaches --lr; shorten the warm-up"),
        ({"lr_decay_style": "WSD"}, "--lr-decay-style WSD: write --lr-wsd-decay-iters"),
        ({"lr_decay_style": "WSD", "lr_wsd_decay_iters": 21}, "longer than all of the 20 decay steps; shorten it"),
    ],
)  # fmt: skip
def test_what_makes_no_schedule_is_refused_with_its_cure(flags, told):
    with pytest.raises(ValueError) as error:
        RateSchedule(**{"lr": 1.0, "train_iters": 20, **flags})
    assert told in str(error.value) and "\n" not in str(error.value)


def test_flags_make_the_schedule_and_none_is_the_default():
    fields = {flag.field: flag.default for flag in rates.FLAGS}
    told = rates.from_flags({**fields, "lr": 0.1, "train_iters": 5, "seed": 3, "lr_decay_style": "linear"})
    assert told == RateSchedule(lr=0.1, train_iters=5, lr_decay_style="linear")
    for missing in ("lr", "train_iters"):
        with pytest.raises(ValueError, match=f"--{missing.replace('_', '-')}: missing"):
            rates.from_flags({"lr": 0.1, "train_iters": 5, missing: None})


def test_the_two_windows_of_a_decision_end_with_the_run():
    rate = [1e-2 * (1 - step / 24) for step in range(25)]

    def times(step):
        return rates.flow_times(rate.__getitem__, step, 4, 24)

    assert times(8) == pytest.approx((sum(rate[8:12]), sum(rate[12:16])))
    assert times(20) == pytest.approx((sum(rate[20:22]), sum(rate[22:24])))
    assert times(23) == pytest.approx((rate[23], 1e-30))
