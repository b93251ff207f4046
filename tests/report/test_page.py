"""The report as HTML: whole, escaped, without network; what a run or an analysis says, and what it lacks."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import records

from megatron_commute.record import shape
from megatron_commute.report import page as report
from megatron_commute.report import plots, series

ANALYSIS_OF_0_1 = Path(__file__).parents[2] / "launch" / "results" / "quickstart_analysis.jsonl"


class Page(HTMLParser):
    """Tags, attributes and words of a page, and the number of rows of each table."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.rows, self.words, self.table = [], [], {}, [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag == "table":
            self.table = dict(attributes)["id"]
            self.rows[self.table] = 0
        if tag == "tr" and self.table:
            self.rows[self.table] += 1

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


def words(lines):
    """The page without pictures."""
    return Page(report.page(series.by_event(lines), []))


def page(folder, torn=False, lines=None, **options):
    path = plots.report(records.write(folder, lines or records.lines(**options), torn))
    return Page(path.read_text(encoding="utf-8")), path


def test_one_file_without_network(tmp_path):
    read, path = page(tmp_path, K=3)
    assert read.tags.count("svg") == 7
    assert not {"link", "img", "image", "iframe", "object"} & set(read.tags)
    for _, name, value in read.attributes:
        if name in ("src", "href", "xlink:href", "action"):
            assert value.startswith("#")
        assert "url(http" not in (value or "")
    named = [value for _, name, value in read.attributes if name == "id"]
    assert len(named) == len(set(named))
    pointed = {value[1:] for _, name, value in read.attributes if name in ("href", "xlink:href")}
    pointed |= set(re.findall(r"url\(#([^)]*)\)", path.read_text(encoding="utf-8")))
    assert pointed and pointed <= set(named)


@pytest.mark.parametrize("made", [lambda lines: lines, records.analysed], ids=["run", "analysis"])
def test_markup_in_names_and_reasons_stays_text(tmp_path, made):
    evil = ["<script>alert(1)</script>", "\"><img src=x onerror='y'>", "a & b"]
    lines = made(records.lines(names=evil, skips=(0,)))
    for line in lines:
        if line["event"] == "probe":
            line["reason"] = "<b onclick=z>because</b>"
    read, _ = page(tmp_path, lines=lines)
    assert read.tags.count("script") == 1
    assert not {"img", "b"} & set(read.tags)
    assert not [name for _, name, _ in read.attributes if name.startswith("on")]
    for word in [*evil, *(["<b onclick=z>because</b>"] if made is not records.analysed else [])]:
        assert word in read.text


def test_what_people_wrote_into_the_control_file_is_listed():
    lines = records.lines()
    wrote = {"event": "control", "schema": 1, "step": 7, "sample": 448}
    lines[1:1] = [
        wrote | {"freeze": True, "effective_sample": 512},
        wrote | {"error": "file:1: freeze: got <b>"},
    ]
    read = words(lines)
    assert (
        "freeze True" in read.text
        and "sample 512" in read.text
        and "ignored: file:1: freeze: got <b>" in read.text
    )


@pytest.mark.parametrize("mode", ["act", "shadow", "fixed"])
def test_acting_uncalibrated_is_said_loudly(mode):
    read, loud = words(records.lines(mode=mode)), mode == "act"
    assert (("p", "class", "loud") in read.attributes) == loud
    assert ("Acting on an uncalibrated signal" in read.text) == loud


def test_a_record_of_0_1_0_with_measured_responses_is_read_without_them():
    """Events and fields that are no more are passed over; everything else is as in a record without them."""
    own, old = (words(lines) for lines in (records.lines(), records.of_0_1_0(records.lines())))
    assert own.text == old.text and "lock-in" not in old.text and "Decisions" in old.text


def test_every_decision_and_every_skip_is_listed():
    lines = records.lines(skips=(1, 4, 5, 6))
    read = words(lines)
    events = [line["event"] for line in lines]
    assert read.rows["decisions"] == 1 + events.count("probe")
    assert read.rows["skips"] == 1 + events.count("skip") == 5
    assert "loss of code is not finite on rank 1; probing is off from here on" in read.text
    assert f"{events.count('probe')} finished, 4 skipped" in read.text
    for line in lines:
        if line["event"] == "probe" and line["effective_sample"]:
            assert f"sample {line['effective_sample']:,}" in read.text


def test_what_the_record_lacks_is_said(tmp_path):
    assert "lacks" not in words(records.lines(K=3)).text
    lines = records.lines(K=3, finished=False, endless=(0, 1, 2))
    lines[0]["warnings"] = ["weight and budget share of code differ by 3 %"]
    for line in lines:
        line.pop("valid", None)
        if line["event"] == "loss":
            line["train"]["code"] = None
        if line["event"] == "probe":
            line.pop("score")
            line["P_se"] = [[None] * 3] * 3
    read, _ = page(tmp_path, torn=True, lines=lines)
    for sentence in (
        "The last line is torn",
        "There is no end line",
        "No training loss of code was recorded",
        "No validation loss of english, russian, code was recorded",
        "No probe has a full score",
        "Some P have no standard error",
        "No domain has a budget",
        "Note: weight and budget share of code differ by 3 %",
    ):
        assert sentence in read.text


def test_a_run_that_ended_early_tells_what_is_left_of_its_budgets(tmp_path):
    lines = records.lines(K=3, endless=(2,))
    sample = lines[-2]["sample"]
    lines[-1] |= {"sample": sample, "left": {"samples": 1234, "budgets": {"english": 67, "russian": 0}}}
    given = lines[0]["budgets"]
    read, _ = page(tmp_path, lines=lines)
    assert (
        f"The run ended early, at sample {sample:,}, with 1,234 samples to come; left of the budgets: english 67 of "
        f"{given[0]:,}, russian 0 of {given[1]:,}. A restart" in read.text
    )
    for wrong in ({"samples": 1}, {"samples": 1, "budgets": {"spanish": 3}}, {"samples": "1", "budgets": {}}):
        assert shape.fault(lines[-1] | {"left": wrong}, lines[0]) == "left is not by domain"


def test_a_record_that_has_only_begun(tmp_path):
    read, _ = page(tmp_path, lines=records.lines()[:1])
    assert "No probe was finished." in read.text and "0 of 400" in read.text
    assert read.tags.count("svg") == 1


def test_an_analysis_shows_its_checks_and_lacks_nothing(tmp_path):
    lines = records.analysed(records.lines(K=3))
    read, _ = page(tmp_path, lines=lines)
    probes = [line for line in lines if line["event"] == "probe"]
    assert read.rows["checkpoints"] == 1 + len(probes)
    assert "Note: holdout: seen in training" in read.text
    moved = sum(bool(line["improvable"][0]) for line in probes)
    assert 0 < moved < len(probes) and read.text.count("code earlier, english later") == moved
    assert "global_step50" in read.text and "somewhere" not in read.text
    for fault in (
        "lacks",
        "Decisions",
        "Skipped",
        "uncalibrated",
        "not recorded",
        "Recommendation",
    ):
        assert fault not in read.text, fault
    pictures = [value for tag, name, value in read.attributes if tag == "figure" and name == "id"]
    assert pictures == ["weights", "losses", "scores", "P_last", "P_mean"]


def test_what_version_0_1_recommended_is_not_shown_as_this_ones():
    lines = [json.loads(line) for line in ANALYSIS_OF_0_1.read_text().splitlines()]
    assert lines[-1]["event"] == "recommendation" and len(lines[-1]["points"]) > 1
    read = words(lines)
    assert read.rows["checkpoints"] == 6 and "Recommendation" not in read.text


def test_only_brackets_outside_their_interval_are_listed_the_worse_order_first():
    lines = records.analysed(records.lines(K=3))
    read = words(lines)
    probes, expected = [line for line in lines if line["event"] == "probe"], 0
    for line in probes:
        P, se = np.array(line["P"]), np.array(line["P_se"])
        expected += int(
            (P / np.maximum(se, 1e-300) > 3.1824).sum()
        )  # Student's quantile at 95 %, three degrees of freedom
    assert expected and len(re.findall(r"\w+ then \w+ [+−]", read.text)) == expected
