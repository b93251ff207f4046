#!/usr/bin/env python3
"""Text to Megatron: domains as NAME_train and NAME_valid .bin/.idx, one byte-level BPE for all.

    python launch/prepare_data.py --out quickstart/data    # english, russian (parallel), code
    python launch/prepare_data.py --out study/data --by-package --vocab-size 512
    python launch/prepare_data.py --out mydata --text a=a.txt --text b=folder

Beside the data lie tokenizer.json, data.json (sources, packages, licences, bytes, tokens) and, for
each prefix, PREFIX.json with the tokenizer's sha256 and the vocabulary size.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import re
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from parallel_text import debian_pair
from text_sources import (
    DataError,
    Domain,
    own_text,
    russian_dictionary,
    standard_library_code,
    standard_library_prose,
)
from text_tokens import END_OF_DOCUMENT, train_tokenizer, write
from tqdm import tqdm

PARALLEL_NOTE = (
    "english and russian are the same pages block by block: topic and genre are held fixed between them"
)
CONFOUNDED_NOTE = (
    "Language and genre are CONFOUNDED: english is reference documentation, russian is dictionary entries. "
    "A difference between these two domains says nothing about language as such."
)
OWN_NOTE = "own text: whether genre differs along with the domain is for its owner to judge"


@dataclass(frozen=True)
class Collection:
    """The domains of one run; `parallel` ones share their document names; genre_confounded None:
    unknown.
    """

    domains: dict[str, Domain]
    parallel: tuple[str, ...]
    genre_confounded: bool | None
    note: str


def by_package(pair: tuple[Domain, Domain]) -> Collection:
    """english and russian of the largest package, the pages of each other package as domains of
    their own, and code.
    """
    parts: dict[str, list[str]] = {}
    for name in pair[0].documents:
        parts.setdefault(name.partition("/")[0], []).append(name)
    first, *others = sorted(parts, key=lambda part: -len(parts[part]))
    if not others:
        raise DataError(f"--by-package: only {first} could be had, two packages are needed")
    domains = {}
    for part in (first, *others):
        prefix = "" if part == first else part.removeprefix("debian-") + "_"
        for language, whole in zip(("english", "russian"), pair, strict=True):
            documents = {name: whole.documents[name] for name in parts[part]}
            domains[prefix + language] = dataclasses.replace(whole, documents=documents)
    return Collection(
        {**domains, "code": standard_library_code()}, ("english", "russian"), False, PARALLEL_NOTE
    )


def collect(cache: Path, separate: bool = False) -> Collection:
    """english, russian and code: a parallel pair where apt works, else PyPI and the standard
    library.

    separate: see `by_package`; DataError where there is no parallel pair.
    """
    try:
        english, russian = debian_pair(cache)
    except DataError as error:
        if separate:
            raise
        print(f"No parallel English-Russian text from Debian packages ({error})", flush=True)
    else:
        if separate:
            return by_package((english, russian))
        domains = {"english": english, "russian": russian, "code": standard_library_code()}
        return Collection(domains, ("english", "russian"), False, PARALLEL_NOTE)
    russian = russian_dictionary(cache)
    # English comes out of the docstrings here, so the code must not hold the same words again.
    code = standard_library_code(keep_docstrings=False)
    print("\n".join(["!" * 100, *textwrap.wrap(CONFOUNDED_NOTE, 100), "!" * 100]), flush=True)
    domains = {"english": standard_library_prose(), "russian": russian, "code": code}
    return Collection(domains, (), True, CONFOUNDED_NOTE)


def own_domains(texts: Iterable[str]) -> dict[str, Domain]:
    """Domains of the user's own text from NAME=PATH arguments; DataError names one that cannot be
    used.
    """
    domains = {}
    for text in texts:
        name, _, path = text.partition("=")
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name) or not path:
            raise DataError(f"--text {text}: write NAME=PATH, NAME of letters, digits, _ and -")
        if name in domains:
            raise DataError(f"--text {text}: the domain {name} is given twice; give each domain one path")
        domains[name] = own_text(Path(path))
    if len(domains) == 1:
        raise DataError(
            f"--text: only the domain {name} is given, a mixture needs at least two; give another one"
        )
    return domains


def _rank(seed: int, purpose: str, name: str) -> bytes:
    return hashlib.sha256(f"{seed}/{purpose}/{name}".encode()).digest()


def choose(documents: list[dict[str, str]], most_bytes: int, seed: int) -> list[str]:
    """Names of the documents to use, in a seeded order, until a domain would exceed most_bytes
    (UTF-8).

    documents: one mapping, or several that share their names (a parallel pair); at least two names
    are kept.
    """
    names, filled = [], [0] * len(documents)
    for name in sorted(documents[0], key=lambda name: _rank(seed, "order", name)):
        filled = [have + len(texts[name].encode()) for have, texts in zip(filled, documents, strict=True)]
        if max(filled) > most_bytes and len(names) >= 2:
            break
        names.append(name)
    return names


def split(names: list[str], valid_share: float, seed: int) -> tuple[list[str], list[str]]:
    """Training and validation names, by document; names alone decide, so a parallel pair splits
    alike.
    """
    count = max(1, round(valid_share * len(names)))
    valid = set(sorted(names, key=lambda name: _rank(seed, "split", name))[:count])
    return [name for name in names if name not in valid], [name for name in names if name in valid]


def build(collection: Collection, options: dict, folder: Path) -> dict:
    """Write one prepared data set into an existing empty folder; returns what data.json says."""
    most, seed = round(options["megabytes"] * 1e6), options["seed"]
    texts = {}
    for name, domain in collection.domains.items():
        group = collection.parallel if name in collection.parallel else (name,)
        names = choose([collection.domains[member].documents for member in group], most, seed)
        parts = split(names, options["valid_share"], seed)
        for part, chosen in zip(("train", "valid"), parts, strict=True):
            texts[name, part] = [domain.documents[document] for document in chosen]
    print(f"training a byte-level BPE of {options['vocab_size']} tokens on equal shares", flush=True)
    training = [texts[name, "train"] for name in collection.domains]
    tokenizer = train_tokenizer(training, options["vocab_size"])
    tokenizer.save(str(folder / "tokenizer.json"))
    sidecar = {
        "tokenizer": hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest(),
        "vocab_size": tokenizer.get_vocab_size(),
    }
    record = {
        "options": options,
        "genre_confounded": collection.genre_confounded,
        "note": collection.note,
        **sidecar,
        "end_of_document": tokenizer.token_to_id(END_OF_DOCUMENT),
        "domains": {},
    }
    sizes = {key: sum(len(text.encode()) for text in value) for key, value in texts.items()}
    with tqdm(
        total=sum(sizes.values()), desc="tokenizing", unit="B", unit_scale=True, disable=None
    ) as progress:
        for name, domain in collection.domains.items():
            entry = {"source": domain.source, "packages": domain.packages, "licences": domain.licences}
            for part in ("train", "valid"):
                prefix = folder / f"{name}_{part}"
                tokens = write(prefix, texts[name, part], tokenizer, progress)
                prefix.with_suffix(".json").write_text(json.dumps(sidecar) + "\n", encoding="utf-8")
                entry[part] = {
                    "prefix": prefix.name,
                    "documents": len(texts[name, part]),
                    "bytes": sizes[name, part],
                    "tokens": tokens,
                }
            record["domains"][name] = entry
    (folder / "data.json").write_text(
        json.dumps(record, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
    )
    return record


def prepare(out: Path, cache: Path, texts: list[str], options: dict) -> dict:
    """Prepare OUT unless it already holds the same; returns its record. Appears whole or not at
    all.

    Raises DataError when OUT holds something else or the text cannot be had.
    """
    own = own_domains(texts)
    digests = {
        name: hashlib.sha256(json.dumps(domain.documents).encode()).hexdigest()
        for name, domain in own.items()
    }
    options = {**options, "text": digests}
    if (out / "data.json").is_file():
        record = json.loads((out / "data.json").read_text(encoding="utf-8"))
        if record["options"] == options:
            print(f"{out} is prepared already with these options", flush=True)
            return record
        changed = sorted(key for key in options if record["options"].get(key) != options[key])
        raise DataError(
            f"{out} was prepared with other options ({', '.join(changed)}); "
            "give the same ones again, remove it or choose another --out"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists and is no prepared data; choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as work:
        part = Path(work) / "data"
        part.mkdir()
        separate = options.get("by_package", False)
        record = build(
            Collection(own, (), None, OWN_NOTE) if own else collect(cache, separate), options, part
        )
        os.replace(part, out)
    return record


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write; appears when complete")
    parser.add_argument(
        "--cache", type=Path, help="downloads are kept here (default: OUT with -cache appended)"
    )
    parser.add_argument(
        "--text", metavar="NAME=PATH", action="append", default=[], help="own text; repeat it"
    )
    parser.add_argument(
        "--by-package", action="store_true", help="pages of each smaller package as domains of their own"
    )
    parser.add_argument("--vocab-size", type=int, default=4096, help="tokens, at most 65536 (default 4096)")
    parser.add_argument("--megabytes", type=float, default=4.0, help="most text of one domain (default 4)")
    parser.add_argument(
        "--valid-share", type=float, default=0.05, help="share of documents that validate (0.05)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order of documents and of the split")
    arguments = parser.parse_args(argv)
    if not 257 <= arguments.vocab_size <= 65536:
        parser.error("--vocab-size: 257 (every byte and the end of a document) to 65536 (uint16)")
    if not arguments.megabytes > 0:
        parser.error("--megabytes: give a number above 0")
    if not 0 < arguments.valid_share <= 0.5:
        parser.error("--valid-share: give a share above 0 and at most 0.5")
    if arguments.by_package and arguments.text:
        parser.error("--by-package: own text has no packages; leave one of --by-package and --text out")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = _arguments(argv)
    began = time.monotonic()
    options = {key: getattr(arguments, key) for key in ("vocab_size", "megabytes", "valid_share", "seed")}
    if arguments.by_package:
        options["by_package"] = True
    cache = arguments.cache or arguments.out.with_name(arguments.out.name + "-cache")
    try:
        record = prepare(arguments.out, cache, arguments.text, options)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, entry in record["domains"].items():
        train, valid = entry["train"], entry["valid"]
        print(
            f"  {name}: {train['bytes'] / 1e6:.2f} MB, {train['tokens']} tokens for training, "
            f"{valid['tokens']} for validation ({entry['source']})"
        )
    print(f"{record['note']}\n{arguments.out}: ready in {time.monotonic() - began:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
