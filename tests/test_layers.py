"""The house: imports point one way, frameworks end in adapters/, imports are cheap, files short."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "megatron_commute"
# From the bottom up: a room may import from its own line and from those above it, in functions too.
LAYERS = [
    ["bracket", "intervals", "feasible", "reduce", "settings", "kernels"],
    ["config", "mixture", "ops", "record"],
    ["hvp", "data"],
    ["measure"],
    ["design", "decide"],
    ["hook", "report"],
    ["adapters"],
    ["checkpoints", "experiments"],
    ["patch", "cli", "doctor", "__main__"],
]
WITH_TORCH = [
    "reduce",
    "ops",
    "hvp",
    "measure",
    "design",
    "hook",
    "adapters",
    "checkpoints",
    "experiments",
    "kernels",
]
WITH_TORCH += ["data.indexed", "data.stream", "record.tally", "decide.steering"]
HEAVY = [
    "matplotlib",
    "scipy",
    "deepspeed",
    "megatron",
    "tokenizers",
    "tabulate",
    "tqdm",
    "safetensors",
    "transformers",
]


def name_of(path):
    """megatron_commute/adapters/torch_loop.py -> adapters.torch_loop; a package is its __init__: adapters."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
ROOMS = {name_of(path) for path in PACKAGE.rglob("__init__.py")}
VERB = "adapters.megatron_deepspeed"  # its __init__ holds `pretrain`, which patched trees import
FOLDERS = [PACKAGE, ROOT / "launch", ROOT / "tests"]
SOURCES = sorted(path for folder in FOLDERS for path in folder.rglob("*.py"))


def imports(path, everywhere=True):
    """Dotted names that a file imports; everywhere=False: at the top of the file only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree)) if everywhere else tree.body
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the import in full"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Try) and not everywhere:
            parts = [part for part in node.body if isinstance(part, ast.Import)]
            found |= {alias.name for part in parts for alias in part.names}
    return found


def own(names):
    """The modules of this package among dotted names."""
    own_names = {
        name.removeprefix("megatron_commute.") for name in names if name.startswith("megatron_commute.")
    }
    return {name for name in own_names if name in FILES and name not in ROOMS}


def layer(name):
    room = name.partition(".")[0]
    for rank, members in enumerate(LAYERS):
        if room in members:
            return rank
    raise AssertionError(f"{room} has no place in LAYERS: give it one")


@pytest.mark.parametrize("name", [name for name in FILES if name])
def test_imports_point_one_way(name):
    if name in ROOMS and name != VERB:
        assert not own(imports(FILES[name])), (
            "a package's __init__ stays empty, or importing one module loads all"
        )
        return
    upward = {other for other in own(imports(FILES[name])) if layer(other) > layer(name)}
    assert not upward, f"{name} may not import from above: {sorted(upward)}"


@pytest.mark.parametrize("of", [lambda name: name, lambda name: name.partition(".")[0]], ids=["file", "room"])
def test_no_circle(of):
    """Imports inside functions count: they hide a circle, they do not break it."""
    graph = {}
    for name, path in FILES.items():
        graph.setdefault(of(name), set()).update(of(other) for other in own(imports(path)))
    graph = {name: others - {name} for name, others in graph.items()}
    assert tuple(graphlib.TopologicalSorter(graph).static_order())


def test_few_rooms_at_the_first_level():
    assert len({name.partition(".")[0] for name in FILES}) <= 26


def test_only_reduce_speaks_torch_distributed():
    asked = set()
    for name, path in FILES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        attributes = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        if any(used.startswith("torch.distributed") for used in imports(path) | attributes):
            asked.add(name)
    assert asked == {"reduce"}


def test_host_frameworks_stay_inside_functions_of_adapters():
    for name, path in FILES.items():
        hosts = {"megatron", "deepspeed"}
        anywhere = {used.partition(".")[0] for used in imports(path)} & hosts
        at_top = {used.partition(".")[0] for used in imports(path, everywhere=False)} & hosts
        assert not at_top, f"{name}: import {at_top} inside functions"
        assert not anywhere or name.startswith("adapters."), f"{name}: {anywhere} belongs in adapters/"


def modules_after(code):
    """Modules that the code loads in a fresh, silent interpreter in which every warning is an error."""
    code = f"import sys; before = set(sys.modules)\n{code}\nprint(*sorted(set(sys.modules) - before))"
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout.split()


def test_importing_the_package_is_silent_and_loads_nothing():
    assert modules_after("import megatron_commute") == ["megatron_commute"]


def test_pure_modules_need_no_torch():
    with_torch = {name for name in FILES if {name, name.partition(".")[0]} & {*WITH_TORCH, "__main__"}}
    pure = [name for name in FILES if name and name not in with_torch]
    loaded = modules_after("import " + ", ".join(f"megatron_commute.{name}" for name in pure))
    assert "torch" not in loaded


def test_the_whole_chain_loads_no_heavy_library():
    """Beyond torch: what is drawn, solved or hosted is imported by the function that needs it."""
    names = [name for name in FILES if name and name != "__main__"]
    everything = "\n".join(f"import megatron_commute.{name}" for name in names)
    beyond = set(modules_after(f"import torch\n{everything}")) - set(modules_after("import torch"))
    assert not {name.partition(".")[0] for name in beyond} & set(HEAVY)
    foreign = [name for name in beyond if name.partition(".")[0] != "megatron_commute"]
    assert len(foreign) < 80, f"{len(foreign)} modules of others beyond torch: imports get slow"


def functions(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_short(path):
    text = path.read_text(encoding="utf-8")
    of_file, of_function = (350, 60) if PACKAGE in path.parents else (400, 70)
    assert len(text.splitlines()) <= of_file
    long = {name: lines for name, lines in functions(path) if lines > of_function}
    assert not long, f"functions over {of_function} lines: {long}"


def test_tests_mirror_the_package_and_share_through_support_alone():
    """What two test files use is no test: a module named test_* is collected, never imported."""
    others = {"launch", "megatron_deepspeed", "support", "bench", "simt"}
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name[0] not in "._"}
    assert folders - {"__pycache__"} <= {name.partition(".")[0] for name in ROOMS} | others
    for path in (ROOT / "tests").rglob("*.py"):
        assert not {name for name in imports(path) if name.startswith("test_")}, path


def test_nothing_is_left_for_later():
    marker = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    others = [path for path in SOURCES if path.name != Path(__file__).name]
    assert not [str(path) for path in others if marker.search(path.read_text(encoding="utf-8"))]
