"""Text preparation, on text made here: pages, splits, files that Megatron reads back, fallbacks, refusals."""

import io
import json
import os
import random
import sqlite3
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
sys.path.insert(0, str(LAUNCH))

import parallel_text
import prepare_data
import text_sources

from megatron_commute.data.indexed import data_summary

PAGE = """<!DOCTYPE html><html><head><title>no</title><style>p {{}}</style></head><body>
<header><p>menu</p></header><div><h1 id="a">{0}</h1><p>{1} &amp; <b>more</b>
 of it</p><script>var x = "<p>no</p>";</script><ul><li>{2}</li></ul></div></body></html>"""


def words(seed, count, letters="abcdefghij"):
    chance = random.Random(seed)
    return " ".join("".join(chance.choices(letters, k=chance.randint(2, 6))) for _ in range(count))


def put(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def own(folder, documents=12):
    """Two domains: a folder of files, and one file of blocks; returns the arguments and the documents."""
    left = {f"part/{i}.txt": f"left {i} {words(i, 80)}" for i in range(documents)}
    right = [f"right {i} {words(100 + i, 60, 'клмнопрст')}" for i in range(documents)]
    for name, text in left.items():
        put(folder / "left" / name, text)
    put(folder / "right.txt", "\n\n".join(right[:5]) + "\n \n\n" + "\n\n".join(right[5:]) + "\n")
    arguments = ["--text", f"left={folder / 'left'}", "--text", f"right={folder / 'right.txt'}"]
    return arguments, set(left.values()), set(right)


def read_back(prefix):
    """Documents as lists of token numbers, read from the files' bytes as Megatron's format describes them."""
    raw = prefix.with_suffix(".idx").read_bytes()
    assert raw[:9] == b"MMIDIDX\x00\x00"
    assert raw[17] == 8, "dtype code 8 is uint16"
    count, bounds = np.frombuffer(raw, "<u8", 2, 18)
    lengths = np.frombuffer(raw, "<i4", count, 34)
    assert list(np.frombuffer(raw, "<i8", bounds, 34 + 12 * int(count))) == list(range(count + 1))
    tokens = np.fromfile(prefix.with_suffix(".bin"), "<u2")
    assert len(tokens) == lengths.sum()
    return [list(map(int, part)) for part in np.split(tokens, np.cumsum(lengths)[:-1])]


def decoded(out, prefix):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    end = tokenizer.token_to_id(prepare_data.END_OF_DOCUMENT)
    texts = []
    for tokens in read_back(out / prefix):
        assert tokens[-1] == end
        assert end not in tokens[:-1]
        texts.append(tokenizer.decode(tokens[:-1]))
    return texts


def debian_cache(cache, topics=24):
    """Unpacked packages with `topics` translated pages, an untranslated page and two odd ones."""
    for package in ("libreoffice-help-en-us", "libreoffice-help-ru", "debian-handbook"):
        put(cache / package / "VERSION", "1.2")
    english = cache / "libreoffice-help-en-us/usr/share/libreoffice/help/en-US/text"
    russian = cache / "libreoffice-help-ru/usr/share/libreoffice/help/ru/text"
    for i in range(topics):
        body = words(i, 30)
        put(english / f"a/{i}.html", PAGE.format(f"topic{i} head", body, "Shared line"))
        put(
            russian / f"a/{i}.html",
            PAGE.format(f"тема{i} заголовок", "слова " * 40 + body[:9], "Общая строка"),
        )
    put(english / "b.html", PAGE.format("never", "translated", "at all"))
    put(russian / "b.html", PAGE.format("never", "translated", "at all"))
    put(english / "c.html", PAGE.format("odd", "page", "here"))
    put(russian / "c.html", PAGE.format("лишняя", "страница<p>ещё", "здесь"))
    put(english / "only.html", PAGE.format("no", "twin", "page"))


def dictionary_cache(cache, entries=400):
    """The sdist of the Russian dictionary as pip leaves it, with made-up entries."""
    folder = cache / "wiki_ru_wordnet"
    folder.mkdir(parents=True)
    database = folder / "made.db"
    connection = sqlite3.connect(database)
    connection.execute("create table synsets(synset_id integer, lemma text, definition text)")
    for i in range(entries):
        gloss = "[[длинное|длинное]] толкование " + words(i, 12, "абвгдежз")
        connection.execute("insert into synsets values (?, ?, ?)", (i, f"слово{i}", f"с~ru~с~ru~{gloss}~1~2"))
    connection.commit()
    connection.close()
    with tarfile.open(folder / "wiki_ru_wordnet-9.9.tar.gz", "w:gz") as tar:
        data = database.read_bytes()
        member = tarfile.TarInfo("wiki_ru_wordnet-9.9/wiki_ru_wordnet/database/wikiwordnet.db")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    database.unlink()


def test_blocks_of_a_page_and_which_are_translated():
    assert parallel_text.translated("Open the file", "Откройте файл")
    assert parallel_text.translated("Choose View", "Выберите команду View")
    assert not parallel_text.translated("Open the file", "Open the file")
    assert not parallel_text.translated("Open the file", "Open this file Ж")
    blocks = parallel_text.html_blocks(PAGE.format("Head", "Some text", "item"))
    assert list(filter(None, blocks)) == ["Head", "Some text & more of it", "item"]


def test_pair_keeps_translated_blocks_once(tmp_path):
    debian_cache(tmp_path)
    english, russian = parallel_text.debian_pair(tmp_path)
    assert list(english.documents) == list(russian.documents)
    assert len(english.documents) == 24
    text = "\n".join(english.documents.values())
    assert text.count("Shared line") == 1
    assert "\n".join(russian.documents.values()).count("Общая строка") == 1
    assert not any(word in text for word in ("never", "odd", "twin", "menu"))
    assert english.packages == {"libreoffice-help-en-us": "1.2", "debian-handbook": "1.2"}
    assert russian.licences["libreoffice-help-ru"] == "MPL-2.0"


def test_parallel_domains_validate_on_the_same_topics(tmp_path):
    debian_cache(tmp_path / "cache")
    options = ["--cache", str(tmp_path / "cache"), "--vocab-size", "400", "--valid-share", "0.25"]
    assert prepare_data.main(["--out", str(tmp_path / "out"), "--megabytes", "0.008", *options]) == 0
    topics = {}
    for side, mark in (("english", "topic"), ("russian", "тема")):
        for part in ("train", "valid"):
            texts = decoded(tmp_path / "out", f"{side}_{part}")
            topics[side, part] = [text.split(mark)[1].split()[0] for text in texts]
    assert topics["english", "valid"] == topics["russian", "valid"]
    assert topics["english", "train"] == topics["russian", "train"]
    assert not set(topics["english", "valid"]) & set(topics["english", "train"])
    used = len(topics["english", "valid"]) + len(topics["english", "train"])
    # 24 pages of about 0.5 kB Russian: the cap on either language stops both.
    assert used < 24 and len(topics["english", "valid"]) == round(0.25 * used)
    record = json.loads((tmp_path / "out/data.json").read_text(encoding="utf-8"))
    assert record["genre_confounded"] is False
    assert record["domains"]["russian"]["train"]["bytes"] <= 8000
    assert set(record["domains"]) == {"english", "russian", "code"}
    assert "PSF-2.0" in record["domains"]["code"]["licences"].values()


def test_own_text_reads_back_exactly(tmp_path):
    arguments, left, right = own(tmp_path)
    out = tmp_path / "deep" / "out"
    assert prepare_data.main(["--out", str(out), "--vocab-size", "512", *arguments]) == 0
    for name, expected in (("left", left), ("right", right)):
        train, valid = decoded(out, f"{name}_train"), decoded(out, f"{name}_valid")
        assert set(train) | set(valid) == expected
        assert len(train) + len(valid) == len(expected) and len(valid) == 1
    record = json.loads((out / "data.json").read_text(encoding="utf-8"))
    assert record["genre_confounded"] is None
    digest = subprocess.run(
        ["sha256sum", str(out / "tokenizer.json")], check=True, capture_output=True, text=True
    ).stdout.split()[0]
    for prefix in ("left_train", "left_valid", "right_train", "right_valid"):
        sidecar = json.loads((out / f"{prefix}.json").read_text(encoding="utf-8"))
        assert sidecar == {"tokenizer": digest, "vocab_size": record["vocab_size"]}
        name, part = prefix.split("_")
        entry = record["domains"][name][part]
        assert entry["tokens"] == sum(map(len, read_back(out / prefix)))
        assert entry["bytes"] == sum(len(text.encode()) for text in decoded(out, prefix))
        summary = data_summary([str(out / prefix)])
        assert (summary.tokens, summary.layouts[0].dtype) == ((entry["tokens"],), "uint16")


def test_tokenizer_takes_equal_shares_of_every_domain_and_is_the_same_in_every_process(tmp_path):
    short, long = [words(1, 200)], [words(2, 400, "клмнопрст")]
    cut = long[0].encode()[: len(short[0].encode())].decode(errors="ignore")
    one = prepare_data.train_tokenizer([short, long], 400).to_str()
    assert one == prepare_data.train_tokenizer([short, [cut]], 400).to_str()
    program = (
        "import hashlib, sys; from pathlib import Path\n"
        "sys.path.insert(0, sys.argv[1]); import prepare_data\n"
        "texts = [Path(p).read_text(encoding='utf-8').split('\\n') for p in sys.argv[2:]]\n"
        "print(hashlib.sha256(prepare_data.train_tokenizer(texts, 900).to_str().encode()).hexdigest())"
    )
    put(tmp_path / "a", "\n".join(words(i, 300) for i in range(30)))
    put(tmp_path / "b", "\n".join(words(i, 300, "клмнопрст") for i in range(30)))
    command = [sys.executable, "-c", program, str(LAUNCH), str(tmp_path / "a"), str(tmp_path / "b")]
    digests = {
        subprocess.run(
            command, check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": str(seed)}
        ).stdout
        for seed in (1, 2)
    }
    assert len(digests) == 1


def test_prepared_again_it_says_so_and_other_options_are_refused(tmp_path, capsys):
    arguments, _, _ = own(tmp_path)
    arguments += ["--out", str(tmp_path / "out"), "--vocab-size", "400"]
    assert prepare_data.main(arguments) == 0
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    assert prepare_data.main(arguments) == 0
    assert "prepared already" in capsys.readouterr().out
    assert prepare_data.main([*arguments, "--seed", "7"]) == 2
    assert "other options (seed)" in capsys.readouterr().err
    put(tmp_path / "left/part/3.txt", "changed text")
    assert prepare_data.main(arguments) == 2
    assert "(text)" in capsys.readouterr().err
    assert before == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}


def test_a_failure_on_the_way_leaves_nothing(tmp_path, monkeypatch):
    arguments, _, _ = own(tmp_path / "text")
    real = prepare_data.write

    def fail(prefix, *rest):
        if prefix.name == "right_valid":
            raise OSError("disk full")
        return real(prefix, *rest)

    monkeypatch.setattr(prepare_data, "write", fail)
    with pytest.raises(OSError, match="disk full"):
        prepare_data.main(["--out", str(tmp_path / "out"), *arguments])
    assert [p.name for p in tmp_path.iterdir()] == ["text"]


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["left"], "write NAME=PATH"),
        (["left=left"], "needs at least two"),
        (["left=left", "left=right.txt"], "given twice"),
        (["left=left", "right=missing.txt"], "no such file"),
        (["left=left", "right=one.txt"], "at least 2 are needed"),
        (["left=left", "right=latin.txt"], "not UTF-8 (byte 4)"),
    ],
)
def test_unusable_own_text_ends_with_one_error(tmp_path, monkeypatch, capsys, texts, says):
    own(tmp_path)
    put(tmp_path / "one.txt", "a single document\nof two lines\n")
    (tmp_path / "latin.txt").write_bytes("caf\u00e9\n\nb".encode("latin-1").replace(b"caf", b"cafe"))
    monkeypatch.chdir(tmp_path)
    arguments = [word for text in texts for word in ("--text", text)]
    assert prepare_data.main(["--out", "out", *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags",
    [["--vocab-size", "256"], ["--vocab-size", "70000"], ["--megabytes", "0"], ["--valid-share", "0.6"]],
)
def test_options_out_of_range_are_refused(tmp_path, capsys, flags):
    with pytest.raises(SystemExit) as ended:
        prepare_data.main(["--out", str(tmp_path / "out"), *flags])
    assert ended.value.code == 2
    assert flags[0] in capsys.readouterr().err.splitlines()[-1]


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path, capsys):
    arguments, _, _ = own(tmp_path)
    put(tmp_path / "out/mine.txt", "keep me")
    assert prepare_data.main(["--out", str(tmp_path / "out"), *arguments]) == 2
    assert "no prepared data" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_without_apt_the_fallback_says_that_genre_is_confounded(tmp_path, monkeypatch, capsys):
    dictionary_cache(tmp_path / "cache")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing here"))
    modules = {f"json/{p.name}": p.read_text() for p in Path(json.__file__).parent.glob("*.py")}
    monkeypatch.setattr(text_sources, "_modules", lambda: modules)
    found = prepare_data.collect(tmp_path / "cache")
    assert found.genre_confounded is True and found.parallel == ()
    said = capsys.readouterr().out
    assert "apt-get" in said and "CONFOUNDED" in said
    russian = found.domains["russian"]
    assert russian.packages == {"wiki_ru_wordnet": "9.9"} and len(russian.documents) == 10
    assert russian.documents["wiki_ru_wordnet/00000"].startswith("слово0 — длинное толкование ")
    # The same words must not train one domain and validate the other.
    docstring = json.JSONDecoder.__doc__.strip().splitlines()[0]
    assert docstring in found.domains["english"].documents["json/decoder.py"]
    assert docstring not in found.domains["code"].documents["json/decoder.py"]
    assert "class JSONDecoder" in found.domains["code"].documents["json/decoder.py"]


def test_without_apt_and_network_the_error_names_the_cure(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert prepare_data.main(["--out", str(tmp_path / "out")]) == 2
    assert "give --text NAME=PATH" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("markup", "plain"),
    [
        ("[[столетие]] {{пример|В {{выдел|веке}} роль.|Автор|Книга}}", "столетие В веке роль."),
        ("{{геол.|ru}} [[время|времени]], ''слово''", "времени, слово"),
        ("верх {{--}} {{п.}} низ {{пример}} край}} [[", "верх — низ край"),
    ],
)
def test_dictionary_markup_goes(markup, plain):
    assert text_sources.plain_wiki(markup) == plain


def mixture(tmp_path, names, iterations, capsys):
    import quickstart_mixture

    put(tmp_path / "data/data.json", json.dumps({"domains": {name: {} for name in names}}))
    flags = ["--train-iters", str(iterations), "--global-batch-size", "16"]
    files = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "mixture.yaml")]
    assert quickstart_mixture.main([*files, *flags]) == 0
    return [line.split("\t") for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize(
    ("names", "iterations"), [(["english", "russian", "code"], 500), ([f"d{i}" for i in range(9)], 7)]
)
def test_the_mixture_file_fits_domains_and_run(tmp_path, capsys, names, iterations):
    from megatron_commute.config import load

    rows = mixture(tmp_path, names, iterations, capsys)
    config = load(tmp_path / "mixture.yaml")
    assert sorted(config.names) == sorted(names) and [row[0] for row in rows] == list(config.names)
    assert sum(domain.budget.amount for domain in config.domains) == 16 * iterations
    assert sum(domain.weight for domain in config.domains) == pytest.approx(1, abs=1e-9)
    assert [domain.path for domain in config.domains] == [
        (str(tmp_path / f"data/{name}_train"),) for name in config.names
    ]
    assert config.every == (100 if iterations == 500 else 1) and config.mode == "fixed"
    assert config.controller.law == "flow" and config.target == {
        min(config.domains, key=lambda d: d.weight).name: 1
    }


def test_a_mixture_file_that_is_there_stays(tmp_path, capsys):
    mixture(tmp_path, ["english", "russian", "code"], 500, capsys)
    text = (tmp_path / "mixture.yaml").read_text(encoding="utf-8").replace("splits: 8", "splits: 4")
    put(tmp_path / "mixture.yaml", text)
    assert mixture(tmp_path, ["english", "russian", "code"], 40, capsys)[0][0] == "english"
    assert (tmp_path / "mixture.yaml").read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("arguments", "settings", "says"),
    [
        (["--foo"], {}, "only --text NAME=PATH and --compare"),
        ([], {"QUICKSTART_DECAY": "step"}, "QUICKSTART_DECAY=step: write cosine, linear, constant or WSD"),
        ([], {"QUICKSTART_SEED": "x"}, "QUICKSTART_SEED=x: write a whole number"),
        ([], {"QUICKSTART_ITERS": "0"}, "positive number of training steps"),
    ],
)
def test_the_quickstart_refuses_before_it_starts(tmp_path, arguments, settings, says):
    command = ["bash", str(LAUNCH / "quickstart.sh"), *arguments]
    place = {"QUICKSTART_DIR": str(tmp_path / "run")}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **place, **settings})
    assert done.returncode == 2 and says in done.stderr
    assert list(tmp_path.iterdir()) == []
