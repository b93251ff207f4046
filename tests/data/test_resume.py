"""A mixture file that changed between stop and restart: every difference named, and what holds from where."""

import json

import numpy as np
import pytest
import torch
from indexed_files import write_domain

from megatron_commute import reduce
from megatron_commute.adapters import torch_loop
from megatron_commute.config import ConfigError, Run
from megatron_commute.record import log as record

LENGTH, BATCH, STEPS = 8, 4, 24
FILE = """
domains:
  en: {path: en, weight: 0.75, budget: 72, holdout: 64, min: 0.1, max: 0.9}
  ru: {path: ru, weight: 0.25, budget: 24, holdout: 64}
mode: act
every: 10
lead: 16
seed: 5
measure_budget: 1
target: {en: 0.5, ru: 0.5}
probe: {samples: 8, splits: 2, method: difference, metric: identity, memory: full, offload: false, time_limit: 60}
controller: {law: tilt, strength: 1, rate: 0.3, confidence: 0.9, floors: 0.1, caps: {en: 0.8}, cooldown: 1,
  freeze: 0.9, compare: [hold]}
"""
CHANGES = {  # what is written instead of what -> how the difference is told
    "mode: act": ("mode: fixed", "mode was act, it is fixed"),
    "every: 10": ("every: 5", "every was 10, it is 5"),
    "lead: 16": ("lead: 24", "lead was 16, it is 24"),
    "seed: 5": ("seed: 6", "seed was 5, it is 6"),
    "target: {en: 0.5, ru: 0.5}": ("target: {en: 1, ru: 0}", 'target was {"en": 0.5, "ru": 0.5}, it is {"en": 1.0, "ru": 0.0}'),
    "samples: 8": ("samples: 4", "probe.samples was 8, it is 4"),
    "splits: 2": ("splits: 4", "probe.splits was 2, it is 4"),
    "method: difference": ("method: exact", "probe.method was difference, it is exact"),
    "metric: identity": ("metric: adam", "probe.metric was identity, it is adam"),
    "memory: full": ("memory: scores", "probe.memory was full, it is scores"),
    "offload: false": ("offload: true", "probe.offload was false, it is true"),
    "time_limit: 60": ("time_limit: 30", "probe.time_limit was 60.0, it is 30.0"),
    "law: tilt": ("law: hold", "controller.law was tilt, it is hold"),
    "strength: 1": ("strength: 2", "controller.strength was 1.0, it is 2.0"),
    "rate: 0.3": ("rate: 0.2", "controller.rate was 0.3, it is 0.2"),
    "confidence: 0.9": ("confidence: 0.95", "controller.confidence was 0.9, it is 0.95"),
    "floors: 0.1": ("floors: {ru: 0.1}", "controller.floors.en was 0.1, it is 0.0"),
    "caps: {en: 0.8}": ("caps: {en: 0.85}", "controller.caps.en was 0.8, it is 0.85"),
    "cooldown: 1": ("cooldown: 2", "controller.cooldown was 1, it is 2"),
    "freeze: 0.9": ("freeze: 0.8", "controller.freeze was 0.9, it is 0.8"),
    "compare: [hold]": ("compare: []", 'controller.compare was ["hold"], it is []'),
    "holdout: 64, min": ("holdout: 80, min", "domains.en.holdout was 64, it is 80"),
    "budget: 72": ("budget: null", "the budget of en was 72, it is null"),
    "min: 0.1": ("min: 0.2", "the minimum of en was 0.1, it is 0.2"),
    "max: 0.9": ("max: 0.78", "the maximum of en was 0.8, it is 0.78"),
}  # fmt: skip
LEFT_OUT = {
    "measure_budget: 1": "measure_budget: 0.5",
    "\nmode": "\n# a note\nmode",
    "every: 10": "every: 1e1",
}


class Words(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scores = torch.nn.Parameter(torch.zeros(32))

    def forward(self, tokens):
        return -torch.log_softmax(self.scores, 0)[tokens].mean()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    for seed, name in enumerate(("en", "ru")):
        write_domain(path / name, 400, seed)
    return path


def attached(folder, text, place, state=None, **more):
    (folder / "mixture.yaml").write_text(text)
    plugin, said = torch_loop.Plugin(str(folder / "mixture.yaml"), Run(LENGTH, BATCH, 2, 1, STEPS)), []
    model = torch_loop.probe_model(Words(), lambda module, tokens: module(tokens), 4)
    state = None if state is None else json.loads(state)
    plugin.attach(
        model, reduce.Groups(), folder / place, lambda step: 1e-2, 0.0, state=state, say=said.append, **more
    )
    return plugin.hook, said


def checkpoint(folder, text=FILE, place="run", steps=3):
    hook, _ = attached(folder, text, place)
    for step in range(steps):
        hook.begin(step)
        hook.end(np.zeros(BATCH), np.zeros((BATCH, LENGTH + 1), dtype=np.int64), None)
        hook.log_losses(step + 1)
    return json.dumps(hook.state_dict())


def test_every_setting_that_steers_a_run_is_compared(folder):
    """Each is changed alone; the list is complete: what the file may say is here or says why not."""
    from megatron_commute.settings.mixture_file import CONTROLLER_KEYS, DOMAIN_KEYS, FILE_KEYS, PROBE_KEYS

    keys = {*FILE_KEYS, *DOMAIN_KEYS, *PROBE_KEYS, *CONTROLLER_KEYS}
    told = " ".join(
        sentence.replace("minimum", "min").replace("maximum", "max") for _, sentence in CHANGES.values()
    )
    untold = {key for key in keys if key not in told}
    assert untold == {"path", "weight", "schedule", "measure_budget"}  # below, in takeover, or a warning
    kept = checkpoint(folder)
    for old, (new, sentence) in CHANGES.items():
        assert FILE.count(old) == 1, old
        with pytest.raises(ConfigError) as error:
            attached(folder, FILE.replace(old, new), "run", kept)
        assert sentence in str(error.value) and "--commute-accept" in str(error.value), (
            old,
            str(error.value),
        )
        assert "\n" not in str(error.value)


def test_all_differences_stand_in_one_message_and_none_where_there_is_none(folder):
    kept = checkpoint(folder)
    text = FILE
    for key in ("every: 10", "rate: 0.3", "samples: 8"):
        text = text.replace(key, CHANGES[key][0])
    with pytest.raises(ConfigError) as error:
        attached(folder, text, "run", kept)
    assert all(CHANGES[key][1] in str(error.value) for key in ("every: 10", "rate: 0.3", "samples: 8"))
    for old, new in LEFT_OUT.items():
        assert attached(folder, FILE.replace(old, new, 1), "run", kept)[0].stream.index == 3 * BATCH


def test_accepted_the_record_tells_what_holds_from_where_and_the_stream_goes_on(folder):
    kept = checkpoint(folder, place="accepted")
    old, served = record.read(folder / "accepted"), json.loads(kept)["mixture"]
    hook, said = attached(folder, FILE.replace("every: 10", "every: 5"), "accepted", kept, accept=True)
    start = record.read(folder / "accepted")[0]
    assert start["event"] == "start" and start["every"] == 5 and start["sample"] == 3 * BATCH
    assert start["news"] == ["every was 10, it is 5"] and "note: every was 10, it is 5" in said
    assert hook.stream.consumed.state_dict() == served  # the probes' setting moves no sample
    assert record.read(folder / "accepted" / "commute.jsonl.discarded-1") == old
    assert attached(folder, FILE.replace("every: 10", "every: 5"), "accepted", json.dumps(hook.state_dict()))


def test_other_weights_hold_from_the_restart_on(folder):
    text = "domains: {en: {path: en, weight: 0.75, holdout: 64}, ru: {path: ru, weight: 0.25, holdout: 64}}\n"
    text += "mode: fixed\nprobe: {samples: 8, splits: 2}\nlead: 16\n"
    kept = checkpoint(folder, text, "weights")
    other = text.replace("0.75", "0.5").replace("0.25", "0.5")
    with pytest.raises(ConfigError, match=r"domains.en.weight was 0.75, it is 0.5; domains.ru.weight was"):
        attached(folder, other, "weights", kept)
    hook, _ = attached(folder, other, "weights", kept, accept=True)
    assert hook.stream.weights.tolist() == [0.5, 0.5]


def test_a_schedule_taken_away_or_edited_is_noticed(folder):
    text = "domains: {en: {path: en, holdout: 64}, ru: {path: ru, holdout: 64}}\nmode: fixed\nlead: 16\n"
    text += "probe: {samples: 8, splits: 2}\nschedule: plan.csv\n"
    (folder / "plan.csv").write_text("at,en,ru\n0,0.5,0.5\n50%,0.2,0.8\n")
    kept = checkpoint(folder, text, "planned")
    (folder / "plan.csv").write_text("at,en,ru\n0,0.5,0.5\n50%,0.3,0.7\n")
    with pytest.raises(ConfigError, match="the schedule's coming changes are others"):
        attached(folder, text, "planned", kept)
    without = text.replace("schedule: plan.csv\n", "").replace("{path:", "{weight: 0.5, path:")
    with pytest.raises(ConfigError, match="schedule was a file, it is null"):
        attached(folder, without, "planned", kept)
    hook, _ = attached(folder, without, "planned", kept, accept=True)
    assert hook.stream.consumed.state_dict()["pending"] == []


def test_a_run_that_leaves_shadow_says_that_every_domain_goes_on_in_a_new_order(folder):
    text = FILE.replace(", budget: 72", "").replace(", budget: 24", "")
    kept = checkpoint(folder, text.replace("mode: act", "mode: shadow"), "shadow")
    with pytest.raises(ConfigError, match=r"mode was shadow, it is act.*NEW order"):
        attached(folder, text, "shadow", kept)
    _, said = attached(folder, text, "shadow", kept, accept=True)
    assert any("every domain goes on in a NEW order from sample 12 on" in line for line in said)
    assert "NEW order" in " ".join(record.read(folder / "shadow")[0]["news"])


def test_a_checkpoint_that_keeps_no_settings_goes_on(folder):
    """Of version 0.2.0, which kept lead and seed alone."""
    kept = json.loads(checkpoint(folder, place="older"))
    del kept["settings"]
    assert attached(folder, FILE, "older", json.dumps(kept))[0].stream.index == 3 * BATCH
    with pytest.raises(ConfigError, match="seed was 5, it is 6"):
        attached(folder, FILE.replace("seed: 5", "seed: 6"), "older", json.dumps(kept))
