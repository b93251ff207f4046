"""The three ways a probe can hold its vectors: the same numbers, the memory they state, the traffic, and the choice."""

import itertools
import types
from pathlib import Path
from unittest import mock

import hvp_methods
import numpy as np
import pytest
import ranks
import records
import torch

from megatron_commute import config, reduce
from megatron_commute.adapters import torch_loop
from megatron_commute.cli import plan as plan_command
from megatron_commute.measure import probe
from megatron_commute.report import plots, series
from megatron_commute.settings import memory

K, WIDTH = 3, 5
WEIGHTS, FLOW = np.array([0.5, 0.2, 0.3]), (0.1, (0.02, 0.01))
MIXED, EACH = np.array([[0.6, 0.4, 0.0]]), np.eye(K)
FIELDS = ("s", "s_se", "u_g", "h_theta", "score", "score_se")


def network():
    """Layers with biases (no weight decay) whose 59 parameters no number of ranks can share evenly."""
    torch.manual_seed(3)
    first, second = torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, 4)
    return torch.nn.Sequential(first, torch.nn.Tanh(), second, torch.nn.Linear(4, 1)).double()


def draw(part, domain, numbers):
    """Inputs and one label a sequence, float64 [n, WIDTH + 1], of a domain's own distribution."""
    rows = [
        np.random.default_rng([domain, int(n), part == "direction"]).normal(size=WIDTH + 1) for n in numbers
    ]
    return torch.from_numpy(np.array(rows)) * (1 + torch.arange(WIDTH + 1) * domain / 4)


def loss(module, rows):
    return (module(rows[:, :-1])[:, 0] - rows[:, -1]).square().mean()


def moments(module):
    generator = torch.Generator().manual_seed(5)
    return [torch.rand(p.shape, generator=generator, dtype=torch.float64) for p in module.parameters()]


def measured(mode, method, metric, targets, groups, splits=2, weights=WEIGHTS):
    module = network()
    model = torch_loop.probe_model(module, loss, 2, lambda: moments(module), groups=groups)
    how = config.Probe(samples=6 * splits, splits=splits, method=method, metric=metric, memory=mode)
    team = reduce.team(groups, splits, together=mode == "sharded")
    return probe.measure(model, groups, team, draw, how, targets, weights, FLOW)


def modes(method):
    return memory.possible(method, 2, only_shards=False, any_shards=True)


CASES = [
    (method, *case)
    for method in ("difference", "exact")
    for case in (("identity", "single"), ("adam", "each"))
]


def everything(rank):
    """On 3 ranks: the measurements of all ways on two of them and, fewer splits than ranks, on all; what was sent."""
    pair, world = torch.distributed.new_group([0, 1]), reduce.everyone()
    both, sent = {2: reduce.Groups(pair, None, pair), 3: reduce.Groups(world, None, world)}, {}
    found = {}
    for size, groups in both.items():
        for method, metric, target in CASES if rank < size else ():
            for mode in modes(method):
                reduce.traffic.reset()
                targets = MIXED if target == "single" else EACH
                found[size, mode, method, metric, target] = measured(mode, method, metric, targets, groups)
                sent[size, mode, method, metric, target] = dict(reduce.traffic.by_kind)
    scattered = mock.patch.object(reduce, "_scatters", lambda group: True)  # as with NCCL
    with scattered:
        case = "sharded", "difference", "adam", "single"
        found[(3, *case)] = measured("sharded", "difference", "adam", MIXED, both[3])
    # three ranks, K = 3, float64: full holds 10 vectors, sharded 10/3 and 3 layers of 25 of 59 numbers, 4.6, scores 3.3
    short = mock.patch.object(probe, "_free_memory", lambda *_: 10 * 8 * 59 if rank == 1 else 1e12)
    with short:
        model = torch_loop.probe_model(network(), loss, 2, groups=both[3])
        agreed = probe.choose_memory(model, both[3], config.Probe(), K)
    assert agreed == memory.Memory("sharded", 2174, "(2K+4)/3", 3), agreed
    return found, sent


@pytest.fixture(scope="module")
def run():
    return ranks.run(everything, 3, timeout=300)


@pytest.mark.parametrize(("size", "case"), list(itertools.product((2, 3), CASES)), ids=str)
def test_the_three_ways_agree(run, size, case):
    """To rounding: 1e-12 of double backward, and of differences what rounding becomes when it is divided by eps."""
    method, metric, target = case
    alone = measured("full", method, metric, MIXED if target == "single" else EACH, reduce.Groups())
    scale, rounding = np.abs(alone.M).max(), 1e-12 if method == "exact" else 1e-10
    for rank, mode in itertools.product(range(size), modes(method)):
        found = run[rank][0][(size, mode, *case)]
        matrices = ("M", "P", "P_se", "replicates")
        assert all(np.isnan(getattr(found, name)).all() == (mode == "scores") for name in matrices)
        for name in FIELDS if mode == "scores" else (*FIELDS, *matrices):
            value, expected = getattr(found, name), getattr(alone, name)
            own = name in ("u_g", "h_theta", "score", "score_se")
            unit, tolerance = (np.abs(expected).max(), 10 * rounding) if own else (scale, rounding)
            assert np.abs(value - expected).max() <= tolerance * unit, (mode, name)
        assert found.step == (alone.step if alone.step is None else pytest.approx(alone.step, rel=1e-12))


def test_scores_of_domains_without_weight_are_measured_too():
    weights, groups = np.array([0.0, 1.0, 0.0]), reduce.Groups()
    full, scores = (measured(mode, "exact", "adam", MIXED, groups, 2, weights) for mode in ("full", "scores"))
    np.testing.assert_allclose(scores.s, full.s, rtol=0, atol=1e-12 * np.abs(full.M).max())
    assert np.abs(full.s[0, [0, 2]]).min() > 1e-3 * np.abs(full.M).max() and full.s[0, 1] == 0


def test_what_the_network_carries(run):
    """Payload of vectors, in bytes, of one probe on ranks 1 and 2 of 3, that share the second of two splits."""
    vector = 8 * sum(p.numel() for p in network().parameters())
    padded = 8 * sum(-(-p.numel() // 3) * 3 for p in network().parameters())
    for method, metric, target in CASES:
        T = 1 if target == "single" else K
        for rank in (1, 2):
            sent = {mode: run[rank][1][3, mode, method, metric, target] for mode in modes(method)}
            # full: a direction and K gradients
            assert sent["full"]["vector"][1] == (1 + K) * T * vector
            if method == "exact":  # scores: a direction and the mixture's two
                assert sent["scores"]["vector"][1] == 3 * T * vector
                continue
            # in shards no vector travels; each of three ranks takes one sequence of a direction and two of a
            # gradient in a micro-batch, both splits: a scattered sum of either sign, and four of the error
            domains = 2 if target == "single" else 1
            gradients = {"sharded": 2 * (domains + 2 * K) + 4 * K, "scores": 2 * (domains + 4 * K) + 4 * K}
            for mode, count in gradients.items():
                assert "vector" not in sent[mode]
                assert sent[mode]["scatter"] == (6 * T * count, T * count * padded)
            assert sent["scores"]["sum"][0] == 1 + 2 * T + (metric == "adam")
        assert "vector" not in run[0][1][3, "full", method, metric, target]


# --- choice -----------------------------------------------------------------------------------------------------------


def chosen(monkeypatch, vectors_free, ranks_=1, method="difference", **settings):
    module = network()
    model = torch_loop.probe_model(module, loss, 2)
    size = 8 * sum(p.numel() for p in module.parameters())
    monkeypatch.setattr(probe, "_free_memory", lambda device, groups: vectors_free * size)
    monkeypatch.setattr(reduce, "size", lambda group: ranks_ if group == "data" else 1)
    groups = types.SimpleNamespace(data="data", world=None)
    return probe.choose_memory(model, groups, config.Probe(method=method, **settings), K)


@pytest.mark.parametrize(
    ("free", "ranks_", "method", "mode", "words"),
    [
        (20, 1, "difference", "full", "2K+4"),
        (20, 3, "difference", "full", "2K+4"),
        (
            19.9,
            3,
            "difference",
            "sharded",
            "(2K+4)/3",
        ),  # and 3 layers of 25 of the 59 parameters: 4.6 vectors
        (4.7, 3, "difference", "sharded", "(2K+4)/3"),
        (4.5, 3, "difference", "scores", "6/3"),  # and 3 layers: 3.3 vectors
        (3.2, 3, "difference", "sharded", "(2K+4)/3"),  # nothing fits: the leanest that measures M and P
        (19.9, 1, "difference", "full", "2K+4"),
        (9.9, 1, "difference", "scores", "6"),
        (0, 1, "difference", "full", "2K+4"),
        (12, 3, "exact", "full", "12"),  # needs whole parameters
        (1, 64, "difference", "sharded", "(2K+4)/64"),
    ],
)
def test_auto_takes_full_in_half_of_the_free_memory_else_the_leanest_that_measures_P(
    monkeypatch, free, ranks_, method, mode, words
):
    found = chosen(monkeypatch, free, ranks_, method)
    assert (found.mode, found.words) == (mode, words)
    layers = " and 3 of the largest layer" if "/" in words else ""
    assert found.sentence.startswith(f"probe memory: {mode}, {words} vectors{layers}, ")
    assert found.sentence.endswith(" per rank beside the activations of one micro-batch")


@pytest.mark.parametrize("wish", memory.MODES)
def test_a_wish_is_taken_literally_but_one_rank_shares_with_nobody(monkeypatch, wish):
    assert chosen(monkeypatch, 0, 4, memory=wish).mode == wish
    assert chosen(monkeypatch, 0, 1, memory=wish).mode == ("full" if wish == "sharded" else wish)


def test_zero_3_has_nothing_but_shards():
    """A wish for whole vectors becomes shards; with these, one rank more or less is a matter of bytes."""
    possible = memory.possible("difference", 2, only_shards=True, any_shards=False)
    assert possible == ("sharded", "scores")
    assert [memory.choose(wish, dict.fromkeys(possible, 9)) for wish in ("full", "scores", "auto")] == [
        "sharded",
        "scores",
        "sharded",
    ]


def test_free_memory_of_a_host_is_shared_by_its_ranks(monkeypatch):
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=1200))
    monkeypatch.setattr(reduce, "size", lambda group: 4)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert probe._free_memory(torch.device("cpu"), reduce.Groups()) == 300
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert probe._free_memory(torch.device("cpu"), reduce.Groups()) == 600


def test_vectors_by_hand():
    """Direction, displaced copy, gradient; +1 Adam, +1 float32 copy; g and h of K, or of two; in shards the R-th part."""
    cases = {
        ("full", 4, "difference", "identity", 1, False): 11,
        ("full", 4, "difference", "adam", 1, True): 13,
        ("full", 8, "exact", "adam", 1, False): 20,
        ("full", 2, "exact", "identity", 1, True): 13,  # the first probe verifies itself with a dozen
        ("sharded", 4, "difference", "adam", 3, False): 4,
        ("sharded", 4, "difference", "adam", 2, True): 6.5,
        ("scores", 4, "difference", "adam", 1, False): 6,
        ("scores", 400, "difference", "identity", 8, False): 0.625,
        ("scores", 4, "exact", "adam", 8, False): 12,
    }
    assert {(mode, *demand): memory.vectors(mode, memory.Demand(*demand)) for mode, *demand in cases} == cases


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "domains"), [("full", 4), ("scores", 4), ("scores", 2)])
def test_the_peak_of_a_probe_is_what_it_states(mode, domains):
    """Bytes of tensors alive at the worst moment, over those of the parameters; activations are small beside them."""
    module = torch.nn.Sequential(*[torch.nn.Linear(400, 400, bias=False) for _ in range(2)])
    model = torch_loop.probe_model(
        module,
        lambda m, x: m(x).square().mean(),
        1,
        lambda: [torch.ones_like(p) for p in module.parameters()],
    )
    how = config.Probe(samples=2, splits=2, method="difference", metric="adam", memory=mode)
    groups, even = reduce.Groups(), np.full(domains, 1 / domains)

    def measure():
        def draw(part, domain, numbers):
            return torch.full((len(numbers), 400), 1.0 + domain)

        probe.measure(model, groups, reduce.team(groups, 2), draw, how, even[None], even, (0.1, (1.0, 1.0)))

    stated = memory.vectors(mode, memory.Demand(domains, "difference", "adam", 1, False))
    assert stated == (12 if mode == "full" else 6)
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    held = hvp_methods.peak(measure) / size - 1  # the parameters are seen too, under names of their own
    assert 0.95 * stated <= held <= 1.05 * stated


# --- what is said about it --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("each", "unknown"), [(False, "all"), (True, "first")])
def test_a_record_without_P_is_drawn_and_told(tmp_path, each, unknown):
    lines = records.lines(K=3, each=each)
    probes = [line for line in lines if line["event"] == "probe"]
    for line in probes if unknown == "all" else probes[:1]:
        line |= {"P": None, "P_se": None, "M": None}
    lines[0]["memory"] = {"mode": "scores", "bytes": 43_000_000}
    records.write(tmp_path, lines)
    told = Path(plots.report(tmp_path)).read_text(encoding="utf-8")
    of = len(probes) if unknown == "all" else 1
    assert f"{of} of {len(probes)} probes worked with probe.memory scores, which does not measure P." in told
    assert "scores, 43 MB a rank" in told
    headers, rows = series.summary_rows(lines)
    column = next(i for i, header in enumerate(headers) if header.startswith("largest P"))
    assert all((row[column] == "not measured") == (unknown == "all") for row in rows)
    assert "not measured" not in [
        row[headers.index(h)] for row in rows for h in headers if h.startswith("score")
    ]
    assert [path.stat().st_size > 0 for path in plots.export(tmp_path, tmp_path / "out")]
    assert (tmp_path / "out" / "P.csv").read_text().count("\n") == 1 + (len(probes) - of) * 6 * (
        3 if each else 1
    )


def test_plan_shows_what_a_probe_would_hold():
    run = config.Run(8, 8, 1, 4, 100)
    domains = tuple(config.Domain(name=name, path=(name,)) for name in "abc")
    held = plan_command.probe_memory(config.Config(domains=domains), run, 25e6, 2e6)
    assert held["full"] == {
        "vectors": 10,
        "words": "2K+4",
        "layers": 0,
        "bytes": 1_000_000_000,
        "host_bytes": 0,
    }
    assert held["sharded"] == {
        "vectors": 2.5,
        "words": "(2K+4)/4",
        "layers": 3,
        "bytes": 274_000_000,
        "host_bytes": 0,
    }
    assert held["scores"] == {
        "vectors": 1.5,
        "words": "6/4",
        "layers": 3,
        "bytes": 174_000_000,
        "host_bytes": 0,
    }
    assert plan_command.memory_words(held) == (
        "full holds 2K+4 = 10 vectors of model size, 1 GB a rank; "
        "sharded holds (2K+4)/4 = 2.5 vectors of model size and 3 of the largest layer, 274 MB a rank; "
        "scores holds 6/4 = 1.5 vectors of model size and 3 of the largest layer, 174 MB a rank"
    )
    away = config.Config(domains=domains, probe=config.Probe(memory="sharded", offload=True))
    held = plan_command.probe_memory(away, run, 25e6, 2e6)
    assert held == {
        "sharded": {
            "vectors": 0.5,
            "words": "2/4",
            "layers": 3,
            "bytes": 74_000_000,
            "host_bytes": 200_000_000,
        }
    }
    assert plan_command.memory_words(held).endswith(
        "3 of the largest layer, 74 MB a rank, and 200 MB per rank in the memory of the host"
    )
    alone = config.Run(8, 8, 1, 1, 100)
    assert set(plan_command.probe_memory(config.Config(domains=domains), alone, None, None)) == {
        "full",
        "scores",
    }
    wish = config.Config(domains=domains, probe=config.Probe(memory="sharded"))
    assert (
        plan_command.memory_words(plan_command.probe_memory(wish, alone, None, None))
        == "full holds 2K+4 = 10 vectors of model size"
    )
