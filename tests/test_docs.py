"""Documents against the program: every key with its default, every command and option, every link."""

import re
from pathlib import Path

import pytest

from megatron_commute import __version__, cli, mixture_file
from megatron_commute.config import Config, Controller, Domain, Probe, load

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
HEADINGS = ["Quick start", "The mixture file", "In your own run", "Command line", "Limits"]
KEYS = {
    "": mixture_file.FILE_KEYS,
    "domains.NAME.": mixture_file.DOMAIN_KEYS,
    "probe.": mixture_file.PROBE_KEYS,
    "controller.": mixture_file.CONTROLLER_KEYS,
}
VALUES = {
    "mode": mixture_file.MODES,
    "probe.method": mixture_file.METHODS,
    "probe.metric": mixture_file.METRICS,
    "probe.memory": mixture_file.MEMORIES,
    "controller.law": mixture_file.LAWS,
}


def sections():
    """Text of every second-level section of the README by heading."""
    parts = re.split(r"^## +(.+)$", README.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip((heading.strip() for heading in parts[1::2]), parts[2::2], strict=True))


def defaults():
    """What the README must state as default: the word as one would write it in the file."""
    config = Config(domains=())
    holders = {"": config, "probe.": Probe(), "controller.": Controller()}
    found = {"domains": "required", "probe": "see below", "controller": "see below"}
    for prefix, holder in holders.items():
        for key in KEYS[prefix]:
            found.setdefault(prefix + key, _written(getattr(holder, key)))
    domain = Domain("NAME", ())
    values = (domain.weight, domain.budget, domain.minimum, domain.maximum, domain.holdout)
    names = ("weight", "budget", "min", "max", "holdout")
    found |= {f"domains.NAME.{key}": _written(value) for key, value in zip(names, values, strict=True)}
    return found | {"domains.NAME.path": "required", "controller.floors": "0", "controller.caps": "1"}


def _written(value):
    if value == ():
        return "[]"
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def rows(text):
    """{key: (default, meaning)} of table rows `| `key` | default | meaning |`."""
    return {
        key: (default.strip("` "), meaning)
        for key, default, meaning in re.findall(ROW, text, flags=re.MULTILINE)
    }


ROW = r"^\| *`([\w.]+)` *\| *([^|]+?) *\| *(.+?) *\|$"


@pytest.mark.parametrize("heading", HEADINGS)
def test_readme_has_the_section(heading):
    assert len(sections()[heading].strip()) > 200


def test_readme_has_a_row_for_every_key_with_its_default():
    stated = {key: default for key, (default, _) in rows(sections()["The mixture file"]).items()}
    assert stated == defaults()


@pytest.mark.parametrize("key", VALUES)
def test_readme_names_every_value_of_a_key(key):
    meaning = rows(sections()["The mixture file"])[key][1]
    assert set(VALUES[key]) <= set(re.findall(r"`([\w-]+)`", meaning))


def test_mixture_files_in_the_readme_load(tmp_path):
    blocks = re.findall(r"```yaml\n(.+?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        (tmp_path / "mixture.yaml").write_text(block, encoding="utf-8")
        assert load(tmp_path / "mixture.yaml").domains


@pytest.mark.parametrize("command", sorted(cli.main.commands))
def test_readme_documents_the_command(command):
    text = sections()["Command line"]
    assert f"megatron-commute {command}" in text
    stated = re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)
    for parameter in cli.main.commands[command].params:
        assert parameter.opts[0] in stated or not parameter.opts[0].startswith("--"), parameter.opts


def test_readme_invents_no_command_and_no_option():
    text = sections()["Command line"]
    known = {option for command in cli.main.commands.values() for p in command.params for option in p.opts}
    stated = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))
    assert stated <= known | {"--help", "--version", "--commute"}
    assert set(re.findall(r"megatron-commute ([a-z]+)", text)) <= set(cli.main.commands)


def test_readme_shows_a_picture_of_the_report():
    assert re.search(r"!\[[^\]]+\]\([^)]+\.(png|svg)\)", README.read_text(encoding="utf-8"))


EXPERIMENTS = [f"megatron_commute/experiments/{name}.md" for name in ("README", "bilingual")]


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *EXPERIMENTS])
def test_links_lead_to_files(document):
    page = ROOT / document
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        assert target.startswith(("https://", "http://")) or (page.parent / target).exists(), target


def test_named_files_exist():
    text = README.read_text(encoding="utf-8")
    for target in re.findall(r"\b((?:launch|tests|csrc|patches|megatron_commute)/[\w./-]*\w)", text):
        assert (ROOT / target).exists(), target


def test_changelog_has_the_version():
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
