"""Small parts of the adapter that need no checkout: rates, decay, precision and recomputing."""

from types import SimpleNamespace

import pytest
import torch

from megatron_commute.adapters import megatron_core
from megatron_commute.adapters.megatron_deepspeed import model as models
from megatron_commute.settings.batches import Batches


class Scheduler:
    """Rate 1/(samples + tokens), as Megatron's depends on both; asking may write to it, as Megatron's does."""

    num_steps, num_tokens, warmed = 80, 2560, False

    def get_lr(self):
        self.warmed = True
        return 1.0 / (1 + self.num_steps + self.num_tokens)


def test_the_rate_of_any_step_leaves_the_scheduler_alone():
    scheduler = Scheduler()
    rate = models.learning_rate(scheduler, Batches(8), seq_length=32)
    assert rate(0) == 1.0
    assert rate(10) == scheduler.get_lr.__func__(SimpleNamespace(num_steps=80, num_tokens=2560))
    assert (scheduler.num_steps, scheduler.num_tokens, scheduler.warmed) == (80, 2560, False)


@pytest.mark.parametrize(
    ("kind", "decay"), [(torch.optim.Adam, 0.0), (torch.optim.AdamW, 0.1), (torch.optim.SGD, 0.0)]
)
def test_only_decay_beside_the_gradient_counts(kind, decay):
    inner = kind([torch.zeros(2, requires_grad=True)], lr=0.1, weight_decay=0.1)
    assert models.decoupled_decay(SimpleNamespace(optimizer=inner), 0.1) == decay
    wrapped = SimpleNamespace(optimizer=SimpleNamespace(optimizer=inner))
    assert models.decoupled_decay(wrapped, 0.1) == decay


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.checkpoint_activations, self.recompute_granularity, self.input_in_bf16 = True, "full", True


def test_recomputing_and_casts_rest_and_come_back_after_a_fault():
    module = torch.nn.Sequential(Layer(), torch.nn.Linear(1, 1))
    with (
        pytest.raises(OSError, match="gone"),
        megatron_core.in_float32(module),
        megatron_core.without_recomputing(module),
    ):
        assert vars(module[0])["checkpoint_activations"] is False
        assert module[0].recompute_granularity is None and module[0].input_in_bf16 is False
        raise OSError("gone")
    assert module[0].checkpoint_activations is True
    assert module[0].recompute_granularity == "full" and module[0].input_in_bf16 is True
    assert not hasattr(module[1], "checkpoint_activations")
