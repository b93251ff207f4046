"""What Megatron-DeepSpeed can do and the plug-in does not follow is refused by name; needs no checkout."""

import json
from types import SimpleNamespace

import pytest

from megatron_commute.adapters.megatron_deepspeed.refusals import refuse
from megatron_commute.config import ConfigError


def arguments(tmp_path, engine=None, **changed):
    """Megatron's arguments of a run that is followed, but for what is `changed`."""
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps(engine or {}))
    plain = {
        "deepspeed": True, "deepspeed_config": str(file), "dataloader_type": "single", "data_impl": "mmap",
        "num_experts": [1], "ds_sequence_parallel_size": 1, "rampup_batch_size": None, "split": "969, 30, 1",
        "data_path": None, "train_data_path": ["1.0", "data"], "virtual_pipeline_model_parallel_size": None,
    }  # fmt: skip
    return SimpleNamespace(**{**plain, **changed})


def test_a_plain_run_passes(tmp_path):
    """The base of the cases below: what is refused there is refused for the flag that was changed."""
    assert refuse(arguments(tmp_path), feeds=False) is None
    assert refuse(arguments(tmp_path), feeds=True) is None


@pytest.mark.parametrize(
    ("flag", "changed"),
    [
        ("--num-experts", {"num_experts": [4]}),
        ("--ds-sequence-parallel-size", {"ds_sequence_parallel_size": 2}),
        ("--sequence-parallel", {"sequence_parallel": True}),
        ("--data-efficiency-curriculum-learning", {"data_efficiency_curriculum_learning": True}),
        ("--random-ltd", {"random_ltd": True}),
        ("--dataloader-type cyclic", {"dataloader_type": "cyclic"}),
        ("--fp16-lm-cross-entropy", {"fp16_lm_cross_entropy": True}),
        ("--variable-seq-lengths", {"variable_seq_lengths": True}),
        ("--num-layers-per-virtual-pipeline-stage", {"virtual_pipeline_model_parallel_size": 2}),
        ("--enable-zbh1-pipeline", {"enable_zbh1_pipeline": True}),
        ("--mos/--kd", {"kd": True}),
        ("--no-deepspeed", {"deepspeed": False}),
        ("--skip-train", {"skip_train": True}),
        ("--data-impl", {"data_impl": "lazy"}),
        ("--data-path", {"train_data_path": None}),
    ],
)
def test_flags_are_refused_by_name_with_a_cure(tmp_path, flag, changed):
    with pytest.raises(ConfigError, match="; ") as refusal:
        refuse(arguments(tmp_path, **changed))
    assert str(refusal.value).startswith(f"{flag}: ")


@pytest.mark.parametrize("key", ["curriculum_learning", "data_efficiency", "compression_training"])
def test_keys_of_the_engine_are_refused_by_name(tmp_path, key):
    with pytest.raises(ConfigError, match=key):
        refuse(arguments(tmp_path, engine={key: {"enabled": True}}))
    refuse(arguments(tmp_path, engine={key: {"enabled": False}}))


def test_documents_kept_for_validation_are_not_trained_on(tmp_path):
    shared = {"data_path": ["1.0", "data"], "train_data_path": None}
    refuse(arguments(tmp_path, **shared), feeds=False)  # the host's own business
    with pytest.raises(ConfigError, match="--valid-data-path"):
        refuse(arguments(tmp_path, **shared), feeds=True)
    refuse(arguments(tmp_path, split="100,0,0", **shared), feeds=True)
