"""YAML read strictly: every complaint has the form `file:line: key: problem; cure`."""

import difflib
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError

Check = Callable[[Any], Any]


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
    return ConfigError(f"{file}{line}: {key}: {problem}; {cure}")


def did_you_mean(written: Any, known: Iterable[str]) -> str:
    """ " (did you mean ...?)" when something known is close to what was written, else nothing."""
    close = difflib.get_close_matches(str(written), list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


class Document:
    """A YAML mapping with the line of every key; what is no mapping or repeats a key is a
    ConfigError.
    """

    def __init__(self, file: str, content: str | None = None):
        """content: the text of the file, where it was read already."""
        self.file = file
        self.lines: dict[str, int] = {}
        try:
            text = Path(file).read_text(encoding="utf-8") if content is None else content
        except OSError as error:
            raise ConfigError(f"{file}: cannot be read: {error.strerror}; name a mixture file") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{file}: is not UTF-8 text ({error.reason}); save it as UTF-8") from error
        try:
            tree = YAML(typ="rt").load(text)
        except DuplicateKeyError as error:
            self._refuse_yaml(error, "the key is written twice", "keep one of the two")
        except MarkedYAMLError as error:
            self._refuse_yaml(error, f"is not YAML: {error.problem}", "correct the line")
        except YAMLError as error:
            raise ConfigError(f"{file}: is not YAML: {error}; correct the file") from error
        if not isinstance(tree, Mapping):
            raise ConfigError(
                f"{file}: is not a mapping of keys; write at least domains: {{NAME: {{path: PREFIX}}}}"
            )
        self._note_lines("", tree)
        self.tree = _plain(tree)

    def _refuse_yaml(self, error: MarkedYAMLError, problem: str, cure: str) -> NoReturn:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        snippet = (mark.get_snippet(indent=0) or "").partition("\n")[0].strip() if mark else ""
        key = snippet.partition(":")[0].strip(" {-") if isinstance(error, DuplicateKeyError) else ""
        raise ConfigError(f"{self.file}{line}: {key + ': ' if key else ''}{problem}; {cure}") from error

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


def _plain(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {_plain(key): _plain(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [_plain(item) for item in node]
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node


def shown(value: Any) -> str:
    """A value as one would write it in YAML, shortened."""
    if isinstance(value, str):
        return value[:60] or "an empty text"
    try:
        text = json.dumps(value, default=str, ensure_ascii=False)
    except TypeError:
        text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ---- checks: what was written -> what the program keeps, or Refused(cure)


def integer(cure: str, least: int) -> Check:
    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise Refused(cure)
        return value

    return check


def number(cure: str, inside: Callable[[float], bool]) -> Check:
    def check(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise Refused(cure)
        if not math.isfinite(value) or not inside(value):
            raise Refused(cure)
        return float(value)

    return check


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
