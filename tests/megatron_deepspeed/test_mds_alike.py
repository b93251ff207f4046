"""A stale copy of a file on one rank ends the run before a model is built, naming ranks and files."""

import shutil

import jobs
import pytest
import ranks
from planned_jobs import Jobs

from megatron_commute import config, mixture
from megatron_commute.adapters import alike


@pytest.fixture
def data(tmp_path):
    jobs.write_data(str(tmp_path), 30, ("english", "russian", "code"))
    jobs.write_mixture(str(tmp_path), mode="fixed")
    return tmp_path


def copied(data, name):
    """The folder of `data` as another node would hold it: other paths, the same content."""
    folder = data.with_name(f"{data.name}-{name}")
    shutil.copytree(data, folder)
    file = folder / "mixture.yaml"
    file.write_text(file.read_text().replace(f"{data}/", ""))
    return folder


def told(rank, files):
    """What `refuse_unlike` says on this rank of a gloo job; None for nothing."""
    try:
        alike.refuse_unlike(alike.facts(config.load(files[rank])))
    except config.ConfigError as error:
        return str(error)


def both(one, other):
    return ranks.run(told, 2, [str(one / "mixture.yaml"), str(other / "mixture.yaml")])


def test_copies_of_the_same_content_pass(data):
    assert both(copied(data, "a"), copied(data, "b")) == [None, None]


@pytest.mark.parametrize("what", ["the mixture file", "data of russian", "holdout of code"])
def test_one_other_file_is_named_with_its_rank_on_every_rank(data, what):
    one, other = copied(data, "a"), copied(data, "b")
    file = other / "mixture.yaml"
    if what == "the mixture file":
        file.write_text(
            file.read_text().replace("budget: 192", "budget: 182").replace("budget: 32", "budget: 42")
        )
    elif what == "data of russian":
        jobs.write_data(str(other), 31, ("english", "russian", "code"))
        for name in ("english", "code"):
            for end in ("bin", "idx"):
                shutil.copy(one / f"{name}_train.{end}", other / f"{name}_train.{end}")
    else:
        for folder, prefix in ((one, "code_valid"), (other, "russian_valid")):
            text = (folder / "mixture.yaml").read_text()
            (folder / "held.idx").write_bytes((folder / f"{prefix}.idx").read_bytes())
            (folder / "held.bin").write_bytes((folder / f"{prefix}.bin").read_bytes())
            text = text.replace("code: {", "code: {holdout: held, ")
            (folder / "mixture.yaml").write_text(text)
    words = both(one, other)
    assert words[0] == words[1] and words[0].startswith(f"--commute: ranks differ in {what}: rank 0 ")
    assert words[0].count("rank 0 ") == 1 and str(other) in words[0] and "rank 1 " in words[0]


def test_schedule_version_and_arithmetic_are_compared(data, monkeypatch):
    (data / "plan.csv").write_text("at,english,russian,code\n0,0.6,0.1,0.3\n")
    text = (data / "mixture.yaml").read_text()
    (data / "mixture.yaml").write_text(text + "schedule: plan.csv\n")
    here = config.load(str(data / "mixture.yaml"))
    before = alike.facts(here)
    (data / "plan.csv").write_text("at,english,russian,code\n0,0.5,0.2,0.3\n")
    monkeypatch.setattr(mixture, "stretch", None if mixture.stretch else object())
    monkeypatch.setattr(alike.megatron_commute, "__version__", "9.9")
    after = alike.facts(here)
    assert {what for what in before if before[what] != after[what]} == {
        "the schedule", "megatron_commute", "the mixture's arithmetic"
    }  # fmt: skip


def test_many_ranks_are_told_in_short():
    same, other = {"x": ["aa", "/a"]}, {"x": ["bb", "/b"]}
    words = alike.differences([other, *[same] * 20, other])
    assert words == "ranks differ in x: ranks 0 21 bb (/b), ranks 1 2 3 4 5 6 7 8 and 12 more aa (/a)"


def test_the_host_ends_before_a_model_is_built(scratch, tmp_path):
    here = Jobs(scratch, tmp_path, "zero1")
    stale = tmp_path / "stale.yaml"
    text = (here.data / "fixed.yaml").read_text()
    stale.write_text(text.replace("budget: 96", "budget: 86").replace("budget: 16", "budget: 26"))
    file = str(here.data / "fixed.yaml")
    here.add("stale", "--commute", file, words_of_ranks={"1": {file: str(stale)}})
    seen = here.run()
    assert not any(rank["losses"] for rank in seen["stale"])
    log = here.log("stale")
    assert "error: --commute: ranks differ in the mixture file: rank 0 " in log and str(stale) in log
    assert "building GPT model" not in log
    assert (tmp_path / "stale/codes.json").read_text() == "[2, 2]"
