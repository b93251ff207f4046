"""Messages checked by following them: the cure that a refusal prints is applied, and the next run succeeds."""

import re
import subprocess

import indexed_files
import numpy as np
import pytest
from commands import invoke

RUN = "--seq-length 8 --global-batch-size 4 --micro-batch-size 2 --train-iters 100 --world-size 2 --num-workers 1"
MIXTURE = """domains:
  en: {path: en, budget: 300, min: 0.2, max: 0.9}
  ru: {path: ru, budget: 100, holdout: held}
mode: act
every: 25
lead: 16
target: {en: 0.5, ru: 0.5}
probe: {samples: 16, method: difference}
controller: {law: tilt, rate: 0.1}
measure_budget: 1
"""


def instead(old):
    """The cure is a text to write in the place of `old`."""
    return lambda text, found: text.replace(old, found)


def whole_line(start):
    return lambda text, found: re.sub(rf"(?m)^{start}.*$", found, text)


def dropped(key):
    return lambda text, found: re.sub(rf"(?m)^{key}.*\n|, {key}: [^,}}]*", "", text)


CASES = {  # what stands in the file -> what is written instead, the part of the message that is applied, how
    "a key misspelt": ("every: 25", "evry: 25", r"did you mean (\w+)\?", instead("evry")),
    "a key of a domain misspelt": ("budget: 300", "bugdet: 300", r"did you mean (\w+)\?", instead("bugdet")),
    "a mode misspelt": ("mode: act", "mode: acct", r"did you mean (\w+)\?", instead("acct")),
    "a method misspelt": ("difference", "diference", r"did you mean (\w+)\?", instead("diference")),
    "a law misspelt": ("law: tilt", "law: tlt", r"did you mean (\w+)\?", instead("tlt")),
    "a domain misspelt in the target": ("target: {en:", "target: {eng:", r"did you mean (\w+)\?", instead("eng")),
    "samples no multiple of splits": ("samples: 16", "samples: 18", r"write (\d+)", instead("18")),
    "budgets that miss the run": ("budget: 300", "budget: 200", r"write (\d+) here", instead("200")),
    "a path with its ending": ("path: en", "path: en.bin", r"without its ending: (.*)", instead("en.bin")),
    "a lead too short": ("lead: 16", "lead: 4", r"write (\d+) or more", instead("4")),
    "a holdout too large": ("path: en", "path: en, holdout: 1900", r"write (\d+) or less", instead("1900")),
    "a holdout too small": ("path: en", "path: en, holdout: 5", r"hold out (\d+) or more", lambda t, n: t.replace("holdout: 5", f"holdout: {n}")),
    "a budget in words": ("budget: 300", "budget: many", r"tokens \((3\.1Mtok)\), or null", lambda t, n: t.replace("many", n)),
    "a share over one": ("min: 0.2", "min: 20", r"between (0) and 1", instead("20")),
    "a list of laws that is none": ("rate: 0.1", "rate: 0.1, compare: hold", r"such as (\[hold, tilt\])", lambda t, n: t.replace("compare: hold", f"compare: {n}")),
    "each in mode act": ("target: {en: 0.5, ru: 0.5}", "target: each", r"or (mode: shadow)", whole_line("mode:")),
    "shares that miss one": ("ru: 0.5}", "ru: 0.4}", r"such as (\{en: 0\.5, ru: 0\.5\})", instead("{en: 0.5, ru: 0.4}")),
    "a key that was cut": ("measure_budget: 1", "measure_budget: 1\nresponse: 3", r"(remove the key)", dropped("response")),
    "a key written twice": ("every: 25", "every: 25\nevery: 25", r"(keep one of the two)", lambda t, n: t.replace("every: 25\n", "", 1)),
    "a minimum above its maximum": ("min: 0.2", "min: 0.95", r"(write a lower one)", lambda t, n: t.replace("0.95", "0.1")),
    "a prefix that is not there": ("path: ru", "path: russian", r"(russian)", lambda t, n: t.replace(n, "ru")),
    "a schedule in mode act": ("mode: act", "mode: act\nschedule: plan.csv", r"write (mode: fixed)", instead("mode: act")),
    "a share in per cent": ("rate: 0.1", "rate: 10%", r"such as (0\.05)", instead("10%")),
    "a probe without numbers": ("every: 25", "every: often", r"write a (positive) number", lambda t, n: t.replace("often", "25")),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    for name, sequences in (("en", 2000), ("ru", 400), ("held", 64)):
        indexed_files.write(tmp_path / name, np.arange(8 * sequences + 1) % 1000 + (name == "held"))
    (tmp_path / "plan.csv").write_text("at,en,ru\n0,0.8,0.2\n50%,0.7,0.3\n")
    return tmp_path


def run(path, flags=RUN):
    """(exit status, what a refusal says)."""
    done = invoke("plan", path, *flags.split())
    if done.exit_code:
        assert (
            done.exit_code == 2 and done.output.startswith("error: ") and len(done.output.splitlines()) == 1
        )
    return done.exit_code, done.output


def test_the_file_itself_is_fine(folder):
    (folder / "mixture.yaml").write_text(MIXTURE)
    assert run(folder / "mixture.yaml")[0] == 0


@pytest.mark.parametrize("case", CASES)
def test_the_cure_of_a_message_cures(folder, case):
    old, new, pattern, apply = CASES[case]
    path, text = folder / "mixture.yaml", MIXTURE.replace(old, new, 1)
    assert text != MIXTURE
    path.write_text(text)
    status, told = run(path)
    assert status == 2, told
    found = re.search(pattern, told)
    assert found, told
    cured = apply(text, found[1])
    assert cured != text
    path.write_text(cured)
    status, then = run(path)
    assert status == 0 or fault(then) != fault(told), then


def fault(told):
    """Key and problem of a refusal, without its numbers."""
    return re.sub(r"\d+", "N", told.partition("; ")[0])


def test_an_encoding_is_cured_by_the_command_that_the_message_prints(folder):
    path = folder / "mixture.yaml"
    path.write_bytes(("# données\n" + MIXTURE).encode("cp1252"))
    status, told = run(path)
    assert status == 2
    flags = re.search(r"\((iconv -f CP1252 -t UTF-8)", told)[1].split()
    path.write_bytes(subprocess.run([*flags, path], check=True, capture_output=True).stdout)
    assert run(path)[0] == 0


@pytest.mark.parametrize(
    ("flags", "pattern", "flag"),
    [
        ("--global-batch-size 6", r"write (\d+), or start", "--global-batch-size"),
        ("--train-iters 0", r"write a (positive) number", "--train-iters"),
        ("--world-size 3 --tensor-model-parallel-size 2", r"write a (multiple) of", "--world-size"),
    ],
)
def test_a_flag_is_cured_by_its_message(folder, flags, pattern, flag):
    (folder / "mixture.yaml").write_text(MIXTURE)
    status, told = run(folder / "mixture.yaml", f"{RUN} {flags}")
    found = re.search(pattern, told)
    assert status == 2 and found, told
    number = {"positive": "100", "multiple": "4"}.get(found[1], found[1])
    status, then = run(folder / "mixture.yaml", f"{RUN} {flags} {flag} {number}")
    assert status == 0 or fault(then) != fault(told), then


@pytest.mark.parametrize(
    ("table", "pattern", "apply"),
    [
        ("at;en;ru\n0;0.8;0.2\n", r"write (at,then,en,ru)", lambda t, n: t.replace(";", ",")),
        ("at,en\n0,0.8\n", r"write (at,then,en,ru)", lambda t, n: f"{n}\n0,hold,0.8,0.2\n50%,hold,0.7,0.3\n"),
        ("at,en,ru\n0,0.8,0.3\n", r"(sum to 1)", lambda t, n: t.replace("0.3", "0.2")),
        ("at,en,ru\nsoon,0.8,0.2\n", r"samples \((12000)\)", lambda t, n: t.replace("soon", "0")),
        ("at,then,en,ru\n0,jump,0.8,0.2\n", r"write one of (hold)", lambda t, n: t.replace("jump", n)),
        ("at,en,ru\n0,0.5,0.5\n", r"budget: (\d+), or budget: null", None),
    ],
)
def test_a_schedule_is_cured_by_its_message(folder, table, pattern, apply):
    text = MIXTURE.replace("mode: act", "mode: fixed\nschedule: plan.csv")
    (folder / "mixture.yaml").write_text(text)
    (folder / "plan.csv").write_text(table)
    status, told = run(folder / "mixture.yaml")
    found = re.search(pattern, told)
    assert status == 2 and found, told
    if apply is None:
        (folder / "mixture.yaml").write_text(text.replace("budget: 300", f"budget: {found[1]}"))
    else:
        (folder / "plan.csv").write_text(apply(table, found[1]))
    status, then = run(folder / "mixture.yaml")
    assert status == 0 or fault(then) != fault(told), then
