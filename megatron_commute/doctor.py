"""What is installed on this machine and what of the plug-in works here. Leaves no file behind."""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

REQUIRED, OPTIONAL = "missing", "absent"


class Finding(NamedTuple):
    """One line of the examination. `state`: ok, absent (works without it) or missing (nothing
    works).
    """

    name: str
    state: str
    found: str
    cure: str = ""


def examine() -> list[Finding]:
    """Looks at Python, machine, compilers, frameworks and the compiled part, in that order."""
    version = sys.version_info
    old = version < (3, 10)
    return [
        Finding(
            "python", REQUIRED if old else "ok", platform.python_version(), "install 3.10+" if old else ""
        ),
        Finding("processor", "ok", f"{platform.machine()}, {_cores()} cores, {_memory()}"),
        *_torch(),
        _compiler(),
        _on_path("ninja", "pip install ninja; DeepSpeed builds its operators with it"),
        _nvcc(),
        _package("deepspeed", REQUIRED, "pip install deepspeed"),
        _communication_op(),
        _package("megatron-core", REQUIRED, "pip install megatron-core"),
        _megatron_deepspeed(),
        _package("tokenizers", OPTIONAL, 'pip install "megatron-commute[demo]" for launch/quickstart.sh'),
        _compiled(),
    ]


def works(findings: list[Finding]) -> bool:
    """Whether nothing indispensable is missing."""
    return all(finding.state != REQUIRED for finding in findings)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> str:
    if "SC_PHYS_PAGES" not in os.sysconf_names or "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return "memory unknown"
    page = os.sysconf("SC_PAGE_SIZE") / 2**30
    total, free = os.sysconf("SC_PHYS_PAGES") * page, os.sysconf("SC_AVPHYS_PAGES") * page
    return f"{total:.1f} GiB memory, {free:.1f} free"


def _torch() -> list[Finding]:
    if importlib.util.find_spec("torch") is None:
        return [Finding("torch", REQUIRED, "not installed", "pip install torch")]
    import torch

    found = [Finding("torch", "ok", torch.__version__)]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            memory = f"{device.total_memory / 2**30:.0f} GiB"
            found.append(Finding("accelerator", "ok", f"{device.name}, {memory}"))
    else:
        found.append(Finding("accelerator", OPTIONAL, "none: CPU with gloo", "small models only"))
    return found


def _package(name: str, without: str, cure: str) -> Finding:
    try:
        return Finding(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, without, "not installed", cure)


def _on_path(program: str, cure: str) -> Finding:
    path = shutil.which(program)
    return Finding(program, "ok", path) if path else Finding(program, OPTIONAL, "not on PATH", cure)


def _compiler() -> Finding:
    program = os.environ.get("CXX") or "c++"
    if shutil.which(program) is None:
        return Finding(
            "compiler", OPTIONAL, f"no {program}", "install g++ (CXX names another); torch code runs"
        )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "try.cpp")
        source.write_text("#include <vector>\nint main() { return std::vector<int>().size(); }\n")
        built = subprocess.run(
            [program, "-std=c++17", "-o", str(source.with_suffix("")), str(source)],
            capture_output=True,
            text=True,
        )
    if built.returncode:
        problem = (built.stderr.strip().splitlines() or ["no message"])[0]
        return Finding(
            "compiler", OPTIONAL, f"{program} fails: {problem}", "install the C++ standard library"
        )
    return Finding("compiler", "ok", _first_line([program, "--version"]))


def _nvcc() -> Finding:
    home = os.environ.get("CUDA_HOME")
    program = shutil.which("nvcc") or (shutil.which("nvcc", path=str(Path(home, "bin"))) if home else None)
    if program is None:
        return Finding("nvcc", OPTIONAL, "not found", "set CUDA_HOME to build the CUDA kernels")
    release = _first_line([program, "--version"], containing="release")
    return Finding("nvcc", "ok", release)


def _first_line(command: list[str], containing: str = "") -> str:
    output = subprocess.run(command, capture_output=True, text=True).stdout
    lines = [line.strip() for line in output.splitlines() if line.strip() and containing in line]
    return lines[0] if lines else command[0]


def _communication_op() -> Finding:
    """DeepSpeed compiles its shared-memory operator at the first start on CPU, which looks like a
    hang.
    """
    name = "deepspeed_shm_comm"
    own = os.environ.get("TORCH_EXTENSIONS_DIR")
    root = Path(own) if own else Path.home() / ".cache" / "torch_extensions"
    pattern = f"{name}/{name}.so" if own else f"*/{name}/{name}.so"
    built = sorted(root.glob(pattern)) if root.is_dir() else []
    if built:
        return Finding("deepspeed CPU op", "ok", f"built: {built[0].parent.parent.name}/{name}")
    return Finding(
        "deepspeed CPU op", OPTIONAL, "not built yet", "the first start on CPU builds it, some minutes"
    )


def _megatron_deepspeed() -> Finding:
    name, variable = "Megatron-DeepSpeed", "MEGATRON_DEEPSPEED"
    folder = os.environ.get(variable)
    if not folder:
        return Finding(
            name, OPTIONAL, f"{variable} is not set", f"set {variable} to a checkout to use it as the host"
        )
    if not Path(folder, "megatron", "training.py").is_file():
        return Finding(
            name,
            OPTIONAL,
            f"{folder} is no checkout",
            f"set {variable} to a folder with megatron/training.py",
        )
    commit = (
        _first_line(["git", "-C", folder, "rev-parse", "--short=12", "HEAD"]) if shutil.which("git") else ""
    )
    return Finding(name, "ok", f"{folder} {commit if commit != 'git' else ''}".strip())


def _compiled() -> Finding:
    name = "megatron_commute.kernels._mixture"
    cure = "pip install -e . with a compiler; the plain references run, slower"
    if importlib.util.find_spec(name) is None:
        return Finding("compiled part", OPTIONAL, "not built", cure)
    try:
        importlib.import_module(name)
    except ImportError as error:
        return Finding("compiled part", OPTIONAL, f"cannot be loaded: {error}", cure)
    return Finding("compiled part", "ok", name)
