"""Documents against the program: every key and flag, every path and link, and the size of every page."""

import argparse
import ast
import inspect
import re
import textwrap
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from megatron_commute import __version__, reduce
from megatron_commute.adapters import megatron_deepspeed, torch_loop
from megatron_commute.cli import main as cli
from megatron_commute.config import Run, load
from megatron_commute.decide import control_file, replay
from megatron_commute.decide.laws import LAWS
from megatron_commute.hook import Hook
from megatron_commute.settings import mixture_file, schedule, yaml_checks

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "megatron_commute"
FOLDERS = ("csrc", "launch", "patches", "megatron_commute")
READMES = [ROOT / "README.md", *sorted(p for name in FOLDERS for p in (ROOT / name).rglob("README.md"))]
PAGES = [*READMES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
FRONT, SETTINGS = ROOT / "README.md", PACKAGE / "settings" / "README.md"
HOST, DECIDE = PACKAGE / "adapters" / "megatron_deepspeed" / "README.md", PACKAGE / "decide" / "README.md"
WITHOUT_GLOSSARY = ("README.md", "patches/README.md", "launch/paper/README.md")
SETUP = ["bash launch/quickstart.sh", "bash tests/run.sh"]
COMMANDS = cli.main.commands
KEYS = {
    "": mixture_file.FILE_KEYS,
    "domains.NAME.": mixture_file.DOMAIN_KEYS,
    "probe.": mixture_file.PROBE_KEYS,
    "controller.": mixture_file.CONTROLLER_KEYS,
}
KNOWN_KEYS = {prefix + key for prefix, keys in KEYS.items() for key in keys}
CHOICES = ("mode", "probe.method", "probe.metric", "probe.memory")
# files of the host, and what a run of ours writes
ELSEWHERE = {"pretrain_gpt.py", "pretrain_bert.py", "pretrain_t5.py", "megatron/training.py"}
ELSEWHERE |= {"tools/preprocess_data.py", "quickstart/", "commute/"}
SOURCES = (".py", ".sh", ".cpp", ".h", ".cu", ".cuh", ".patch", ".md", ".sbatch")


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def every_page(pages=PAGES):
    return pytest.mark.parametrize("page", pages, ids=name_of)


def read(page):
    return page.read_text(encoding="utf-8")


def sections(page):
    """Text under every second-level heading of a page."""
    parts = re.split(r"^## +(.+)$", read(page), flags=re.MULTILINE)
    return dict(zip((heading.strip() for heading in parts[1::2]), parts[2::2], strict=True))


def fenced(page, language):
    """Contents of the code blocks of a language, those in lists too."""
    blocks = re.findall(rf"^( *)```{language}\n(.*?)^\1```", read(page), re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(block) for _, block in blocks]


def indented(text):
    """Contents of the code blocks that are set off by four spaces."""
    return [textwrap.dedent(block) for block in re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)]


def rows(text):
    """The cells of every table row below a head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


# --- the mixture file -------------------------------------------------------------------------------------


def stated_keys():
    """{key: (default, meaning)} of the tables of keys."""
    found = [row for row in rows(read(SETTINGS)) if len(row) == 3 and re.fullmatch(r"`[\w.]+`", row[0])]
    return {key.strip("`"): (default.strip("`"), meaning) for key, default, meaning in found}


def defaults():
    """What the tables must state as default: the word as one would write it in the file."""
    holders = {
        "": mixture_file.Config(domains=()),
        "probe.": mixture_file.Probe(),
        "controller.": mixture_file.Controller(),
        "domains.NAME.": mixture_file.Domain(name="NAME", path=()),
    }
    field = {"min": "minimum", "max": "maximum"}
    found = {
        prefix + key: as_written(getattr(holder, field.get(key, key)))
        for prefix, holder in holders.items()
        for key in KEYS[prefix]
    }
    required = dict.fromkeys(("domains", "domains.NAME.path"), "required")
    below = dict.fromkeys(("probe", "controller"), "see below")
    return found | required | below | {"controller.floors": "0", "controller.caps": "1"}


def as_written(value):
    if isinstance(value, bool):
        return str(value).lower()
    if value == ():
        return "[]"
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def test_settings_have_a_row_for_every_key_with_its_default():
    assert {key: default for key, (default, _) in stated_keys().items()} == defaults()


@pytest.mark.parametrize("key", CHOICES)
def test_settings_name_every_value_of_a_key(key):
    prefix, name = key.rpartition(".")[::2]
    with pytest.raises(yaml_checks.Refused, match=r"write one of ([\w, -]+)") as told:
        KEYS[f"{prefix}." if prefix else ""][name]("?")
    known = re.match(r"write one of ([\w, -]+)", str(told.value))[1].split(", ")
    assert set(known) <= set(re.findall(r"`([\w-]+)`", stated_keys()[key][1]))


def test_decide_has_a_row_for_every_law():
    laws = {row[0].strip("`") for row in rows(sections(DECIDE)["Laws"])[2:]}
    assert laws == set(LAWS)
    assert laws <= set(re.findall(r"`([\w-]+)`", stated_keys()["controller.law"][1]))


@every_page()
def test_pages_name_no_key_that_is_not_there(page):
    named = re.findall(r"`((?:probe|controller|response|domains\.NAME)\.(?!py\b)[\w.]+)", read(page))
    assert page.name == "CHANGELOG.md" or set(named) <= KNOWN_KEYS


@pytest.mark.parametrize("page", [page for page in READMES if fenced(page, "yaml")], ids=name_of)
def test_mixture_files_in_pages_load(page, tmp_path):
    for block in fenced(page, "yaml"):
        (tmp_path / "mixture.yaml").write_text(block, encoding="utf-8")
        assert load(tmp_path / "mixture.yaml").domains


@every_page([FRONT, HOST])
def test_worked_examples_fit_the_run_beside_them(page, tmp_path):
    (tmp_path / "mixture.yaml").write_text(fenced(page, "yaml")[0], encoding="utf-8")
    config = load(tmp_path / "mixture.yaml")
    command = next(block for block in indented(textwrap.dedent(read(page))) if "--train-iters" in block)
    iters, batch = (
        int(re.search(rf"--{flag} (\d+)", command)[1]) for flag in ("train-iters", "global-batch-size")
    )
    assert sum(domain.budget.sequences(1024) for domain in config.domains) == iters * batch
    assert config.lead is None  # the default covers two workers without accumulation
    for domain in config.domains:
        assert f"{domain.weight:g} data/{domain.name}_train" in " ".join(command.replace("\\\n", " ").split())


def test_schedule_file_in_settings_is_read(tmp_path):
    block = indented(sections(SETTINGS)["Schedule files"])[0]
    (tmp_path / "schedule.csv").write_text(block, encoding="utf-8")
    points = schedule.read(
        tmp_path / "schedule.csv", names=("en", "de", "code"), samples=4000, seq_length=1024
    )
    assert len(points) == 3
    columns = {row[0].strip("`") for row in rows(sections(SETTINGS)["Schedule files"])[2:]}
    assert columns == {"at", "then", "one for each domain"}


def test_control_file_in_decide_has_every_key():
    block = indented(sections(DECIDE)["Intervening while a run goes on"])[0]
    assert set(YAML(typ="safe").load(block)) == set(control_file.CONTROL_KEYS)


# --- the command line -------------------------------------------------------------------------------------


def described():
    """{command: text} of the sections `megatron-commute COMMAND` of all pages."""
    found = {}
    for page in READMES:
        for heading, text in sections(page).items():
            if heading.startswith("megatron-commute "):
                assert found.setdefault(heading.split()[1], text) is text, f"{heading} twice"
    return found


def test_every_command_has_its_row_in_front_and_no_other():
    named = re.findall(r"^\| `megatron-commute (\w+)[^`]*` \|", sections(FRONT)["Commands"], re.MULTILINE)
    assert sorted(named) == sorted(COMMANDS)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_flag_of_a_command_is_described_and_no_other(command):
    options = {word for p in COMMANDS[command].params for word in (*p.opts, *p.secondary_opts)}
    flags = {word for word in options if word.startswith("--")} - {"--help", "--json"}
    stated = {
        flag for row in rows(described().get(command, "")) for flag in re.findall(r"--[a-z-]+\w", row[0])
    }
    assert stated == flags


@every_page(READMES)
def test_pages_name_no_command_that_is_not_there(page):
    assert set(re.findall(r"megatron-commute ([a-z]+)", read(page))) <= set(COMMANDS)


@every_page(READMES)
def test_pages_name_no_flag_of_the_plugin_that_is_not_there(page):
    parser = megatron_deepspeed.add_arguments(argparse.ArgumentParser())
    known = {word for action in parser._actions for word in action.option_strings}
    assert set(re.findall(r"--commute[\w-]*", read(page))) <= known


def test_decide_names_every_guard_of_replay():
    row = next(row for row in rows(described()["replay"]) if row[0] == "`--guard`")
    assert set(re.findall(r"`(\w+)`", row[1])) == set(replay.GUARDS)


# --- a loop of one's own ----------------------------------------------------------------------------------


def test_calls_of_the_loop_in_adapters_fit_their_functions():
    [block] = fenced(PACKAGE / "adapters" / "README.md", "python")
    functions = {
        "Run": (Run, 0), "Groups": (reduce.Groups, 0), "torch_loop.Plugin": (torch_loop.Plugin, 0),
        "torch_loop.probe_model": (torch_loop.probe_model, 0), "plugin.attach": (torch_loop.Plugin.attach, 1),
        "torch_loop.second_moments": (torch_loop.second_moments, 0), "hook.begin": (Hook.begin, 1),
        "hook.end": (Hook.end, 1), "hook.log_losses": (Hook.log_losses, 1), "hook.state_dict": (Hook.state_dict, 1),
    }  # fmt: skip
    calls = {
        ast.unparse(node.func): node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)
    }
    assert set(functions) <= set(calls)
    for name, (function, bound) in functions.items():
        given = [None] * (bound + len(calls[name].args))
        inspect.signature(function).bind(*given, **{word.arg: None for word in calls[name].keywords})


# --- paths, links, sizes ----------------------------------------------------------------------------------


@every_page([page for page in PAGES if page.name != "CHANGELOG.md"])  # which speaks of what was
def test_files_that_a_page_names_exist(page):
    text = read(page)
    for target in re.findall(r"(?<![\w./])((?:launch|tests|csrc|patches|megatron_commute)/[\w./-]*\w)", text):
        assert (ROOT / target).exists(), target
    for target in re.findall(r"`([\w./-]+)`", text):
        if target in ELSEWHERE or not (target.endswith(SOURCES) or re.fullmatch(r"[a-z_./]+/", target)):
            continue
        assert any((place / target).exists() for place in (page.parent, ROOT, PACKAGE)), target


def anchors(page):
    """What GitHub makes of the headings of a page."""
    heads = re.findall(r"^#+ +(.+)$", read(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@every_page()
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        goal = (page.parent / path) if path else page
        assert goal.exists(), target
        if goal.is_dir() and goal != page:
            goal = goal / "README.md"
            assert goal.exists(), target
        assert not anchor or anchor in anchors(goal), target


def prose(page):
    """The lines of a page that are neither tables nor code."""
    text = re.sub(r"^( *)```.*?^\1```$", "", read(page), flags=re.MULTILINE | re.DOTALL)
    return [
        line for line in text.splitlines() if not line.lstrip().startswith(("|", "!")) and line[:4] != "    "
    ]


@every_page()
def test_prose_is_at_most_a_hundred_columns_wide(page):
    assert [line for line in prose(page) if len(line) > 100] == []


@every_page([page for page in PAGES if page.name != "CHANGELOG.md"])
def test_pages_are_short(page):
    most = 150 if page == FRONT else 200
    assert len(read(page).splitlines()) <= most
    assert page != FRONT or page.stat().st_size <= 10_000


@every_page([page for page in READMES if name_of(page) not in WITHOUT_GLOSSARY])
def test_a_page_ends_with_its_own_words(page):
    *_, (heading, glossary) = sections(page).items()
    assert heading == "Words"
    rest = read(page)[: read(page).rindex("## Words")].lower()
    for word, _ in rows(glossary)[2:]:
        assert any(part.strip().lower() in rest for part in word.split(",")), word


def test_front_page_has_two_setup_commands_and_one_picture():
    [block] = indented(sections(FRONT)["Quick start"])
    assert block.splitlines() == SETUP
    assert len(re.findall(r"^!\[[^\]]+\]\([^)]+\.(?:png|svg)\)$", read(FRONT), re.MULTILINE)) == 1


def test_front_page_has_five_limits_and_four_files_to_read():
    assert re.findall(r"^(\d)\. \*\*", sections(FRONT)["Five limits"], re.MULTILINE) == list("12345")
    files = re.findall(r"^\d\. `([\w/.]+)`", sections(FRONT)["A newcomer's path"], re.MULTILINE)
    assert len(files) == 4 and all((ROOT / file).is_file() for file in files)


def test_changelog_has_the_version():
    assert f"## {__version__}" in read(ROOT / "CHANGELOG.md")
