"""Real text from installed and downloadable packages, as named documents; none is kept in this
repository.
"""

import ast
import contextlib
import re
import shutil
import sqlite3
import subprocess
import sys
import sysconfig
import tarfile
import warnings
from dataclasses import dataclass
from pathlib import Path


class DataError(ValueError):
    """Text that cannot be had or used; the message names the cure."""


@dataclass(frozen=True)
class Domain:
    """One domain: its documents by name, where they come from, packages and licences by package
    name.
    """

    documents: dict[str, str]
    source: str
    packages: dict[str, str]
    licences: dict[str, str]


# Without these the standard library is half tests, character tables and prose in disguise.
NOT_CODE = {
    "test",
    "tests",
    "idle_test",
    "encodings",
    "pydoc_data",
    "lib2to3",
    "site-packages",
    "dist-packages",
}


def run(command: list[str], **options) -> str | None:
    """None when the command succeeds, else the last thing it said."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, **options)
    said = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()
    return None if done.returncode == 0 else said[-1]


def _modules() -> dict[str, str]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = (p.relative_to(root) for p in sorted(root.rglob("*.py")))
    # A module in an odd encoding is left out; it would only teach the tokenizer replacement
    # characters.
    modules = {}
    for path in paths:
        if not NOT_CODE.intersection(path.parts):
            with contextlib.suppress(UnicodeDecodeError):
                modules[path.as_posix()] = (root / path).read_text(encoding="utf-8")
    return modules


def _docstrings(source: str) -> list[tuple[int, int, str]]:
    """First line, last line (1-based, inclusive) and text of every docstring of a module."""
    found = []
    with warnings.catch_warnings():
        # Some modules hold escapes that a newer compiler frowns upon; that is their business.
        warnings.simplefilter("ignore")
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                found.append((node.body[0].lineno, node.body[0].end_lineno, text))
    return found


def without_docstrings(source: str) -> str:
    """A module's source lines less those of its docstrings (need not compile any more)."""
    lines = source.splitlines(keepends=True)
    for first, last, _ in sorted(_docstrings(source), reverse=True):
        del lines[first - 1 : last]
    return "".join(lines)


def standard_library_code(keep_docstrings: bool = True) -> Domain:
    """The running interpreter's *.py, one document a module, without tests and character tables."""
    modules = _modules()
    if not modules:
        raise DataError(
            "this interpreter has no standard library sources; use a full CPython or --text NAME=PATH"
        )
    if not keep_docstrings:
        modules = {name: without_docstrings(text) for name, text in modules.items()}
    source = "CPython standard library" + ("" if keep_docstrings else ", docstrings taken out")
    return Domain(modules, source, {"python": sys.version.split()[0]}, {"python": "PSF-2.0"})


def standard_library_prose() -> Domain:
    """English from the running interpreter: topics of the language reference, docstrings of each
    module.
    """
    from pydoc_data.topics import topics

    documents = {f"pydoc_data/topics/{name}": text for name, text in topics.items()}
    for name, source in _modules().items():
        prose = [text for _, _, text in _docstrings(source) if len(text) > 80]
        if prose:
            documents[name] = "\n\n".join(prose)
    return Domain(
        documents,
        "CPython reference topics and docstrings",
        {"python": sys.version.split()[0]},
        {"python": "PSF-2.0"},
    )


def plain_wiki(markup: str) -> str:
    """A Wiktionary gloss without its markup: examples and emphasis stay as text, labels and
    references go.
    """

    def template(match):
        name, *arguments = match.group(1).split("|")
        if name in ("пример", "выдел"):
            return (" " if name == "пример" else "") + (arguments[0] if arguments else "")
        return "—" if name.strip("-") == "" else ""

    text = re.sub(r"\[\[(?:[^][|]*\|)?([^][|]*)\]\]", r"\1", markup)
    before = None
    while before != text:
        before, text = text, re.sub(r"\{\{([^{}]*)\}\}", template, text)
    text = re.sub(r"\'{2,}|[{}#]+|\[\[|\]\]|<[^>]*>", " ", text)
    return " ".join(text.split()).lstrip(" ,;:.")


def russian_dictionary(cache: Path, entries_per_document: int = 40) -> Domain:
    """Russian glosses with their examples, from the PyPI sdist wiki_ru_wordnet: unpacked, not
    installed.
    """
    name = "wiki_ru_wordnet"
    folder = cache / name
    if not list(folder.glob("*.tar.gz")):
        print(f"  downloading {name} (21 MB)", flush=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        why = run([*pip, "--dest", str(folder), name])
        if why:
            raise DataError(
                f"no Russian text: {name} from PyPI: {why}. Go online once, or give --text NAME=PATH"
            )
    archive = sorted(folder.glob("*.tar.gz"))[0]
    database = folder / "wikiwordnet.db"
    if not database.is_file():
        with tarfile.open(archive) as tar:
            member = next(m for m in tar if m.name.endswith("/wikiwordnet.db"))
            part = folder / "wikiwordnet.part"
            with tar.extractfile(member) as packed, part.open("wb") as plain:
                shutil.copyfileobj(packed, plain)
            part.rename(database)
    with contextlib.closing(
        sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)
    ) as connection:
        rows = connection.execute("select lemma, definition from synsets order by synset_id").fetchall()
    # A definition reads lemma~ru~lemma~ru~gloss~number~number.
    glosses = [(lemma, plain_wiki(parts[4])) for lemma, row in rows if len(parts := row.split("~")) > 4]
    entries = list(dict.fromkeys(f"{lemma} — {gloss}" for lemma, gloss in glosses if len(gloss) > 20))
    documents = {
        f"{name}/{start // entries_per_document:05d}": "\n".join(
            entries[start : start + entries_per_document]
        )
        for start in range(0, len(entries), entries_per_document)
    }
    version = archive.name.removeprefix(f"{name}-").removesuffix(".tar.gz")
    return Domain(documents, "dictionary entries from PyPI", {name: version}, {name: "MIT"})


def own_text(path: Path) -> Domain:
    """The user's text: one document per file of a folder, or per blank-line-separated block of one
    file.
    """
    if path.is_dir():
        files = [p for p in sorted(path.rglob("*")) if p.is_file() and not p.name.startswith(".")]
        texts = {p.relative_to(path).as_posix(): _read(p) for p in files}
    elif path.is_file():
        blocks = re.split(r"\n[ \t]*\n\s*", _read(path))
        texts = {f"{path.name}/{i:08d}": block for i, block in enumerate(blocks)}
    else:
        raise DataError(f"{path}: no such file or folder; --text takes NAME=PATH")
    documents = {name: text.strip() for name, text in texts.items() if text.strip()}
    if len(documents) < 2:
        raise DataError(
            f"{path}: {len(documents)} document found, at least 2 are needed (one trains, one validates); "
            "give a folder of files, or one file whose documents are parted by blank lines"
        )
    return Domain(documents, "own text", {}, {})


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 (byte {error.start}); convert it, for instance with iconv"
        ) from error
