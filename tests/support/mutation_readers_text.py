"""Readers of text files under mutation: mixture file, schedule, record, hostfile, flags as JSON.

Each attempt is judged by a reader that is not ours: PyYAML's scalars as they are written, the csv and json
modules of Python, DeepSpeed's own parser of hostfiles. Texts are decoded by the byte order mark alone.
"""

import codecs
import contextlib
import csv
import io
import json
import math
import os
import sys
import types
from fractions import Fraction
from pathlib import Path

import mutations
import records
import yaml
from mutations import Difference, Reader, require_line

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "launch"))
import hostfile

from megatron_commute.checkpoints import setting
from megatron_commute.checkpoints.files import CheckpointError
from megatron_commute.record import log
from megatron_commute.report import plots, series, tables
from megatron_commute.report.page import page
from megatron_commute.settings import mixture_file, schedule
from megatron_commute.settings.yaml_checks import ConfigError

MARKS = (
    (codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"),
)  # fmt: skip
MIXTURE = """\
# two languages and code
domains:
  en: {path: data/en, weight: 0.5, budget: 12000, min: 0.1, max: 0.9}
  ru:
    path: [data/ru1, "data/ru2"]
    weight: 0.3
    budget: 3.1Mtok
    holdout: 400
  code: {path: data/code, weight: 0.2, budget: null, holdout: data/code_holdout}
target: {en: 0.2, ru: 0.3, code: 0.5}
mode: act
every: 250
lead: 4096
seed: 1234
measure_budget: 0.01
probe: {samples: 64, splits: 4, method: exact, metric: identity, memory: full, time_limit: 30.5}
controller:
  law: tilt
  strength: 1.5
  rate: 0.05
  confidence: 0.95
  floors: 0.05
  caps: {en: 0.8}
  cooldown: 2
  freeze: 0.9
  compare: [hold, tilt]
"""
NAMES = ("en", "ru", "code")
SCHEDULE = """\
at,then,en,ru,code
0,linear,0.5,0.3,0.2
1024,hold,0.25,0.25,0.5
50%,cosine,0.5,0.25,0.25
3100Mtok,hold,0.2,0.2,0.6
"""
HOSTS = "# nodes\nuser@10.0.0.10 slots=2\nuser@10.0.0.11 slots=2  # the second\n\nnode-2\tslots=8\nnode-3 slots=16\n"
FLAGS = {"iteration": 400, "seq_length": 512, "global_batch_size": 64, "micro_batch_size": 8, "train_iters": 1000, "lr": 3e-4, "lr_decay_style": "cosine", "num_layers": 4, "hidden_size": 128, "bf16": True, "ffn_hidden_size": None}  # fmt: skip


def text_of(path):
    """The text of a file by its byte order mark, else UTF-8; None where it is none."""
    raw = path.read_bytes()
    mark, name = next(((m, name) for m, name in MARKS if raw.startswith(m)), (b"", "utf-8"))
    with contextlib.suppress(UnicodeDecodeError):
        return raw[len(mark) :].decode(name)
    return None


def exact(text):
    """A written number as Fraction, by the rules of YAML 1.2 and of Python; None where it is none."""
    with contextlib.suppress(ValueError, OverflowError):
        text = str(text).strip().replace("_", "")
        if text[:2] in ("0x", "0o"):
            return Fraction(int(text, 0))
        if len(text) < 500 and not text.lower().partition("e")[2][4:]:
            return Fraction(text)
    return None


# the mixture file


def write_mixture(folder):
    (folder / "mixture.yaml").write_text(MIXTURE)


def require_same(what, found, written):
    """found: what the program keeps; written: the scalar as it stands in the file."""
    if isinstance(found, bool) or found is None:
        same = written in ("null", "~", "", "Null", "NULL") if found is None else False
    elif isinstance(found, int | float):
        number = exact(written)
        same = number is not None and (Fraction(found) == number or float(number) == found)
    else:
        same = found == written
    if not same:
        raise Difference(f"{what}: kept {found!r}, written {written!r}")


TOKENS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}


def require_budget(found, written):
    if found is None or found.unit == "sequences":
        return require_same("budget", None if found is None else found.amount, written)
    head = written.strip().removesuffix("ens").removesuffix("tok").strip()
    scale = TOKENS.get(head[-1:], 1)
    number = exact(head[:-1] if head[-1] in TOKENS else head)
    if number is None or number * scale != found.amount:
        raise Difference(f"budget: kept {found}, written {written!r}")
    return None


def require_paths(found, written, folder):
    listed = written if isinstance(written, list) else [written]
    if list(found) != [os.path.normpath(folder / Path(path).expanduser()) for path in listed]:
        raise Difference(f"path: kept {found}, written {written!r}")


def attempt_mixture(folder, known):
    path = folder / "mixture.yaml"
    try:
        config = mixture_file.load(path)
    except ConfigError as fault:
        return require_line(fault, "mixture.yaml")
    tree = yaml.load(text_of(path), yaml.BaseLoader)  # every scalar as it is written
    for domain, (name, section) in zip(config.domains, tree["domains"].items(), strict=True):
        if domain.name != name:
            raise Difference(f"{domain.name} is written {name}")
        for key, value in (section or {}).items():
            if key == "path":
                require_paths(domain.path, value, folder)
            elif key == "budget":
                require_budget(domain.budget, value)
            elif key == "holdout" and isinstance(domain.holdout, str):
                require_paths([domain.holdout], value, folder)
            else:
                require_same(key, getattr(domain, {"min": "minimum", "max": "maximum"}.get(key, key)), value)
    for key, value in tree.items():
        if key == "target" and isinstance(value, dict):
            if config.target.keys() != value.keys():
                raise Difference(f"target: {config.target}")
            for name, share in value.items():
                require_same(f"target.{name}", config.target[name], share)
        elif key in ("probe", "controller"):
            for name, one in (value or {}).items():
                require_setting(config, key, name, one)
        elif key == "schedule":
            require_paths([config.schedule], value, folder)
        elif key != "domains":
            require_same(key, getattr(config, key), value)
    return "same"


def require_setting(config, section, key, written):
    found = getattr(getattr(config, section), key)
    if key == "compare":
        if list(found) != list(dict.fromkeys(written)):
            raise Difference(f"compare: kept {found}, written {written}")
    elif key in ("floors", "caps"):
        default = 0.0 if key == "floors" else 1.0
        for name, value in zip(config.names, found, strict=True):
            require_same(
                f"{key}.{name}", value, written.get(name, default) if isinstance(written, dict) else written
            )
    else:
        require_same(f"{section}.{key}", found, written)


# the schedule


def write_schedule(folder):
    (folder / "schedule.csv").write_text(SCHEDULE)


def attempt_schedule(folder, known, samples=10_000_000, length=512):
    path = folder / "schedule.csv"
    try:
        points = schedule.read(path, NAMES, samples, length)
    except ValueError as fault:
        return require_line(fault, "schedule.csv")
    rows = [
        row
        for row in csv.reader(io.StringIO(text_of(path), newline=""), skipinitialspace=True)
        if "".join(row).strip()
    ]
    head = [cell.strip() for cell in rows[0]]
    for point, row in zip(points, rows[1:], strict=True):
        cells = dict(zip(head, row, strict=True))
        weights = [float(cells[name].replace("_", "")) for name in NAMES]
        total = math.fsum(weights)
        if any(abs(a - b / total) > 1e-12 for a, b in zip(point.weights, weights, strict=True)):
            raise Difference(f"{point} is written {row}")
        if point.then != (cells.get("then", "").strip() or "hold"):
            raise Difference(f"{point} is written {row}")
        require_place(
            point.sample, (cells["sample"] if "sample" in cells else cells["at"]).strip(), samples, length
        )
    return "same"


def require_place(found, written, samples, length):
    if written.endswith("%"):
        number = exact(written[:-1]) * samples / 100
    elif written.endswith(("tok", "tokens")):
        head = written.removesuffix("ens").removesuffix("tok").strip()
        number = exact(head.rstrip("kMGBT")) * TOKENS[head[-1] if head[-1] in TOKENS else ""] / length
    else:
        number = exact(written)
    if found != math.ceil(number):
        raise Difference(f"sample {found} is written {written!r}")


# the record


def write_record(folder):
    lines = records.lines(steps=200, log_every=20, probe_every=50)
    (folder / log.NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))


def attempt_record(folder, known):
    path = folder / log.NAME
    try:
        run = plots.shortened(log.find(path))
        page(run, [])
        tables.tables(run)
        series.summary_rows(run)
    except (ValueError, FileNotFoundError) as fault:
        return require_line(fault, log.NAME)
    texts = path.read_bytes().decode("utf-8", "surrogateescape").split("\n")
    lines = [json.loads(text) for text in texts[:-1] if text]
    with contextlib.suppress(ValueError):
        lines += [json.loads(texts[-1])]
    kinds = [*([run.end] if run.end else []), *run.probes, *run.losses, *run.skips, run.start]
    for line in kinds:
        if line not in lines:
            raise Difference(f"a line that the record does not hold: {str(line)[:200]}")
    for event, kept in (("probe", run.probes), ("loss", run.losses), ("skip", run.skips)):
        if run.count(event, kept) != sum(line["event"] == event for line in lines):
            raise Difference(f"{event} lines are counted wrongly")
    return "same"


# the hostfile


def write_hosts(folder):
    (folder / "hosts").write_text(HOSTS)


def attempt_hosts(folder, known):
    from deepspeed.launcher import runner

    path = folder / "hosts"
    try:
        found = hostfile.nodes(path)
    except ValueError as fault:
        return require_line(fault, "hosts")
    runner.logger.disabled = True
    lines = io.StringIO(text_of(path), newline=None).readlines()
    if list(found.items()) != list(runner._parse_hostfile(lines).items()):
        raise Difference(f"{found} is not what DeepSpeed reads")
    return "same"


# flags as JSON


def write_flags(folder):
    (folder / "flags.json").write_text(json.dumps(FLAGS, indent=1))


def attempt_flags(folder, known):
    path = folder / "flags.json"
    try:
        found = setting.extra_flags(types.SimpleNamespace(arguments=str(path)))
    except CheckpointError as fault:
        return require_line(fault, "flags.json")
    expected = json.loads(text_of(path))
    if found.keys() != expected.keys():
        raise Difference(f"{found.keys()} is written {expected.keys()}")
    for flag, value in expected.items():
        if found[flag] != value and exact(value) != found[flag]:
            raise Difference(f"{flag}: kept {found[flag]!r}, written {value!r}")
    return "same"


READERS = [
    Reader(name="mixture file", prepare=write_mixture, attempt=attempt_mixture, mutations=mutations.TEXT),
    Reader(name="schedule", prepare=write_schedule, attempt=attempt_schedule, mutations=mutations.TEXT),
    Reader(name="record", prepare=write_record, attempt=attempt_record, mutations=mutations.TEXT),
    Reader(name="hostfile", prepare=write_hosts, attempt=attempt_hosts, mutations=mutations.TEXT),
    Reader(name="flags", prepare=write_flags, attempt=attempt_flags, mutations=mutations.TEXT),
]
