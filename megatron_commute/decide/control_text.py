"""Whether the text of a control file is harmless to parse: checked event by event, so that a parser
that would take for ever never gets to see it.
"""

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.events import (
    AliasEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

from megatron_commute.settings.yaml_checks import ConfigError

LARGEST = 1 << 16  # bytes of a file
DEEPEST = 8  # mappings and lists inside one another
MOST = 4000  # values, with what aliases repeat
LONGEST_NUMBER = 32  # characters of a key or value that looks like a number


def check(text: str, file: str) -> None:
    """ConfigError for a text that is too deep or too large, or repeats itself without end.

    What is no YAML passes: the parser proper says where it breaks.
    """
    sizes, open_nodes = {}, []
    count = 0
    try:
        for event in YAML(typ="rt", pure=True).parse(text):
            if isinstance(event, MappingStartEvent | SequenceStartEvent):
                open_nodes.append((event, count))
            if isinstance(event, AliasEvent) and event.anchor not in sizes:
                raise _refusal(file, event, f"*{event.anchor} stands inside itself or for nothing")
            count += sizes[event.anchor] if isinstance(event, AliasEvent) else 1
            if len(open_nodes) > DEEPEST:
                raise _refusal(file, event, f"more than {DEEPEST} levels inside one another")
            if count > MOST:
                raise _refusal(file, event, f"more than {MOST} values")
            if isinstance(event, ScalarEvent):
                _check_number(event, file)
                if event.anchor:
                    sizes[event.anchor] = 1
            if isinstance(event, MappingEndEvent | SequenceEndEvent):
                begun, before = open_nodes.pop()
                if begun.anchor:
                    sizes[begun.anchor] = count - before
    except MarkedYAMLError:
        return


def _check_number(event, file):
    digits = event.value.lstrip("+-")
    if len(digits) > LONGEST_NUMBER and digits[0].isdigit() and event.style is None:
        raise _refusal(file, event, f"a number of {len(digits)} characters")


def _refusal(file, event, problem):
    cure = "write the known keys with plain values"
    return ConfigError(f"{file}:{event.start_mark.line + 1}: {problem}; {cure}")
