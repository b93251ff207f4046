"""The trainer's command line: bad input ends before anything starts, with one line, exit status 2 and nothing written."""

import json
import sys
import types

import jobs
import pytest
from indexed_files import LENGTH, write_domain


@pytest.fixture(scope="module")
def trainer():
    return jobs.trainer()


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Three domains of 400 sequences; two ranks, of which this is the first."""
    for seed, name in enumerate(("en", "ru", "code")):
        write_domain(tmp_path / name, 400, seed)
    for name, value in {"WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.chdir(tmp_path)
    return tmp_path


DOMAINS = {
    "en": "{path: en, weight: 0.6, holdout: 64, budget: 96}",
    "ru": "{path: ru, weight: 0.1, holdout: 64, budget: 16}",
    "code": "{path: code, weight: 0.3, holdout: 64, budget: 48}",
}


def mixture(folder, more="", mode="act", **domains):
    rows = "\n".join(f"  {name}: {text}" for name, text in {**DOMAINS, **domains}.items())
    path, rest = folder / "mixture.yaml", "probe: {samples: 8}\nevery: 4\nmeasure_budget: 1"
    path.write_text(f"domains:\n{rows}\nmode: {mode}\n{rest}\n{more}\n")
    return str(path)


def flags(file, *more):
    return ["--seq-length", str(LENGTH), "--global-batch-size", "8", "--micro-batch-size", "2", "--train-iters", "20",
            "--save", "out/run", *(["--commute", file] if file else []), *(str(word) for word in more)]  # fmt: skip


def refusal(trainer, folder, capsys, argv):
    """The one line on stderr of a refused start; nothing new in the folder, nothing on stdout."""
    before = sorted(path for path in folder.rglob("*"))
    with pytest.raises(SystemExit) as end:
        trainer.main(argv)
    told = capsys.readouterr()
    assert end.value.code == 2 and not told.out, told
    assert sorted(path for path in folder.rglob("*")) == before
    (line,) = told.err.splitlines()
    assert line.startswith("error: ")
    return line


def test_what_fits_is_prepared(trainer, data):
    args = trainer.parse(flags(mixture(data), "--valid-data-path", 1, "en", 1, "ru", 1, "code"))
    plugin, (names, sets) = trainer.prepare(args, 2)
    assert plugin.plan.budgets == (96, 16, 48) and names == ("en", "ru", "code") and len(sets) == 3
    assert plugin.plan.lead == 32 and plugin.run.data_parallel == 2 and plugin.run.prefetched == 4
    assert trainer.prepare(trainer.parse(flags(None, "--train-data-path", "en")), 2)[0] is None
    tensor = trainer.parse(flags(mixture(data), "--tensor-model-parallel-size", 2))
    assert trainer.prepare(tensor, 2)[0].run.data_parallel == 1


@pytest.mark.parametrize(
    ("written", "domains", "told"),
    [
        ("every_: 3", {}, "mixture.yaml:9: every_: unknown key"),
        ("", {"en": "{path: en, weight: 0.5, budget: 96}"}, "mixture.yaml:1: domains: the weights sum to 0.9"),
        ("", {"ru": "{path: nowhere, weight: 0.1, budget: 16}"}, "mixture.yaml:3: domains.ru.path: "),
    ],
)  # fmt: skip
def test_a_bad_mixture_file(trainer, data, capsys, written, domains, told):
    """A key, a sum and data that are not there; the messages are those of `plan`."""
    line = refusal(trainer, data, capsys, flags(mixture(data, written, **domains)))
    assert line.replace(f"{data}/", "").startswith(f"error: {told}")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--micro-batch-size", 3), "--global-batch-size 8: not a multiple of --micro-batch-size x data-parallel ranks"),
        (("--tensor-model-parallel-size", 3), "--tensor-model-parallel-size 3: does not divide the 2 ranks"),
        (("--train-iters", -1), "--train-iters -1: write a positive number"),
        (("--lr-warmup-iters", 20), "a warm-up of 20 steps leaves nothing of --train-iters 20; shorten the warm-up"),
        (("--lr-decay-style", "WSD"), "--lr-decay-style WSD: write --lr-wsd-decay-iters"),
        (("--deepspeed_config", "nowhere.json"), "--deepspeed_config"),
        (("--distributed-timeout-minutes", 0), "--distributed-timeout-minutes"),
        (("--num-workers", -1), "--num-workers and --save-interval: write 0 or a positive number"),
        (("--train-iters", 21), "the run has 168"),
        (("--valid-data-path", "en", "ru"), "--valid-data-path: en ru: write WEIGHT PREFIX pairs"),
        (("--valid-data-path", 1, "en"), "--valid-data-path: 1 domains, the mixture file has 3"),
        (("--valid-data-path", 1, "en", 1, "ru", 1, "short"), "--valid-data-path: short holds no whole sequence"),
    ],
)  # fmt: skip
def test_bad_flags(trainer, data, capsys, more, told):
    write_domain(data / "short", 0, 9)
    line = refusal(trainer, data, capsys, flags(mixture(data), *more))
    assert told in line


@pytest.mark.parametrize("file", [None, "shadow"])
def test_nothing_to_train_on(trainer, data, capsys, file):
    plain = {name: text.split(", budget")[0] + "}" for name, text in DOMAINS.items()}
    told = refusal(trainer, data, capsys, flags(file and mixture(data, mode="shadow", **plain)))
    assert told.startswith("error: --train-data-path: missing")


def test_one_rank_of_each_node_speaks(trainer, data, capsys, monkeypatch):
    for rank, local, speaks in ((1, 1, False), (8, 0, True)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(local))
        with pytest.raises(SystemExit) as end:
            trainer.main(flags("nowhere.yaml"))
        told = capsys.readouterr()
        assert end.value.code == 2 and told.out == "" and told.err.startswith("error: ") == speaks


def test_scalars_are_series_of_domains_from_the_first_line_after_a_resume_too(trainer, monkeypatch):
    written = []
    writer = types.SimpleNamespace(add_scalar=lambda *what: written.append(what), flush=lambda: None)
    module = types.SimpleNamespace(SummaryWriter=lambda directory: written.append(directory) or writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    listen = trainer.scalars("here", types.SimpleNamespace(names=("en", "ru"), budgets=(10, None)))
    listen({"event": "loss", "step": 5, "train": {"en": 2.5, "ru": None}, "served": {"en": 3, "ru": 1}})
    served = [("commute/served/en", 3, 5), ("commute/served/ru", 1, 5), ("commute/budget_left/en", 7, 5)]
    assert written == ["here", ("commute/train/en", 2.5, 5), *served]


def test_unknown_flags_and_abbreviations_end_with_status_2(trainer, data, capsys):
    for flag in ("--comute", "--commut"):
        with pytest.raises(SystemExit) as end:
            trainer.main([flag, "x"])
        assert end.value.code == 2 and flag in capsys.readouterr().err


def test_slices_are_megatrons(trainer):
    """Chunks of micro-batch x ranks consecutive samples; rank r takes the r-th micro-batch of each."""
    assert list(trainer.slices(8, 24, 2, 1, 4)) == [[10, 11], [18, 19]]
    every = [i for rank in range(4) for batch in trainer.slices(0, 32, 2, rank, 4) for i in batch]
    assert sorted(every) == list(range(32))


def test_engine_settings_come_from_the_flags(trainer, tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    args = trainer.parse(
        ["--deepspeed_config", str(file), "--bf16", "--global-batch-size", "24", "--micro-batch-size", "2"]
    )
    config = trainer.engine_config(args, 3)
    assert config["gradient_accumulation_steps"] == 4 and config["train_micro_batch_size_per_gpu"] == 2
    assert config["bf16"] == {"enabled": True} and config["zero_optimization"] == {"stage": 2}
