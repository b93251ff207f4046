"""The report as a reader's browser gets it: whole, escaped, without network, and usable on a phone."""

import html
import re
import shutil
import subprocess
import tempfile
from html.parser import HTMLParser

import pytest
import records

from megatron_commute import plots, report, series

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="Chromium is not installed (apt-get install chromium)"
)
FLAGS = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync --enable-logging=stderr"


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


def words(lines, torn=0):
    """The page without pictures."""
    return Page(report.page(series.by_event(lines), [], torn))


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


def test_markup_in_names_and_reasons_stays_text(tmp_path):
    evil = ["<script>alert(1)</script>", "\"><img src=x onerror='y'>", "a & b"]
    lines = records.lines(names=evil, skips=(0,))
    for line in lines:
        if line["event"] == "probe":
            line["reason"] = "<b onclick=z>because</b>"
    read, _ = page(tmp_path, lines=lines)
    assert read.tags.count("script") == 1
    assert not {"img", "b"} & set(read.tags)
    assert not [name for _, name, _ in read.attributes if name.startswith("on")]
    for word in [*evil, "<b onclick=z>because</b>"]:
        assert word in read.text


def test_a_signal_that_failed_its_comparisons_stays_loud_and_all_of_them_are_in_the_table():
    lines = records.responded(records.lines(mode="act"), faithful=("persistence",))
    read = words(lines)
    assert ("p", "class", "loud") in read.attributes and "Calibration of the signals" in read.text
    for signal in ("P adam/local", "recency adam", "persistence", "lock-in", "last gains"):
        assert signal in read.text
    assert "100% (81% to 100%)" in read.text and "16 of 16" in read.text


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


@pytest.mark.parametrize(
    "mode, calibrated", [("act", False), ("act", True), ("shadow", False), ("fixed", False)]
)
def test_acting_uncalibrated_is_said_loudly(mode, calibrated):
    lines = records.lines(mode=mode)
    lines = records.responded(lines) if calibrated else lines
    read, loud = words(lines), mode == "act" and not calibrated
    assert (("p", "class", "loud") in read.attributes) == loud
    assert ("Acting on an uncalibrated signal" in read.text) == loud


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


def test_a_record_that_has_only_begun(tmp_path):
    read, _ = page(tmp_path, lines=records.lines()[:1])
    assert "No probe was finished." in read.text and "0 of 400" in read.text
    assert read.tags.count("svg") == 1


def test_a_thousand_lines_are_one_page_of_moderate_size(tmp_path):
    lines = records.lines(K=3, steps=9000, probe_every=100)
    assert len(lines) > 900
    _, path = page(tmp_path, lines=lines)
    assert path.stat().st_size < 1_500_000


def browse(text, folder, script=""):
    """(title, complaints): the title `script` leaves in Chromium, and what its console says."""
    (folder / "page.html").write_text(text + f"<script>{script}</script>", encoding="utf-8")
    with tempfile.TemporaryDirectory() as profile:
        flags = [*FLAGS.split(), f"--user-data-dir={profile}", "--dump-dom", f"file://{folder}/page.html"]
        done = subprocess.run([CHROMIUM, *flags], capture_output=True, text=True, timeout=120, check=True)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    return title and title[1], [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def framed(path, script):
    """A page with the report 390 and 1280 pixels wide; `script` runs in both and may call `tell`."""
    text = re.sub(r"<meta http-equiv[^>]*>", "", path.read_text(encoding="utf-8"))
    tell = "const tell = word => { parent.document.title += word + ';' };"
    inner = html.escape(text + f"<script>{{ {tell} {script} }}</script>")
    frames = "".join(
        f'<iframe width="{width}" height="900" srcdoc="{inner}"></iframe>' for width in (390, 1280)
    )
    return f"<!doctype html><meta charset=utf-8><title></title>{frames}"


@needs_chromium
@pytest.mark.parametrize("options", [{"K": 8}, {"names": ["x" * 60, "long name " * 6, "中文"]}])
def test_nothing_is_wider_than_the_screen(tmp_path, options):
    _, path = page(tmp_path, **options)
    measure = """addEventListener('load', () => { const root = document.documentElement;
    tell(innerWidth + ' too wide by ' + (root.scrollWidth - root.clientWidth)) })"""
    title, complaints = browse(framed(path, measure), tmp_path)
    assert sorted(title.split(";")[:-1]) == ["1280 too wide by 0", "390 too wide by 0"]
    assert not complaints


@needs_chromium
def test_typing_filters_the_decisions(tmp_path):
    lines = records.lines(K=3)
    probes = [line for line in lines if line["event"] == "probe"]
    probes[1]["reason"] = "weights stay: a Peculiar reason"
    _, path = page(tmp_path, lines=lines)
    script = """const input = document.querySelector("input"), seen = document.querySelector("output");
    const before = seen.textContent;
    input.value = "reason peculiar"; input.dispatchEvent(new Event("input", {bubbles: true}));
    const left = [...document.querySelectorAll("#decisions tbody tr")].filter(row => row.offsetHeight > 0);
    tell([before, seen.textContent, ...left.map(row => row.cells[0].textContent)].join("|"));"""
    expected = f"{len(probes)} of {len(probes)}|1 of {len(probes)}|{probes[1]['step']};"
    assert browse(framed(path, script), tmp_path)[0] == 2 * expected


@needs_chromium
def test_only_the_script_of_the_report_may_run(tmp_path):
    _, path = page(tmp_path, K=3)
    title, complaints = browse(path.read_text(encoding="utf-8"), tmp_path, "document.title = 'foreign'")
    assert title == "Order of data: english, russian, code"
    assert len(complaints) == 1 and "Content Security Policy" in complaints[0]
