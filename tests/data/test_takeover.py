"""Runs that are already running: changed mixture files and checkpoints of the stock blend."""

import json
from collections import Counter

import numpy as np
import pytest

from megatron_commute.data import takeover
from megatron_commute.data.sampler import items
from megatron_commute.mixture import Mixture

NAMES, PRINTS = ["en", "de", "code"], ["a", "b", "c"]


def running(budgets=(400, 300, 300), taken=250):
    stream = Mixture([0.4, 0.3, 0.3], budgets)
    served = stream.take(taken)
    return stream, served, takeover.ledger(NAMES, PRINTS)


def changed(stream, book, names, budgets, samples, **more):
    prints = [dict(zip(NAMES, PRINTS, strict=True)).get(name, "x") for name in names]
    K = len(names)
    limits = {"weights": np.full(K, 1 / K), "minimum": [0.0] * K, "maximum": [1.0] * K, **more}
    state = json.loads(json.dumps(stream.state_dict()))
    book = takeover.Ledger(*json.loads(json.dumps(book)))
    return takeover.changed(state, book, names, prints, budgets=budgets, samples=samples, **limits)


def test_every_difference_is_named_and_none_where_there_is_none():
    stream, _, book = running()
    state = json.loads(json.dumps(stream.state_dict()))

    def told(
        names=NAMES, prints=PRINTS, budgets=(400, 300, 300), samples=1000, low=(0.0,) * 3, high=(1.0,) * 3
    ):
        return takeover.differences(state, book, names, prints, budgets, samples, low, high)

    assert told() == []
    assert told(budgets=(500, 300, None)) == [
        "the budget of en was 400, it is 500",
        "the budget of code was 300, it is null",
    ]
    assert told(prints=["a", "z", "c"]) == ["the data of de had fingerprint b, it is z"]
    assert told(samples=1200) == ["the run had 1000 samples, it has 1200"]
    assert told(low=(0.0, 0.1, 0.0)) == ["the minimum of de was 0, it is 0.1"]
    other = told(names=["de", "en", "fr"], prints=["b", "a", "f"], budgets=(300, 400, 300))
    assert other == ["domain fr is new", "domain code is gone"]
    order = told(names=["de", "en", "code"], prints=["b", "a", "c"], budgets=(300, 400, 300))
    assert order == ["the order of the domains was en, de, code, it is de, en, code"]


def test_doubling_a_budget_mid_run_repeats_nothing_within_an_epoch():
    stream, (domain, position), book = running()
    seen = position[domain == 0].tolist()
    stream, book = changed(stream, book, NAMES, (800, 300, 300), 1400)
    domain, position = stream.take(1400 - 250)
    seen += position[domain == 0].tolist()
    assert stream.served.tolist() == [800, 300, 300] and seen == list(range(800))
    epoch, item = items(np.array(seen), 300, seed=1, domain=book.keys[0])
    assert Counter(Counter(zip(epoch.tolist(), item.tolist(), strict=True)).values()) == {1: 800}


def test_a_domain_joins_leaves_and_comes_back_where_it_stood():
    stream, _, book = running()
    before = dict(zip(NAMES, stream.served.tolist(), strict=True))
    stream, book = changed(stream, book, ["code", "fr", "en"], (300, 200, 400), 900 + before["de"])
    assert stream.index == 250 and stream.retired == before["de"]
    assert stream.served.tolist() == [before["code"], 0, before["en"]]
    assert book.keys == [2, 3, 0] and book.gone == {"de": (1, before["de"])}
    stream.take(100)
    then = stream.served.tolist()
    stream, book = changed(stream, book, ["de", "code", "en", "fr"], (300, 300, 400, 200), 1200)
    assert stream.served.tolist() == [before["de"], then[0], then[2], then[1]] and stream.retired == 0
    assert book.keys == [1, 2, 0, 3] and book.gone == {}
    stream.take(1200 - 350)
    assert stream.served.tolist() == [300, 300, 400, 200]


def test_same_domains_keep_targets_and_pending_changes_in_any_order():
    stream, _, book = running()
    stream.schedule([1.0, 0.0, 0.0], 300)
    again, _ = changed(stream, book, ["code", "en", "de"], (300, 400, 300), 1000, weights=[0.3, 0.4, 0.3])
    assert again.credit == pytest.approx(stream.credit[[2, 0, 1]])
    again.take(60)
    assert again.weights.tolist() == [0.0, 1.0, 0.0]


def test_impossible_changes_are_refused():
    stream, _, book = running()
    with pytest.raises(ValueError, match="served 100 of a budget of 50: raise it to at least 100"):
        changed(stream, book, NAMES, (50, 300, 300), 650)
    with pytest.raises(ValueError, match="lower them or train longer"):
        changed(stream, book, NAMES, (400, 300, 300), 900)
    with pytest.raises(ValueError, match="lower them or train longer"):
        changed(stream, book, NAMES, (600, 390, None), 1000)


def test_a_stock_run_is_taken_over_with_the_stock_counts():
    stock = takeover.stock_weights(["0.3", "0.3", "0.1"])
    served = [0, 0, 0]
    for i in range(1000):
        excess = [w * max(i, 1) - n for w, n in zip(stock, served, strict=True)]
        served[excess.index(max(excess))] += 1
    stream = takeover.attached(stock, 1000, [0.2, 0.2, 0.6], [500, 600, 900], samples=2000)
    assert stream.served.tolist() == served and stream.index == 1000
    assert stream.credit == pytest.approx(stock * 1000 - served)
    stream.take(1000)
    assert stream.served.tolist() == [500, 600, 900]
    with pytest.raises(ValueError, match="name the same domains"):
        takeover.attached(stock, 10, [1, 1])


def test_stock_weights_have_the_rounding_of_the_host():
    shares = [0.1, 0.7, 0.3, 0.9]
    total = 0.0
    for share in shares:
        total += share
    want = np.array([share / total for share in shares], dtype=np.float64)
    want /= np.sum(want)
    assert takeover.stock_weights([str(share) for share in shares]).tobytes() == want.tobytes()
