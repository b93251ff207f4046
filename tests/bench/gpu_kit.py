"""Everything that a GPU has to show, for the day one is at hand: `bash tests/gpu.sh`; see --help.

Prints one table and writes one JSON file. `--cpu` runs the same parts at tiny sizes on the CPU: its
rows say that the parts work, and nothing about a GPU. Each part runs in a process of its own and
has a limit of time: one that fails, or is impossible on this machine, says so in its row, and the
others run. Exit status 1 where a part that was possible failed.

Limits of errors are those of the tests; limits of times are twice what is counted, beyond which
something is broken.
"""

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE)]

import gpu_parts

RESULT = HERE / "results" / "gpu.json"  # only what ran on a GPU
TINY = Path(tempfile.gettempdir(), "gpu_kit_cpu.json")


class Part(NamedTuple):
    """A part of the kit and the seconds it may take, on a GPU and with --cpu."""

    run: object
    seconds: int
    tiny: int


PARTS = {
    "build": Part(gpu_parts.build, 240, 60),
    "operators": Part(gpu_parts.operators, 90, 60),
    "criterion": Part(gpu_parts.criterion, 90, 60),
    "overhead": Part(gpu_parts.probe_cost, 60, 60),
    "memory": Part(gpu_parts.peak_memory, 60, 60),
    "products": Part(gpu_parts.products, 210, 60),
    "design": Part(gpu_parts.design, 180, 120),
    "quickstart": Part(gpu_parts.quickstart, 270, 240),
}


def alone(name, device, kept):
    """Run one part in this process; each row is kept at once, a line of JSON in the file."""
    with open(kept, "a", encoding="utf-8") as file:
        for row in PARTS[name].run(device):
            file.write(json.dumps(row) + "\n")
            file.flush()


def survived(name, command, seconds, kept, environment=None):
    """Rows of a part that runs as a command and keeps them in a file; a failure is the last."""
    begun, late = time.monotonic(), False
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as told:
        words = {"stdout": told, "stderr": subprocess.STDOUT, "env": environment, "start_new_session": True}
        process = subprocess.Popen(command, **words)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            with contextlib.suppress(ProcessLookupError):  # with all that it started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        told.seek(0)
        said = gpu_parts.last_line(told.read())
    lines = kept.read_text(encoding="utf-8").splitlines() if kept.exists() else []
    rows = [json.loads(line) for line in lines]
    why = f"ended after {seconds} s, its limit" if late else f"exit status {process.returncode}: {said}"
    if late or process.returncode or not rows:
        rows.append({"part": name, "what": why, "value": None, "limit": None, "ok": False})
    return rows, round(time.monotonic() - begun, 1)


def measured(names, device):
    """Rows of the parts, printed as they come, and the seconds that each took."""
    environment = dict(os.environ)
    if device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    paths = [str(ROOT), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    rows, took = [], {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            kept = Path(folder) / "rows.jsonl"
            command = [sys.executable, __file__, "--alone", name, "--kept", str(kept)]
            limit = PARTS[name].tiny if device == "cpu" else PARTS[name].seconds
            command += ["--cpu"] if device == "cpu" else []
            found, took[name] = survived(name, command, limit, kept, environment)
        rows += found
        print("\n".join(map(line, found)), flush=True)
    return rows, took


def line(row):
    """A row of the table."""
    value = "-" if row["value"] is None else f"{row['value']:.3g}"
    limit = "-" if row["limit"] is None else f"{row['limit']:.3g}"
    verdict = {True: "ok", False: "FAILED", None: "impossible here"}[row["ok"]]
    return f"{row['part']:11}{verdict:16}{value:>10}{limit:>10}  {row['what']}"


def host(device):
    """What the rows were measured on."""
    found = {"device": device, "torch": torch.__version__, "python": platform.python_version()}
    if device == "cuda":
        cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        found |= {"gpus": cards, "cuda": torch.version.cuda}
    return found


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--cpu", action="store_true", help="tiny sizes on the CPU; no figures of a GPU")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of them, parted by commas")
    parser.add_argument("--out", type=Path, help=f"JSON file [{RESULT}, with --cpu {TINY}]")
    parser.add_argument("--alone", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--kept", help=argparse.SUPPRESS)
    asked = parser.parse_args(argv)
    unknown = set(asked.parts.split(",")) - set(PARTS)
    if unknown:
        parser.error(f"--parts {','.join(sorted(unknown))}: choose of {', '.join(PARTS)}")
    if not asked.cpu and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --cpu runs tiny sizes on the CPU")
    return asked


def main(argv=None):
    asked = arguments(argv)
    device = "cpu" if asked.cpu else "cuda"
    if asked.alone:
        alone(asked.alone, device, asked.kept)
        return 0
    out = asked.out or (TINY if asked.cpu else RESULT)
    print(f"device: {device}\n{'part':11}{'':16}{'value':>10}{'limit':>10}")
    rows, took = measured(asked.parts.split(","), device)
    text = json.dumps({**host(device), "seconds": took, "rows": rows}, indent=1)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text + "\n", encoding="utf-8")
    print(f"device: {device}; {sum(took.values()):.0f} s; {out}")
    return int(any(row["ok"] is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
