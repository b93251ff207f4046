"""Time, memory and size of the report of a long record: python tests/bench/long_record.py

Writes a made-up record of about 100 MB, reports it in a process of its own, and prints one row, which
long_record.csv keeps.
"""

import csv
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT)]

import records

MEASURED = """
import re, sys, time
began = time.monotonic()
from megatron_commute.report import plots
plots.report(sys.argv[1])
peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]  # of this program alone
print(time.monotonic() - began, int(peak) / 1024)
"""


def measure(steps):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "commute.jsonl")
        lines = records.lines(K=8, steps=steps, log_every=4, probe_every=100)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        command = [sys.executable, "-c", MEASURED, folder]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        seconds, mebibytes = map(float, done.stdout.split())
        page = path.with_name("report.html").stat().st_size
        return {
            "record_megabytes": round(path.stat().st_size / 1e6, 1),
            "lines": len(lines),
            "domains": 8,
            "seconds": round(seconds, 1),
            "peak_mebibytes": round(mebibytes),
            "html_megabytes": round(page / 1e6, 2),
            "processor": platform.machine(),
        }


if __name__ == "__main__":
    rows = [measure(steps) for steps in (4000, 40_000, 360_000)]
    with open(ROOT / "tests" / "bench" / "long_record.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    print(*rows, sep="\n")
