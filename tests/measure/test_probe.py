"""The measurement against a float64 oracle, in every layout; its traffic, its cost, its faults and its error bars."""

import dataclasses
import itertools

import numpy as np
import pytest
import ranks
import torch
from probing import (
    EACH,
    FLOW,
    LENGTH,
    MIXED,
    WEIGHTS,
    K,
    assert_close,
    mean_loss,
    measured,
    model_of,
    moments,
    settings,
    small_gpt,
    text,
    truth,
)

from megatron_commute import hvp, reduce
from megatron_commute.adapters import torch_loop
from megatron_commute.measure import keep, probe
from megatron_commute.measure.model import Model

CASES = list(itertools.product(("difference", "exact"), ("identity", "adam"), (MIXED, EACH)))


@pytest.mark.parametrize(("method", "metric", "targets"), CASES)
def test_every_field_equals_its_definition(method, metric, targets):
    module, how = small_gpt(), settings(method=method, metric=metric)
    assert_close(measured(module, how, targets), truth(small_gpt(), how, targets), 1e-6)


def later(t=0, split=0):
    """Gradient of target number t of EACH at other parameters, own sequences for every split."""
    module = small_gpt()
    generator = torch.Generator().manual_seed(8)
    for p in module.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    tokens = text("later", t, np.arange(4 * split, 4 * split + 4))
    module.zero_grad()
    mean_loss(module, tokens).backward()
    return [p.grad for p in module.parameters()]


@pytest.mark.parametrize("memory", ["full", "sharded", "scores"])
@pytest.mark.parametrize(("method", "metric"), [("difference", "adam"), ("exact", "identity")])
def test_a_direction_given_from_outside_takes_the_place_of_the_targets_gradient(method, metric, memory):
    """M[k, j] = (H_k D u) . (D g_j) with the u of later parameters: one a target, or one a split and target."""
    how = settings(method=method, metric=metric, memory=memory)
    drawn = []

    def draw(part, domain, numbers):
        drawn.append(part)
        return text(part, domain, numbers)

    def own(target, split):
        return later(int(target.argmax()), split)

    shared = [later(t) for t in range(K)]
    for direction, given in ((shared, later_of_first_split), (own, later)):
        found = measured(small_gpt(), how, EACH, draw=draw, direction=direction)
        expected = truth(small_gpt(), how, EACH, given)
        if memory == "scores":
            size = np.abs(expected["M"]).max()
            assert np.abs(found.s - expected["s"]).max() <= 1e-6 * size and np.isnan(found.M).all()
        else:
            assert_close(found, expected, 1e-6)
    assert "direction" not in drawn, "the target's own gradient is not measured"


def later_of_first_split(t, split):
    return later(t)


def test_a_direction_that_does_not_fit_is_refused_with_the_cure():
    how, given = settings(), later()
    for vector, words in (
        (given[1:], "direction: ValueError: .* give one tensor like each of the model's parameters"),
        ([*given[:-1], given[-1] * np.nan], "direction: FloatingPointError: the direction is not finite"),
    ):
        with pytest.raises(probe.ProbeFailed, match=words):
            measured(small_gpt(), how, direction=[vector])


def test_float32_stays_within_1e_3_of_max_M():
    how = settings(metric="adam")
    found, expected = measured(small_gpt(torch.float32), how), truth(small_gpt(), how, MIXED)
    size = np.abs(expected["M"]).max()
    assert np.abs(found.P - expected["P"]).max() <= 1e-3 * size
    assert measured(small_gpt(), how).step < found.step, "float64 allows smaller displacements"
    assert measured(small_gpt(), settings(method="exact")).step is None


def test_a_hand_written_pass_stands_where_double_backward_does():
    """Method fused asks the model for gradient and product of a micro-batch, and for its verification beforehand."""
    how, seen = settings(method="fused", metric="adam"), []

    def fused(params, u, tokens):
        seen.append(len(tokens))
        return hvp.gradient_and_product(lambda at: base.loss(at, tokens), params, u, "exact")

    base = model_of(small_gpt())
    model = dataclasses.replace(base, fused=fused, verify=lambda params, tokens: seen.append("verified"))
    team = reduce.team(reduce.Groups(), how.splits)
    arguments = (reduce.Groups(), team, text, how, MIXED, WEIGHTS, FLOW)
    assert_close(probe.measure(model, *arguments), truth(small_gpt(), how, MIXED), 1e-6)
    assert seen[0] == "verified" and sum(seen[1:]) == K * how.samples
    with pytest.raises(probe.ProbeFailed, match="no hand-written pass: write method difference or exact"):
        probe.measure(base, *arguments)


@pytest.mark.parametrize("method", ["difference", "exact"])
def test_work_grows_linearly_with_the_number_of_domains(method):
    """Loss evaluations, each of one micro-batch: K (direction) + 2 K or K (difference or exact), a split; and the four of
    one sequence a domain that tell the error of differences."""
    counts = {}
    for domains in (2, 8, 32):
        calls = []
        module = torch.nn.Linear(LENGTH + 1, 1).double()

        def loss(module, tokens, calls=calls):
            calls.append(len(tokens))
            return module(tokens.double()).square().mean() * 1e-3

        model = torch_loop.probe_model(module, loss, 4)
        team, target = reduce.team(reduce.Groups(), 2), np.full((1, domains), 1 / domains)
        how = settings(samples=16, splits=2, method=method)
        probe.measure(model, reduce.Groups(), team, text, how, target, target[0], FLOW)
        counts[domains] = (len(calls), sum(calls))
    passes, products, check = (2, 2, 4) if method == "difference" else (1, 1, 0)
    # a split has 8 sequences (2 micro-batches) for gradients, 4 (1 micro-batch) for the direction
    expected = {
        k: (k * (check + 2 * (1 + 2 * passes)), k * (check + 2 * (4 + 8 * products))) for k in (2, 8, 32)
    }
    assert counts == expected


# --- several ranks --------------------------------------------------------------------------------------------------


def layouts(rank):
    """On 4 ranks: what 1, 2 and 4 data-parallel ranks measure, with fewer and more splits than ranks, and the traffic."""
    pairs = [torch.distributed.new_group([0, 1]), torch.distributed.new_group([2, 3])]
    pair, world = pairs[rank // 2], reduce.everyone()
    groups = {1: reduce.Groups(), 2: reduce.Groups(pair, None, pair), 4: reduce.Groups(world, None, world)}
    found, sent = {}, {}
    for splits, size in itertools.product((2, 3, 4), groups):
        how = settings(samples=12, splits=splits, metric="adam")
        team = reduce.team(groups[size], splits)
        for name, targets in (("mixed", MIXED), ("each", EACH)):
            reduce.traffic.reset()
            found[splits, size, name] = measured(small_gpt(), how, targets, groups[size], team)
            sent[splits, size, name] = dict(reduce.traffic.by_kind)
    how = settings(samples=12, splits=2, metric="adam")
    for size in groups:
        team = reduce.team(groups[size], 2)
        found[2, size, "given"] = measured(small_gpt(), how, MIXED, groups[size], team, direction=[later()])
    return found, sent


@pytest.fixture(scope="module")
def laid_out():
    return ranks.run(layouts, 4, timeout=200)


@pytest.mark.parametrize("splits", [2, 3, 4])
def test_any_number_of_ranks_measures_the_same(laid_out, splits):
    how = settings(samples=12, splits=splits, metric="adam")
    for (name, targets), (found, _) in itertools.product((("mixed", MIXED), ("each", EACH)), laid_out):
        expected = truth(small_gpt(), how, targets)
        for size in (1, 2, 4):
            assert_close(found[splits, size, name], expected, 1e-6)


def test_a_direction_given_from_outside_is_not_summed_over_a_team(laid_out):
    """Two splits on four ranks: two ranks share one, each with the whole of the direction."""
    expected = truth(small_gpt(), settings(samples=12, splits=2, metric="adam"), MIXED, later_of_first_split)
    for (found, _), size in itertools.product(laid_out, (1, 2, 4)):
        assert_close(found[2, size, "given"], expected, 1e-6)


def test_all_ranks_hold_the_same_bits(laid_out):
    for key, one in laid_out[0][0].items():
        for found, _ in laid_out[1:]:
            if key[1] == 4:
                np.testing.assert_array_equal(found[key].P, one.P)
                np.testing.assert_array_equal(found[key].score_se, one.score_se)


def test_traffic_is_votes_and_one_table_of_numbers_unless_a_team_shares_a_split(laid_out):
    sent = [sent for _, sent in laid_out]
    size = sum(p.numel() for p in small_gpt().parameters())
    for (splits, ranks_, name), kinds in sent[0].items():
        T = 1 if name == "mixed" else K
        if ranks_ == 1:
            assert kinds == {}
            continue
        rounds = -(-splits // ranks_)
        votes = 3 + rounds * 4 * T  # preparing, metric, end; direction, step, check and products of a target
        assert kinds["max"] == (votes, 4 * votes)
        assert kinds["sum"] == (1, 8 * T * (splits * (K + 4) * K + 6 * K))
        shared = ranks_ > splits
        assert set(kinds) == ({"max", "sum", "vector"} if shared and splits == 2 else {"max", "sum"})
        if shared and splits == 2:
            vectors = T * (1 + K)  # a direction and K gradients for each target
            assert kinds["vector"] == (vectors, 8 * size * vectors)
    # three splits on four ranks: two ranks share the last split, the others send no vector
    assert [("vector" in s[3, 4, "mixed"]) for s in sent] == [False, False, True, True]


def shout(rank):
    """On 2 ranks: each kind of fault on rank 1 alone; what was raised, and what of the module had changed."""
    world = reduce.everyone()
    layouts = {"data": reduce.Groups(world, None, world), "model": reduce.Groups(None, world, world)}
    return {name: with_faults(rank, groups) for name, groups in layouts.items()}


def with_faults(rank, groups):
    """The same for ranks that share the data, or the model as tensor-parallel ranks do."""
    torch.manual_seed(0)
    how = settings(samples=8, splits=2)
    module = torch.nn.Sequential(small_gpt(torch.float32), torch.nn.Dropout(0.1))
    module[1].train(False)  # frozen by its user: a probe must not switch it on
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    owned = [groups.model is None or rank == 0 or p.dim() > 1 for p in module.parameters()]
    base = torch_loop.probe_model(module, mean_loss, 2, lambda: moments(module), owned=owned, groups=groups)

    def with_fault(kind):
        calls = itertools.count()

        def loss(params, tokens):
            value = base.loss(params, tokens)
            torch.rand(1)  # draws random numbers, as a model may
            if rank == 1 and next(calls) == 5:
                if kind == "exception":
                    raise KeyError("a bug in the loss")
                if kind == "memory":
                    raise torch.OutOfMemoryError("CUDA out of memory")
                if kind == "nan":
                    return value * float("nan")
            return value

        def draw(part, domain, numbers):
            if kind == "token" and rank == 1 and (part, domain) == ("gradient", 2):
                raise ValueError("token 99 is outside the vocabulary")
            return text(part, domain, numbers)

        def metric(name):
            if kind == "metric" and rank == 1:
                raise torch.OutOfMemoryError("no room for the metric")
            return base.metric(name)

        fields = {
            name: getattr(base, name) for name in ("parameters", "owned", "decayed", "quiet", "micro_batch")
        }
        limit = (0.0 if rank == 1 else 1e9) if kind == "late" else None
        return Model(loss=loss, metric=metric, **fields), draw, limit

    def state():
        tensors = [*module.parameters(), *(p.grad for p in module.parameters()), torch.get_rng_state()]
        return [t.detach().clone() for t in tensors], [m.training for m in module.modules()]

    team, told = reduce.team(groups, 2), {}
    for kind in ("exception", "memory", "nan", "token", "metric", "late", "contraction", "none"):
        model, draw, limit = with_fault(kind)
        before, gram = state(), keep.ops.gram
        if kind == "contraction" and rank == 1:
            keep.ops.gram = _fails_on_many(gram)
        try:
            probe.measure(model, groups, team, draw, how, MIXED, WEIGHTS, FLOW, limit)
            told[kind] = "measured"
        except probe.ProbeFailed as fault:
            told[kind] = str(fault)
        keep.ops.gram = gram
        after = state()
        same = all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
        told[kind] = (told[kind], same and before[1] == after[1])
    return told


def _fails_on_many(gram):
    def fails(X, Y, metric=None):
        if len(X) > 1:
            raise torch.OutOfMemoryError("no room for the contraction")
        return gram(X, Y, metric)

    return fails


def test_a_fault_on_one_rank_is_told_by_all_and_leaves_no_trace():
    told = ranks.run(shout, 2, timeout=120)
    reasons = {
        "exception": "rank 1: Hessian-vector products: KeyError: 'a bug in the loss'",
        "memory": "rank 1: Hessian-vector products: OutOfMemoryError: CUDA out of memory",
        "nan": "rank 1: Hessian-vector products: FloatingPointError: the gradient is not finite",
        "token": "rank 1: Hessian-vector products: ValueError: token 99 is outside the vocabulary",
        "metric": "rank 1: metric: OutOfMemoryError: no room for the metric",
        "late": "rank 1: direction: TimeoutError: the probe ran past probe.time_limit",
        "contraction": "rank 1: contractions: OutOfMemoryError: no room for the contraction",
        "none": "measured",
    }
    for one, layout in itertools.product(told, ("data", "model")):
        assert set(one[layout]) == set(reasons)
        for kind, (reason, untouched) in one[layout].items():
            expected = reasons[
                kind
            ]  # ranks that share a model come to the fault in another section, and add their own word
            found = reason.startswith(expected) or (
                layout == "model" and expected.split(": ", 2)[-1] in reason
            )
            assert found and untouched, (layout, kind, reason)


def test_an_infinite_product_is_no_measurement():
    module = small_gpt()
    huge = torch_loop.probe_model(module, lambda m, tokens: mean_loss(m, tokens) * 1e160, 4)
    with pytest.raises(probe.ProbeFailed, match="not finite"):
        how = settings(samples=4, splits=2)
        probe.measure(huge, reduce.Groups(), reduce.team(reduce.Groups(), 2), text, how, MIXED, WEIGHTS, FLOW)
