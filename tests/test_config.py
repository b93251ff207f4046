"""The mixture file: what is accepted, and the exact words for everything that is not."""
# ruff: noqa: E501  (messages stand in one piece, so that they can be searched)

import dataclasses

import pytest

from megatron_commute.config import ConfigError, load
from megatron_commute.decide import flow
from megatron_commute.settings import cut_keys, mixture_file
from megatron_commute.settings.mixture_file import MODES

TWO = "domains:\n  en: {path: en}\n  ru: {path: ru}\n"


def written(tmp_path, content):
    path = tmp_path / "mixture.yaml"
    path.write_text(content, encoding="utf-8")
    return path


def refusal(tmp_path, content):
    """The one message that a file ends with, without the folder."""
    with pytest.raises(ConfigError) as caught:
        load(written(tmp_path, content))
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{tmp_path}/", "")


EVERY_KEY = """
domains:
  en: {path: [en/a, en/b], weight: 0.75, budget: 600, min: 0.1, max: 0.9, holdout: 300}
  ru:
    path: /data/ru
    weight: 0.25
    budget: 3.2ktok
    holdout: held/ru
target: {en: 0.5, ru: 0.5}
mode: act
every: 20
lead: 64
seed: 7
probe: {samples: 32, splits: 2, method: exact, metric: identity, memory: scores, offload: false, time_limit: 60}
controller:
  law: hold
  strength: 0.5
  memory: 2
  rate: 0.1
  confidence: 0.9
  floors: 0.05
  caps: {en: 0.8}
  cooldown: 3
  freeze: 0.9
  compare: [tilt, tau-tail]
schedule: null
measure_budget: 0.01
"""


def test_every_key_is_read(tmp_path):
    config = load(written(tmp_path, EVERY_KEY))
    en, ru = config.domains
    assert en.path == (f"{tmp_path}/en/a", f"{tmp_path}/en/b") and ru.path == ("/data/ru",)
    assert (en.weight, en.minimum, en.maximum, en.holdout) == (0.75, 0.1, 0.9, 300)
    assert (en.budget.sequences(16), ru.budget.sequences(16)) == (600, 200)
    assert ru.holdout == f"{tmp_path}/held/ru"
    assert config.target == {"en": 0.5, "ru": 0.5} and config.mode == "act"
    assert (config.every, config.lead, config.seed, config.schedule) == (20, 64, 7, None)
    assert dataclasses.astuple(config.probe) == (32, 2, "exact", "identity", "scores", False, 60.0)
    law = config.controller
    assert dataclasses.astuple(law)[:7] == ("hold", 0.5, 2.0, 0.1, 0.9, (0.05, 0.05), (0.8, 1.0))
    assert (law.cooldown, law.freeze, law.compare) == (3, 0.9, ("tilt", "tau-tail"))
    assert config.measure_budget == 0.01
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.mode = "shadow"


def test_defaults(tmp_path):
    config = load(written(tmp_path, TWO))
    assert (config.mode, config.every, config.lead, config.seed) == ("shadow", 1000, None, 1234)
    assert (config.target, config.schedule, config.measure_budget) == (None, None, 0.005)
    assert dataclasses.astuple(config.probe) == (64, 4, "difference", "adam", "auto", False, None)
    law = config.controller
    assert dataclasses.astuple(law)[:7] == ("tilt", 1.0, 2.5, 0.05, 0.95, (0.0, 0.0), (1.0, 1.0))
    laws = {mode: load(written(tmp_path, f"{TWO}mode: {mode}\n")).controller for mode in MODES}
    told = {mode: (law.law, law.rate) for mode, law in laws.items()}
    assert told == {"shadow": ("tilt", 0.05), "fixed": ("tilt", 0.05), "act": ("flow", 1.0)}
    assert law.memory == flow.MEMORY
    slow = load(written(tmp_path, f"{TWO}mode: act\ncontroller: {{rate: 0.05}}\n")).controller
    assert (slow.law, slow.rate) == ("flow", 0.05)
    assert (law.cooldown, law.freeze, law.compare) == (1, 1.0, ())
    assert [(d.weight, d.budget, d.minimum, d.maximum, d.holdout) for d in config.domains] == [
        (None, None, 0.0, 1.0, None)
    ] * 2


def test_digest_is_of_the_content_not_of_the_layout(tmp_path):
    def digest(text):
        return load(written(tmp_path, text)).digest

    same = "# a comment\ndomains: {en: {path: 'en'}, ru: {path: ru}}"
    assert digest(TWO) == digest(same) != digest(TWO + "seed: 1\n")
    assert digest(TWO) != digest("domains: {ru: {path: ru}, en: {path: en}}"), "the order of domains counts"


# Each: what is written below two domains, and the whole complaint (line 4 is the first one added).
ADDED = [
    ("evry: 5", "4: evry: unknown key; known here: KEYS (did you mean every?)"),
    ("every: 0", "4: every: got 0; write a positive number of training steps between two probes"),
    ("every: yes", '4: every: got yes; write a positive number of training steps between two probes'),
    ("lead: -1", "4: lead: got -1; write a positive number of samples, or null for 4 global batches"),
    ("seed: -3", "4: seed: got -3; write an integer that is not negative"),
    ("mode: actt", "4: mode: got actt; write one of shadow, fixed, act (did you mean act?)"),
    ("measure_budget: 0", "4: measure_budget: got 0; write a share of the training compute, such as 0.005"),
    ("schedule: 3", "4: schedule: got 3; write the path of a CSV file, or null"),
    ("schedule: s.csv", "4: schedule: is followed in mode fixed only; write mode: fixed"),
    ("probe: 64", "4: probe: got 64; write a mapping with the keys samples, splits, method, metric, memory, offload, time_limit"),
    ("probe:\n  samples: 0", "5: probe.samples: got 0; write a positive number of sequences"),
    ("probe:\n  samples: 66", "5: probe.samples: 66 is not divisible by the 4 splits; write 68, or other probe.splits"),
    ("probe:\n\n  splits: 1", "6: probe.splits: got 1; write 2 or more, standard errors come from the splits"),
    ("probe:\n  method: differance", "5: probe.method: got differance; write one of difference, exact, fused (did you mean difference?)"),
    ("probe: {metric: sgd}", "4: probe.metric: got sgd; write one of identity, adam"),
    ("probe: {memory: score}", "4: probe.memory: got score; write one of auto, full, sharded, scores (did you mean scores?)"),
    ("probe: {memory: sharded, method: fused}", "4: probe.memory: method fused needs whole parameters on every rank; write full or scores, or method: difference"),
    ("probe: {offload: 1}", "4: probe.offload: got 1; write true or false"),
    ("probe: {offload: true, method: exact}", "4: probe.offload: method exact needs its direction beside the parameters; write false, or method: difference"),
    ("probe: {time_limit: 0}", "4: probe.time_limit: got 0; write a positive number of seconds, or null"),
    ("probe: {sample: 8}", "4: probe.sample: unknown key; known here: samples, splits, method, metric, memory, offload, time_limit (did you mean samples?)"),
    ("controller: {strength: 0}", "4: controller.strength: got 0; write a positive number"),
    ("controller: {memory: -1}", "4: controller.memory: got -1; write a number of 0 or more, such as 2.5"),
    ("controller: {rate: 1.5}", "4: controller.rate: got 1.5; write the largest change of a weight in one decision, such as 0.05"),
    ("controller: {confidence: 1}", "4: controller.confidence: got 1; write a probability from 0.5 to below 1, such as 0.95"),
    ("controller: {floors: 2}", "4: controller.floors: got 2; write a share between 0 and 1"),
    ("controller:\n  caps:\n    rus: 0.5", "6: controller.caps.rus: there is no such domain; the domains are en, ru (did you mean ru?)"),
    ("controller: {cooldown: -1}", "4: controller.cooldown: got -1; write the number of decisions to rest after a change, 0 or more"),
    ("controller: {freeze: 0}", "4: controller.freeze: got 0; write a part of the run above 0, such as 0.9; 1: never"),
    ("controller: {law: 3}", "4: controller.law: got 3; write the name of a law, such as flow or hold"),
    ("controller: {compare: tilt}", "4: controller.compare: got tilt; write a list of laws, such as [hold, tilt]"),
    ("controller: {floors: 0.4, caps: {ru: 0.3}}", "4: controller.floors: 0.4 is above the cap 0.3 of ru; write a lower floor or a higher cap"),
    ("target: all", "4: target: got all; write shares of the domains that sum to 1, such as {en: 0.5, ru: 0.5}, or each, or null"),
    ("target: {en: 0.6, ru: 0.5}", '4: target: got {"en": 0.6, "ru": 0.5}; these sum to 1.1, write shares of the domains that sum to 1, such as {en: 0.5, ru: 0.5}, or each, or null'),
    ("target: {en: 0.5, xx: 0.5}", "4: target.xx: there is no such domain; the domains are en, ru"),
    ("target: each\nmode: act", "4: target: mode act cannot act on several targets at once; write shares of the domains, or mode: shadow"),
    ("seed: 1\nseed: 2", "5: seed: the key is written twice; keep one of the two"),
    ("seed: [1", "5: is not YAML: expected ',' or ']', but got '<stream end>'; correct the line"),
]  # fmt: skip


@pytest.mark.parametrize(("added", "message"), ADDED, ids=[added for added, _ in ADDED])
def test_bad_key(tmp_path, added, message):
    message = message.replace("KEYS", ", ".join(mixture_file.FILE_KEYS))
    assert refusal(tmp_path, TWO + added + "\n") == f"mixture.yaml:{message}"


SHARE = "write a share between 0 and 1"
BUDGET = "write a positive number of sequences (12000), of tokens (3.1Mtok), or null"
HOLDOUT = "write a positive number of sequences or the prefix of a .bin/.idx pair"
DOMAIN = [
    ("path: en.bin", "path: got en.bin; write the prefix without its ending: en"),
    ("path: []", "path: got []; write the prefix of a .bin/.idx pair, or a list of them"),
    ("weight: 0.5", "path: missing; write the prefix of a .bin/.idx pair"),
    ("path: ru", "path: ru is read by domain ru already; name every prefix once"),
    ("path: en, weight: 9/10", f"weight: got 9/10; {SHARE}"),
    ("path: en, budget: 3.1Mb", f"budget: got 3.1Mb; {BUDGET}"),
    ("path: en, budget: 0.5tok", f"budget: got 0.5tok; {BUDGET}"),
    ("path: en, min: 1.1", f"min: got 1.1; {SHARE}"),
    ("path: en, max: -1", f"max: got -1; {SHARE}"),
    ("path: en, min: 0.6, max: 0.5", "min: 0.6 is above max 0.5; write a lower one"),
    ("path: en, holdout: 0", f"holdout: got 0; {HOLDOUT}"),
    ("path: en, holdout: held.idx", "holdout: got held.idx; write the prefix without its ending: held"),
    ("path: en, holdout: ru", "holdout: is trained on as well; name a prefix of its own"),
    ("path: en, weigth: 1", "weigth: unknown key; known here: path, weight, budget, min, max, holdout (did you mean weight?)"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "message"), DOMAIN, ids=[body for body, _ in DOMAIN])
def test_bad_domain(tmp_path, body, message):
    content = f"domains:\n  ru: {{path: ru}}\n  en: {{{body}}}\n"
    assert refusal(tmp_path, content) == f"mixture.yaml:3: domains.en.{message}"


@pytest.mark.parametrize(
    ("budget", "tokens"),
    [("7tokens", 7), ("3.1Mtok", 3_100_000), ("0.7Btok", 7 * 10**8), ("1.2Ttok", 12 * 10**11)],
)
def test_token_budgets_are_exact(tmp_path, budget, tokens):
    config = load(written(tmp_path, f"domains: {{en: {{path: en, budget: {budget}}}}}"))
    assert (config.domains[0].budget.sequences(1), config.domains[0].budget.unit) == (tokens, "tokens")


CUT = [
    ("response: {kind: off}", "4: response: was cut in 0.2.0; remove the key, order effects are not measured in a run any more"),
    ("controller:\n  rate: 0.1\n  harm: 0.002", "6: controller.harm: was cut in 0.2.0; write it to the command, design --harm, and remove the key here"),
    ("controller: {gate: 1}", "4: controller.gate: was cut in 0.2.0; remove the key, no law that is left predicts its gain"),
    ("controller: {end: {share: 0.1}}", "4: controller.end: was cut in 0.2.0; write the end of the run into a schedule: FILE, mode: fixed, and remove the key here"),
    ("probe: {direction: local}", "4: probe.direction: was cut in 0.2.0; remove the key, probes of a run are local; code that measures offline hands a direction over"),
    ("controller: {law: finish}", "4: controller.law: finish was cut in 0.2.0 (it gained 0.3 % at best); write flow or hold"),
    ("controller: {law: response}", "4: controller.law: response was cut in 0.2.0 (lock-in, which it needs, had 5 of 14 signs right); write flow or hold"),
    ("controller: {law: receding}", "4: controller.law: receding was cut in 0.2.0 (it plans on a model that no running job keeps); write flow or hold"),
    ("controller: {compare: [hold, finish]}", "4: controller.compare: finish was cut in 0.2.0 (it gained 0.3 % at best); leave it out"),
]  # fmt: skip


@pytest.mark.parametrize(("added", "message"), CUT, ids=[added for added, _ in CUT])
def test_what_was_cut_is_named_with_the_version_and_what_to_write_instead(tmp_path, added, message):
    assert refusal(tmp_path, TWO + added + "\n") == f"mixture.yaml:{message}"


def test_every_cut_has_its_message():
    assert {message.split(": ")[1] for _, message in CUT} >= set(cut_keys.CUT)
    assert {law for law in cut_keys.CUT_LAWS if f"controller: {{law: {law}}}" in dict(CUT)} == set(
        cut_keys.CUT_LAWS
    )


def test_every_key_has_a_refusal():
    refused = {message.split(": ")[1] for _, message in ADDED} | {
        f"domains.NAME.{m.split(':')[0]}" for _, m in DOMAIN
    }
    sections = {
        "": "FILE_KEYS",
        "domains.NAME.": "DOMAIN_KEYS",
        "probe.": "PROBE_KEYS",
        "controller.": "CONTROLLER_KEYS",
    }
    known = {prefix + key for prefix, name in sections.items() for key in getattr(mixture_file, name)}
    assert {
        key for key in known if not any(got == key or got.startswith(f"{key}.") for got in refused)
    } == set()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "mixture.yaml: is not a mapping of keys; write at least domains: {NAME: {path: PREFIX}}"),
        ("- en", "mixture.yaml: is not a mapping of keys; write at least domains: {NAME: {path: PREFIX}}"),
        ("seed: 1", "mixture.yaml: domains: no domain is named; write at least one domain, such as domains: {en: {path: data/en}}"),
        ("domains: {}", "mixture.yaml:1: domains: no domain is named; write at least one domain, such as domains: {en: {path: data/en}}"),
        ("domains:\n  7: {path: a}", "mixture.yaml:2: domains.7: is no name; use letters, digits, - and _, in quotes if all are digits"),
        ("domains:\n  en: {path: a}\n  en: {path: b}", "mixture.yaml:3: en: the key is written twice; keep one of the two"),
        ("domains: !!python/object:os.system {}", "mixture.yaml:1: domains: no domain is named; write at least one domain, such as domains: {en: {path: data/en}}"),
        ("a: 1\n---\nb: 2", "mixture.yaml:2: is not YAML: but found another document; correct the line"),
    ],
)  # fmt: skip
def test_bad_file(tmp_path, content, message):
    assert refusal(tmp_path, content) == message


def test_unreadable_files(tmp_path):
    with pytest.raises(
        ConfigError, match=r"none\.yaml: cannot be read: No such file or directory; name a mixture"
    ):
        load(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes("domains: {é: {path: a}}".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.yaml:1: is not UTF-8 text; save it as UTF-8"):
        load(tmp_path / "latin.yaml")


def test_line_of_a_key_merged_from_an_anchor(tmp_path):
    content = "x: &same {weight: 2}\n"
    assert refusal(tmp_path, content + TWO).startswith("mixture.yaml:1: x: unknown key")
    content = "domains:\n  en: &same\n    path: en\n    weight: 2\n  ru:\n    <<: *same\n    path: ru\n"
    assert refusal(tmp_path, content).startswith("mixture.yaml:4: domains.en.weight: got 2")
