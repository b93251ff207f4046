"""English and Russian text on the same topics, from Debian documentation, without root."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

from text_sources import DataError, Domain, run
from tqdm import tqdm

# English and Russian trees hold the same pages block by block, since both are generated from one
# source.
PARALLEL = (
    (
        ("libreoffice-help-en-us", "usr/share/libreoffice/help/en-US/text"),
        ("libreoffice-help-ru", "usr/share/libreoffice/help/ru/text"),
        "MPL-2.0",
    ),
    (
        ("debian-handbook", "usr/share/doc/debian-handbook/html/en-US"),
        ("debian-handbook", "usr/share/doc/debian-handbook/html/ru-RU"),
        "GPL-2+ or CC-BY-SA-3.0",
    ),
)

BLOCK = {
    "p",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
    "h6",
    "li",
    "dt",
    "dd",
    "td",
    "th",
    "tr",
    "table",
    "ul",
    "ol",
    "pre",
    "div",
    "body",
    "br",
}
SILENT = {"head", "script", "style", "nav", "aside", "header", "button", "noscript"}


class _Blocks(HTMLParser):
    def __init__(self):
        super().__init__()
        self.blocks, self.words, self.silent = [], [], 0

    def flush(self):
        self.blocks.append(" ".join("".join(self.words).split()))
        self.words = []

    def handle_starttag(self, tag, attrs):
        self.silent += tag in SILENT
        if tag in BLOCK:
            self.flush()

    def handle_endtag(self, tag):
        self.silent -= tag in SILENT
        if tag in BLOCK:
            self.flush()

    def handle_data(self, data):
        if not self.silent:
            self.words.append(data)


def html_blocks(page: str) -> list[str]:
    """Text of every block element of an HTML page, in order, white space collapsed; empty blocks
    are ''.
    """
    parser = _Blocks()
    parser.feed(page)
    parser.close()
    parser.flush()
    return parser.blocks


def translated(english: str, russian: str) -> bool:
    """True for a block that was translated: it differs and is mostly Cyrillic."""
    cyrillic = len(re.findall(r"[а-яё]", russian, re.IGNORECASE))
    return english != russian and cyrillic > len(re.findall(r"[a-z]", russian, re.IGNORECASE))


def parallel_pages(english_root: Path, russian_root: Path, seen: set[str]) -> dict[str, tuple[str, str]]:
    """Pages present in both trees, as {relative path: (english text, russian text)}.

    Only translated blocks are kept, each once (`seen` collects them): pages share boilerplate, and
    a block that occurs in two pages would leak from training into validation.
    """
    pages = {}
    files = sorted(english_root.rglob("*.html"))
    for path in tqdm(files, desc="reading page pairs", unit="page", leave=False, disable=None):
        twin = russian_root / path.relative_to(english_root)
        if not twin.is_file():
            continue
        english, russian = (html_blocks(p.read_text(encoding="utf-8")) for p in (path, twin))
        if len(english) != len(russian):
            continue
        kept = []
        for pair in zip(english, russian, strict=True):
            if translated(*pair) and pair[0] not in seen:
                seen.add(pair[0])
                kept.append(pair)
        if kept:
            left, right = zip(*kept, strict=True)
            pages[path.relative_to(english_root).as_posix()] = ("\n".join(left), "\n".join(right))
    return pages


def _download_deb(package: str, folder: Path, lists: Path) -> str | None:
    """`apt-get download` with the system's package lists, else with private ones; None or why it
    failed.
    """
    network = ["Acquire::Retries=0", "Acquire::http::Timeout=20", "APT::Sandbox::User=root"]
    private = [f"Dir::State={lists}", f"Dir::State::lists={lists}/lists", f"Dir::Cache={lists}/cache"]

    def apt(settings, *command):
        options = [word for setting in settings for word in ("-o", setting)]
        return run(["apt-get", *options, *command], cwd=folder)

    if apt(network, "download", package) is None:
        return None
    if lists.is_dir() and apt(network + private, "download", package) is None:
        return None
    # No lists, or old ones that name packages gone since; refreshing the system's own would need
    # root.
    (lists / "lists/partial").mkdir(parents=True, exist_ok=True)
    (lists / "cache").mkdir(exist_ok=True)
    print(f"  not to be had with this system's package lists: fetching private ones into {lists}", flush=True)
    return apt(network + private, "update") or apt(network + private, "download", package)


def debian_package(package: str, cache: Path) -> tuple[Path, str]:
    """Unpacked tree and version of a Debian package: `apt-get download` + `dpkg -x` into cache,
    without root.

    Raises DataError with the reason where apt or dpkg is absent or the package cannot be
    downloaded.
    """
    tree = cache / package
    if not tree.is_dir():
        missing = [tool for tool in ("apt-get", "dpkg", "dpkg-deb") if shutil.which(tool) is None]
        if missing:
            raise DataError(f"{' and '.join(missing)} not found")
        work = cache / f".{package}.part"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        print(f"  downloading {package}", flush=True)
        why = _download_deb(package, work, cache.absolute() / "apt")
        if why is None:
            deb = next(work.glob("*.deb"))
            why = run(["dpkg", "-x", str(deb), str(work)])
        if why:
            raise DataError(f"{package}: {why}")
        version = subprocess.run(
            ["dpkg-deb", "-f", str(deb), "Version"], check=True, capture_output=True, text=True
        ).stdout.strip()
        (work / "VERSION").write_text(version, encoding="utf-8")
        deb.unlink()
        work.rename(tree)
    return tree, (tree / "VERSION").read_text(encoding="utf-8")


def debian_pair(cache: Path) -> tuple[Domain, Domain]:
    """English and Russian documents of the same names and topics; DataError without a pair."""
    texts, packages, licences, seen, reasons = {}, ({}, {}), {}, set(), []
    for english, russian, licence in PARALLEL:
        try:
            trees = [debian_package(package, cache) for package, _ in (english, russian)]
        except DataError as error:
            reasons.append(str(error))
            continue
        roots = [tree / inside for (tree, _), (_, inside) in zip(trees, (english, russian), strict=True)]
        pages = parallel_pages(*roots, seen)
        texts |= {f"{english[0]}/{name}": pair for name, pair in pages.items()}
        for side, (package, _), (_, version) in zip(packages, (english, russian), trees, strict=True):
            side[package] = version
            licences[package] = licence
    if not texts:
        raise DataError("; ".join(dict.fromkeys(reasons)) or "the packages hold no translated page")
    for reason in reasons:
        print(f"  left out: {reason}", flush=True)
    return tuple(
        Domain(
            {name: pair[side] for name, pair in texts.items()},
            "Debian packages, translated blocks only",
            packages[side],
            {package: licences[package] for package in packages[side]},
        )
        for side in (0, 1)
    )
