"""Why mixtures of experts are refused: what probes of one would say, with the refusal lifted, and whether the host saves.

    MEGATRON_DEEPSPEED=PATH python tests/megatron_deepspeed/experts.py

rewrites experts.csv: P of method difference, as a part of the largest |M|, against exact (which holds the routing) on the
same model, samples and ranks, or against one process; the error that the probe itself reports, as a part of its own largest
|M|; and how the job ended, as the host saves a checkpoint at its end.
"""

import os
import tempfile
from pathlib import Path

import agreement
import matrix
import numpy as np

ROWS = (  # layout, method, compared with: layout, method
    ("single", "difference", "single", "exact"),
    ("experts-kept-single", "difference", "experts-kept-single", "exact"),
    ("experts-single", "difference", "experts-single", "exact"),
    ("experts-kept", "difference", "experts-kept-single", "difference"),
    ("experts-apart", "difference", "experts-kept-single", "difference"),
)


def seen(job):
    """(P, largest |M|, its own error as a part of that, words) of the one probe of a job."""
    codes = Path(job["out"], "codes.json").read_text()
    log = Path(job["out"], "rank0.log").read_text()
    saved = "cannot save: " * ("_save_moe_checkpoint" in log) + f"exit codes {codes}"
    for line in matrix.record(job):
        if line["event"] == "probe":
            M = np.array(line["M"])
            size = np.abs(M).max()
            return np.array(line["P"]), size, np.abs(np.array(line["numerical"])).max() / size, saved
        if line["event"] == "skip":
            return None, None, None, f"{line['reason']}; {saved}"
    return None, None, None, saved


def rows(folder):
    _, tree = matrix.trees(folder)
    data = matrix.prepare(folder)
    names = {(a, b) for a, b, *_ in ROWS} | {(c, d) for *_, c, d in ROWS}
    jobs = {f"{a}-{b}": agreement.job(folder, data, tree, a, b) for a, b in sorted(names)}
    for job in jobs.values():
        job["unrefused"] = ["--num-experts"]
    matrix.run(folder, jobs)
    for layout, method, other, oracle in ROWS:
        P, _, own, words = seen(jobs[f"{layout}-{method}"])
        truth, size, _, _ = seen(jobs[f"{other}-{oracle}"])
        error = "" if P is None or truth is None else f"{np.abs(P - truth).max() / size:.2g}"
        own = "" if own is None else f"{own:.2g}"
        told = {"layout": layout, "method": method, "against": f"{other} {oracle}"}
        yield {**told, "error": error, "own_error": own, "job": words}


def main():
    with tempfile.TemporaryDirectory() as scratch:
        found = list(rows(os.environ.get("MATRIX_FOLDER", scratch)))
    for row in found:
        print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    matrix.write(Path(__file__).with_suffix(".csv"), found)


if __name__ == "__main__":
    main()
