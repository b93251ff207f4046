"""Text files as editors save them, numbers as people write them, files replaced whole or not at all."""

import codecs
import os
import resource

import pytest

from megatron_commute.settings import mixture_file, schedule, text_files
from megatron_commute.settings.yaml_checks import ConfigError

MIXTURE = "domains:\n  en: {path: données, weight: 0.5}\n  ru: {path: ru, weight: 0.5}\nevery: 25\n"
SAVED_AS = ("utf-8", "utf-8-sig", "utf-16", "utf-32")
BIG_ENDIAN = {"utf-16-be": codecs.BOM_UTF16_BE, "utf-32-be": codecs.BOM_UTF32_BE}


@pytest.mark.parametrize("encoding", [*SAVED_AS, *BIG_ENDIAN])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_text_is_the_same_in_every_encoding_that_names_itself(tmp_path, encoding, end):
    raw = BIG_ENDIAN.get(encoding, b"") + MIXTURE.replace("\n", end).encode(encoding)
    (tmp_path / "mixture.yaml").write_bytes(raw)
    assert text_files.read(tmp_path / "mixture.yaml") == MIXTURE
    config = mixture_file.load(tmp_path / "mixture.yaml")
    assert config.every == 25 and config.domains[0].path == (str(tmp_path / "données"),)
    table = f"at,then,en,ru{end}0,linear,1,0{end}12,hold,0.5,0.5{end},,,{end}"
    (tmp_path / "plan.csv").write_bytes(BIG_ENDIAN.get(encoding, b"") + table.encode(encoding))
    points = schedule.read(tmp_path / "plan.csv", ("en", "ru"), 100, 8)
    assert [(p.sample, p.then, p.weights.tolist()) for p in points] == [
        (0, "linear", [1, 0]),
        (12, "hold", [0.5, 0.5]),
    ]


@pytest.mark.parametrize(
    ("raw", "cure"),
    [
        ("é".encode("cp1252"), r":1: is not UTF-8 text; save it as UTF-8 \(iconv -f CP1252 -t UTF-8"),
        (b"a\nb\n\xe9", ":3: is not UTF-8 text"),
        ("ab".encode("utf-16-le"), "zero bytes, as UTF-16 without a mark does; save it as UTF-8"),
        (codecs.BOM_UTF16_LE + b"abc", "is no whole UTF-16 text; save it as UTF-8"),
        (b"x" * (text_files.LARGEST + 1), "holds more than 1024 KiB; write a shorter file"),
    ],
)
def test_what_is_no_text_is_refused_with_its_cure(tmp_path, raw, cure):
    (tmp_path / "file").write_bytes(raw)
    with pytest.raises(text_files.TextFileError, match=cure):
        text_files.read(tmp_path / "file")


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    told = {
        "pipe": "is a pipe",
        "endless": "is no regular file",
        "loop": "cannot be read",
        "nowhere": "No such file",
    }
    for name, problem in told.items():
        with pytest.raises(text_files.TextFileError, match=f"{name}: .*{problem}.*; name a file"):
            text_files.read(tmp_path / name)
    with pytest.raises(text_files.TextFileError, match="is a folder; name a file"):
        text_files.read(tmp_path)


WHOLE = ("400", "4e2", "4E+2", "400.0", "4_00", "'400'", '"4e2"', "+400", "0x190", "40000e-2", "' 400 '")
BROKEN = ("400.5", "4e-1", "1e400", ".inf", ".nan", "true", "four", "'4 00'", "4,00", "٤٠٠", "-400", "9" * 400, "1e999999999999999999999")  # fmt: skip


@pytest.mark.parametrize("key", ["every", "domains.en.budget", "probe.samples"])
def test_a_whole_number_is_accepted_however_it_is_written(tmp_path, key):
    def load(value):
        text = {
            "every": f"domains: {{en: {{path: a}}}}\nevery: {value}\n",
            "domains.en.budget": f"domains: {{en: {{path: a, budget: {value}}}}}\n",
            "probe.samples": f"domains: {{en: {{path: a}}}}\nprobe: {{samples: {value}}}\n",
        }[key]
        (tmp_path / "m.yaml").write_text(text)
        found = mixture_file.load(tmp_path / "m.yaml")
        return (
            found.every
            if key == "every"
            else found.probe.samples
            if "probe" in key
            else found.domains[0].budget.amount
        )

    assert [load(value) for value in WHOLE] == [400] * len(WHOLE)
    for value in BROKEN:
        with pytest.raises(
            ConfigError,
            match=rf"m.yaml.*{key}: got .*; write|m.yaml:.*YAML|m.yaml: holds a value|unknown key",
        ):
            load(value)


@pytest.mark.parametrize(
    ("written", "tokens"), [("4e5tok", 400_000), ("1_000 ktok", 10**6), ("3.1Mtok", 3_100_000)]
)
def test_tokens_may_have_exponents_and_underscores(tmp_path, written, tokens):
    (tmp_path / "m.yaml").write_text(f"domains: {{en: {{path: a, budget: {written}}}}}\n")
    assert mixture_file.load(tmp_path / "m.yaml").domains[0].budget.amount == tokens


@pytest.mark.parametrize(
    "text",
    [
        "? [a, b]\n: 2", "every: 2001-99-99", "a: &a\n  b: *a", "a: " + "[" * 1500, "every: " + "9" * 5000,
        "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(f"{c}: &{c} [{','.join([f'*{p}'] * 10)}]\n" for p, c in zip("abcdefg", "bcdefgh", strict=True)),
        "every: !!python/object/apply:os.system [touch ran]", "? {a: 1}\n: 2", "'a\\nb': 1", '"\\ud800": 1', "%YAML 1.1\n---\nevery: 1e1x",
    ],
)  # fmt: skip
def test_a_file_that_attacks_its_reader_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        mixture_file.load(tmp_path / "m.yaml")
    assert "\n" not in str(error.value) and "; " in str(error.value) and not (tmp_path / "ran").exists()
    str(error.value).encode()


def test_a_file_is_replaced_whole_or_stays_as_it_was(tmp_path):
    path, stranger = tmp_path / "report.html", tmp_path / "stranger"
    text_files.replace(path, "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # as a full disk, in the middle of the file
    try:
        with pytest.raises(OSError, match="too large"):
            text_files.replace(path, "x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["report.html"]
    stranger.write_text("precious")
    path.unlink()
    path.symlink_to(stranger)
    text_files.replace(path, b"new")
    assert stranger.read_text() == "precious" and path.read_bytes() == b"new" and not path.is_symlink()
    text_files.replace("/dev/null", "a device is written into, and stays")
    assert not os.path.isfile("/dev/null")


def test_nothing_in_the_package_writes_a_whole_file_in_another_way():
    """Records and cells are appended to; `doctor` compiles in a folder of its own."""
    package = os.path.dirname(os.path.dirname(mixture_file.__file__))
    allowed = {"settings/text_files.py", "doctor.py", "patch.py"}
    for base, _, names in os.walk(package):
        for name in names:
            place = os.path.relpath(os.path.join(base, name), package)
            if name.endswith(".py") and place not in allowed:
                with open(os.path.join(base, name), encoding="utf-8") as file:
                    text = file.read()
                assert not any(way in text for way in ("write_text(", "write_bytes(", '"w"', '"w",')), place
