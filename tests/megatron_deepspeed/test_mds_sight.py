"""What one rank sees of a step, and how the tally adds up what several ranks see; needs no checkout."""

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import ranks
import torch

from megatron_commute import reduce
from megatron_commute.adapters.megatron_deepspeed.sight import Sight
from megatron_commute.record.tally import Tally, sample_hashes

TEXT = torch.arange(12).reshape(2, 6)
LOSSES = torch.tensor([[1.0, 2.0, 3.0], [5.0, 7.0, 9.0]])


def reduced(mask, _moe, losses):
    return (losses.reshape(-1) * mask.reshape(-1)).sum() / mask.sum()


def step(sight, mask=None):
    """One micro-batch of two sequences through Megatron's forward_step and loss function."""
    mask = torch.ones_like(LOSSES) if mask is None else mask

    def forward_step(batches, model):
        next(batches)
        return LOSSES.clone().requires_grad_(True), functools.partial(reduced, mask, 0)

    sight.begin()
    batches = sight.over(
        iter([{"text": TEXT, "domain": torch.tensor([1, 0]), "position": torch.tensor([7, 3])}])
    )
    output, loss = sight.forward_step(forward_step)(batches, None)
    return loss(output)


def test_sequence_losses_and_tokens_of_a_step():
    sight = Sight(first=True, last=True)
    assert float(step(sight).detach()) == pytest.approx(4.5)
    assert sight.sequence_losses(2).tolist() == [2.0, 7.0]
    assert np.concatenate(sight.tokens(2)).tolist() == TEXT.tolist()
    domain, position = sight.delivered()
    assert domain.tolist() == [1, 0] and position.tolist() == [7, 3]


MASK = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])


@pytest.mark.parametrize("mask", [MASK, MASK.reshape(-1)])
def test_masked_tokens_do_not_count(mask):
    sight = Sight(first=True, last=True)
    step(sight, mask)
    assert sight.sequence_losses(2).tolist() == [1.5, 9.0]


@pytest.mark.parametrize("bound", [(), (torch.ones(2),)])
def test_every_token_counts_where_the_loss_function_binds_no_mask_of_them(bound):
    sight = Sight(first=True, last=True)
    sight.begin()
    sight.forward_step(lambda batches, model: (LOSSES, functools.partial(reduced, *bound)))(None, None)
    assert sight.sequence_losses(2).tolist() == [2.0, 7.0]


def test_other_ranks_tell_what_this_one_does_not():
    middle = Sight(first=False, last=False)
    step(middle)
    assert middle.sequence_losses(2) is None and middle.tokens(2) is None
    assert middle.over(None) is None


def test_each_step_begins_anew_and_a_wrong_number_is_not_told():
    sight = Sight(first=True, last=True)
    step(sight)
    step(sight)
    assert len(sight.sequence_losses(2)) == 2
    assert sight.sequence_losses(4) is None and sight.tokens(4) is None


def test_the_loss_function_of_a_pipeline_is_followed_and_put_back(monkeypatch):
    core = SimpleNamespace(vocab_parallel_cross_entropy=lambda output, labels: output * 1)
    monkeypatch.setitem(__import__("sys").modules, "megatron", SimpleNamespace())
    monkeypatch.setitem(__import__("sys").modules, "megatron.core", SimpleNamespace(tensor_parallel=core))
    entropy = core.vocab_parallel_cross_entropy

    def loss_fn(output, labels):
        return (core.vocab_parallel_cross_entropy(output, labels[0]).transpose(0, 1) * labels[1]).sum()

    engine = SimpleNamespace(module=SimpleNamespace(loss_fn=loss_fn), train_batch=None)
    sight = Sight(first=False, last=True)
    sight.begin()
    with sight.of_pipeline(engine):
        assert float(engine.module.loss_fn(LOSSES.transpose(0, 1), (None, MASK))) == 12.0
    assert engine.module.loss_fn is loss_fn and core.vocab_parallel_cross_entropy is entropy
    assert sight.sequence_losses(2).tolist() == [1.5, 9.0]


DOMAINS, POSITIONS = np.array([0, 1, 1, 0]), np.array([0, 0, 1, 1])
TOKENS = np.arange(20).reshape(4, 5)


def two_stages(rank):
    """Rank 0 sees the sequences, rank 1 the losses."""
    tally = Tally(domains=2, global_batch=4, micro_batch=2, data_rank=0, data_size=1, group=None).over(
        reduce.everyone()
    )
    losses = np.array([1.0, 2.0, 4.0, 3.0])
    tally.add(8, DOMAINS, POSITIONS, losses if rank else None, None if rank else TOKENS)
    tally.settle()
    return tally.state_dict(), tally.means()


def test_the_tally_adds_what_several_ranks_see():
    whole = Tally(domains=2, global_batch=4, micro_batch=2, data_rank=0, data_size=1, group=None)
    whole.add(8, DOMAINS, POSITIONS, np.array([1.0, 2.0, 4.0, 3.0]), TOKENS)
    whole.settle()
    hashes = sample_hashes(np.arange(8, 12), DOMAINS, POSITIONS, TOKENS)
    told = [(whole.state_dict(), whole.means())] * 2
    assert told[0][0]["fingerprint"] == f"{sum(hashes.tolist()) % 2**64:016x}"
    assert told[0][1] == [2.0, 3.0]
    assert ranks.run(two_stages, 2) == told
