"""The report as a reader's browser shows it: on a phone, on a desk and on paper, alone, without network."""

import html
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import records

from megatron_commute.record import log as record
from megatron_commute.report import plots

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="Chromium is not installed (apt-get install chromium)"
)
FLAGS = "--headless=new --no-sandbox --disable-gpu --no-first-run --disable-background-networking --hide-scrollbars"
FLAGS += " --disable-component-update --disable-sync --enable-logging=stderr"
CASES = ("quickstart", "flow", "analysis", "eight", "long names")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Reports by name: the quickstart's, an analysis, one of many domains, and one whose names are too long."""
    folder = tmp_path_factory.mktemp("pages")
    lines = {
        "quickstart": record.read(ROOT / "launch/results/quickstart.jsonl"),
        "flow": records.of_flow(records.lines(K=3)),
        "analysis": records.analysed(records.lines(K=3)),
        "eight": records.lines(K=8),
        "long names": records.lines(names=["x" * 60, "long name " * 6, "中文"]),
    }
    return {name: plots.report(records.write(folder / name, lines[name])) for name in CASES}


def chromium(*flags):
    with tempfile.TemporaryDirectory() as profile:
        command = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={profile}", *map(str, flags)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def browse(text, folder, script=""):
    """(title, complaints): the title `script` leaves, and what the console says."""
    (folder / "page.html").write_text(text + f"<script>{script}</script>", encoding="utf-8")
    done = chromium("--dump-dom", f"file://{folder}/page.html")
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    return html.unescape(title[1]), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def without_policy(path):
    return re.sub(r"<meta http-equiv[^>]*>", "", path.read_text(encoding="utf-8"))


def framed(path, script):
    """A page with a copy of the report 390 and 1280 pixels wide; `script` runs in both and may call `tell`."""
    tell = "const tell = word => { parent.document.title += word + ';' };"
    inner = html.escape(without_policy(path) + f"<script>{{ {tell} {script} }}</script>")
    frames = "".join(
        f'<iframe width="{width}" height="900" srcdoc="{inner}"></iframe>' for width in (390, 1280)
    )
    return f"<!doctype html><meta charset=utf-8><title></title>{frames}"


# pairs of words in a picture that cover each other, words that leave it, and the smallest height of a line
LOOK = """addEventListener('load', () => {
  const root = document.documentElement, faults = [];
  let least = 99;
  for (const svg of document.querySelectorAll('figure svg')) {
    const frame = svg.getBoundingClientRect(), place = svg.closest('figure').id, boxes = [];
    for (const word of svg.querySelectorAll('text')) {
      const box = word.getBoundingClientRect(), turned = /rotate\\(-?(\\d+)/.exec(word.getAttribute('transform') || '');
      if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1
          || box.bottom > frame.bottom + 1) faults.push(place + ' cuts ' + word.textContent);
      if (turned && ![0, 90, 270].includes(+turned[1])) continue;
      least = Math.min(least, box.width, box.height);
      boxes.push([box, word.textContent]);
    }
    boxes.forEach(([a, one], i) => boxes.slice(i + 1).forEach(([b, two]) => {
      const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (wide > 1 && high > 3) faults.push(place + ': ' + one + ' on ' + two);
    }));
  }
  tell(JSON.stringify({width: innerWidth, beyond: root.scrollWidth - root.clientWidth, least, faults,
    fetched: performance.getEntriesByType('resource').length}));
})"""


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_too_wide_covered_cut_too_small_or_fetched(pages, name, tmp_path):
    title, complaints = browse(framed(pages[name], LOOK), tmp_path)
    found = [json.loads(part) for part in title.split(";")[:-1]]
    assert sorted(one["width"] for one in found) == [390, 1280] and not complaints
    for one in found:
        assert one["beyond"] == 0 and one["fetched"] == 0 and one["faults"] == []
        assert one["least"] >= 5  # pixels, of the narrowest digit


@pytest.mark.parametrize("name, word", [("quickstart", "400 TOUCHED"), ("analysis", "global_step100")])
def test_typing_filters_the_table(pages, name, word, tmp_path):
    script = f"""const input = document.querySelector("input"), seen = document.querySelector("output");
    const rows = [...document.querySelectorAll("#decisions tbody tr, #checkpoints tbody tr")];
    const before = seen.textContent;
    input.value = "{word}"; input.dispatchEvent(new Event("input", {{bubbles: true}}));
    const left = rows.filter(row => row.offsetHeight > 0);
    tell([before, seen.textContent, ...left.map(row => row.cells[0].textContent)].join("|"));"""
    probes, step = {"quickstart": (4, 400), "analysis": (8, 100)}[name]
    assert (
        browse(framed(pages[name], script), tmp_path)[0] == 2 * f"{probes} of {probes}|1 of {probes}|{step};"
    )


def test_only_the_script_of_the_report_may_run(pages, tmp_path):
    text = pages["quickstart"].read_text(encoding="utf-8")
    title, complaints = browse(text, tmp_path, "document.title = 'foreign'")
    assert title == "Order of data: english, code, russian"
    assert len(complaints) == 1 and "Content Security Policy" in complaints[0]
