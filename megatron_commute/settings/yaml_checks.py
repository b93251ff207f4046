"""YAML read strictly: every complaint has the form `file:line: key: problem; cure`."""

import difflib
import hashlib
import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any, NoReturn

from ruamel.yaml import YAML
from ruamel.yaml.comments import TaggedScalar
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from megatron_commute.settings import text_files

Check = Callable[[Any], Any]
LARGEST_NUMBER = 2**63 - 1  # of samples, steps and tokens
_MOST_VALUES, _DEEPEST = 100_000, 50  # of a file, with what its anchors repeat
_NUMBER = re.compile(r"[+-]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)


class ConfigError(ValueError):
    """A mixture file, or a run that does not fit it; the message names the key and the cure."""


class Refused(Exception):
    """A check turns a value down. The text is the cure; the reader adds file, line, key and the
    value.
    """


def complaint(file: str, lines: Mapping[str, int], key: str, problem: str, cure: str) -> ConfigError:
    """The error about a dotted `key`, at its line or at that of the nearest key above it."""
    holder = key
    while holder and holder not in lines:
        holder = holder.rpartition(".")[0]
    line = f":{lines[holder]}" if holder else ""
    return ConfigError(one_line(f"{file}{line}: {key}: {problem}; {cure}"))


def one_line(text: str) -> str:
    """The text with line feeds, control characters and the like as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def did_you_mean(written: Any, known: Iterable[str]) -> str:
    """ " (did you mean ...?)" when something known is close to what was written, else nothing."""
    close = difflib.get_close_matches(str(written), list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


class Document:
    """A YAML mapping with the line of every key; what is no mapping or repeats a key is a
    ConfigError.
    """

    def __init__(self, file: str, content: str | None = None, most: int = text_files.LARGEST):
        """content: the text of the file, where it was read already. most: bytes it may hold."""
        self.file = file
        self.lines: dict[str, int] = {}
        try:
            text = text_files.read(file, most, "a mixture file") if content is None else content
            tree = _loaded(text)
        except text_files.TextFileError as error:
            raise ConfigError(str(error)) from error
        except DuplicateKeyError as error:
            self._refuse_yaml(error, "the key is written twice", "keep one of the two")
        except MarkedYAMLError as error:
            self._refuse_yaml(error, f"is not YAML: {error.problem}", "correct the line")
        except YAMLError as error:
            raise self._unreadable(f"is not YAML: {str(error).splitlines()[0]}") from error
        except RecursionError as error:
            raise self._unreadable("is nested too deeply") from error
        except Exception as error:  # of the parser, on a value that it takes for a date or a number
            raise self._unreadable(f"holds a value that YAML cannot read: {error}") from error
        if not isinstance(tree, Mapping):
            raise ConfigError(
                f"{file}: is not a mapping of keys; write at least domains: {{NAME: {{path: PREFIX}}}}"
            )
        self._count = 0
        self.tree = self._plain(tree, 0)
        self._note_lines("", tree)

    def _unreadable(self, problem: str) -> ConfigError:
        return ConfigError(one_line(f"{self.file}: {problem}; correct the file"))

    def _plain(self, node: Any, depth: int) -> Any:
        """The tree in Python's own types. Anchors may repeat, within limits, and never contain
        themselves.
        """
        self._count += 1
        if depth > _DEEPEST or self._count > _MOST_VALUES:
            raise self._unreadable("is nested too deeply, or its anchors repeat too much")
        if isinstance(node, Mapping):
            if strange := [key for key in node if not isinstance(key, str | int | float | None)]:
                raise self._unreadable(f"has a key that is no name, {shown(strange[0])}")
            return {_scalar(key): self._plain(value, depth + 1) for key, value in node.items()}
        if isinstance(node, list | tuple | set):
            return [self._plain(item, depth + 1) for item in node]
        return _scalar(node)

    def _refuse_yaml(self, error: MarkedYAMLError, problem: str, cure: str) -> NoReturn:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        snippet = (mark.get_snippet(indent=0) or "").partition("\n")[0].strip() if mark else ""
        key = snippet.partition(":")[0].strip(" {-") if isinstance(error, DuplicateKeyError) else ""
        told = f"{self.file}{line}: {key + ': ' if key else ''}{problem}; {cure}"
        raise ConfigError(one_line(told)) from error

    def _note_lines(self, prefix: str, node: Mapping) -> None:
        for key, value in node.items():
            dotted = f"{prefix}{key}"
            # A key merged in by an anchor has no position of its own; the key above it stands in.
            if key in (node.lc.data or {}):
                self.lines[dotted] = node.lc.key(key)[0] + 1
            if isinstance(value, Mapping):
                self._note_lines(f"{dotted}.", value)

    def digest(self) -> str:
        """sha256 of the content: comments, layout and the file's place do not count."""
        return hashlib.sha256(json.dumps(self.tree, default=str).encode()).hexdigest()

    def error(self, key: str, problem: str, cure: str) -> ConfigError:
        return complaint(self.file, self.lines, key, problem, cure)

    def section(self, key: str, value: Any, checks: Mapping[str, Check]) -> dict[str, Any]:
        """The checked values of one mapping (None: an empty one); a key outside `checks` is
        refused.
        """
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise self.error(key, f"got {shown(value)}", f"write a mapping with the keys {', '.join(checks)}")
        prefix = f"{key}." if key else ""
        result = {}
        for name, item in value.items():
            dotted = f"{prefix}{name}"
            if name not in checks:
                cure = f"known here: {', '.join(checks)}{did_you_mean(name, checks)}"
                raise self.error(dotted, "unknown key", cure)
            try:
                result[name] = checks[name](item)
            except Refused as cure:
                raise self.error(dotted, f"got {shown(item)}", str(cure)) from None
        return result


def _loaded(text: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the parser, on numbers that YAML 1.1 reads in another way
        return YAML(typ="rt").load(text)


def _scalar(node: Any) -> Any:
    if isinstance(node, TaggedScalar):
        node = node.value
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node


def shown(value: Any) -> str:
    """A value as one would write it in YAML, shortened, in one line."""
    if isinstance(value, str):
        return one_line(value[:60]) or "an empty text"
    try:
        text = json.dumps(value, default=str, ensure_ascii=False)
    except (TypeError, ValueError):  # ValueError: a whole number of thousands of digits
        text = f"a {type(value).__name__}"
    return one_line(text if len(text) <= 60 else text[:57] + "...")


def written_number(value: Any) -> Decimal | None:
    """The number that a YAML value stands for, however it is written (400, 4e2, 400.0, 4_00,
    '400'); None where it is none.
    """
    if isinstance(value, Decimal):
        return value
    if isinstance(value, float):
        return Decimal(repr(value)) if math.isfinite(value) else None
    if isinstance(value, int):
        return None if isinstance(value, bool) else Decimal(value)
    if not isinstance(value, str) or not _NUMBER.fullmatch(value.strip()):
        return None
    try:
        return Decimal(value.strip().replace("_", ""))
    except InvalidOperation:  # an exponent past all bounds
        return None


def whole(value: Any) -> int | None:
    """The whole number that a YAML value stands for, however it is written, else None."""
    number = written_number(value)
    if number is None or abs(number) > LARGEST_NUMBER or number != int(number):
        return None
    return int(number)


# ---- checks: what was written -> what the program keeps, or Refused(cure)


def integer(cure: str, least: int) -> Check:
    def check(value: Any) -> int:
        found = whole(value)
        if found is None or found < least:
            raise Refused(cure)
        return found

    return check


def number(cure: str, inside: Callable[[float], bool]) -> Check:
    def check(value: Any) -> float:
        found = written_number(value)
        if found is None or not math.isfinite(float(found)) or not inside(float(found)):
            raise Refused(cure)
        return float(found)

    return check


def boolean(value: Any) -> bool:
    """true or false."""
    if not isinstance(value, bool):
        raise Refused("write true or false")
    return value


def one_of(known: tuple[str, ...]) -> Check:
    def check(value: Any) -> str:
        if value not in known:
            raise Refused(f"write one of {', '.join(known)}{did_you_mean(value, known)}")
        return value

    return check


def text(cure: str) -> Check:
    def check(value: Any) -> str:
        if not isinstance(value, str) or not value.strip():
            raise Refused(cure)
        return value

    return check


def or_null(check: Check) -> Check:
    return lambda value: None if value is None else check(value)


def anything(value: Any) -> Any:
    """No check here: the value is a section of its own."""
    return value
