"""What the compiled CUDA kernels ask of a GPU, without one: `python tests/bench/ptx_gate.py [--arch 80,90,100]`.

Compiles csrc/launch.cu with nvcc and writes ptx_gate.csv beside itself. Fails where a kernel spills registers, needs
more than its launch bounds leave, exceeds the shared memory of a block, or has no 16-byte load or store where one is
meant. Without nvcc it says so and ends. occupancy: resident threads over the most a multiprocessor holds, from
registers, shared memory and threads. megabytes: on paper, every operand once, at the sizes below; reads that caches
serve are not in it. tests/simt/traffic.cpp executes the kernels and holds what they touch against the same count.

predicted_us is a prediction, never run on a GPU, for an H100 SXM: a launch and the slower of two: bytes / min(0.9 BW,
BW in flight / needed), BW = 3.35 TB/s, 16 KB in flight needed on each multiprocessor; and operations at a half of the
67 TFLOP/s of float32 arithmetic, which attention does without tensor cores.
"""

import argparse
import csv
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parents[1] / "csrc" / "launch.cu"
THREADS = 256
# Bytes of shared memory: of a multiprocessor, of one block.
SHARED = {80: (164 << 10, 163 << 10), 90: (228 << 10, 227 << 10), 100: (228 << 10, 227 << 10)}
RESERVED, REGISTERS, RESIDENT = 1 << 10, 65536, 2048
# A layer of a 1.3B model on 8192 tokens in four sequences; gram of 8 x 8 vectors of 50M elements.
N, H, F, V, B, A, S, K, ELEMENTS = 8192, 2048, 8192, 50304, 4, 16, 2048, 8, 50_000_000
KINDS = {"0": "gelu_tanh", "1": "gelu_erf", "2": "swiglu"}


def attention_bytes(columns, tiles, scores):
    """Dynamic shared memory: attention_floats of csrc/attention.cuh."""
    return 4 * 32 * (tiles * (columns + 4) + scores * 40 + 4)


def counts(name, size, variant):
    """(bytes, operations, dynamic shared memory, loads in flight of a thread, whether 16-byte access is meant)."""
    columns, square = int(variant or 0), B * A * S * S / 2
    head, gate = B * A * S * columns * size, 2 if variant == "2" else 1
    product = 2 * square * columns  # one product of S x S x columns, halved by causality
    table = {
        "norm_forward_kernel": (4 * N * H * size + 16 * N, 0, 64, 2, True),
        "norm_backward_kernel": (6 * N * H * size + 16 * N + 64 * 16 * H, 0, 128 + 16 * H, 6, True),
        "activation_forward_kernel": ((2 * gate + 2) * N * F * size, 0, 0, 2 * gate, True),
        "activation_backward_kernel": ((4 * gate + 2) * N * F * size, 0, 0, 2 * gate + 2, True),
        "cross_entropy_statistics_kernel": (2 * N * V * size + 28 * N, 0, 64, 2, True),
        "cross_entropy_backward_kernel": (4 * N * V * size + 28 * N, 0, 0, 2, True),
        "gram_kernel": (2 * K * ELEMENTS * 4, 2 * K * K * ELEMENTS, 32 * THREADS, 1, True),
        "attention_forward_kernel": (8 * head, 6 * product, attention_bytes(columns, 6, 2), 4, True),
        "attention_queries_kernel": (10 * head, 9 * product, attention_bytes(columns, 8, 2), 4, True),
        "attention_keys_kernel": (12 * head, 12 * product, attention_bytes(columns, 8, 4), 4, True),
        "attention_delta_kernel": (4 * B * A * S * 128 * size, 0, 0, 4, False),
    }
    return table.get(name)  # None for the small kernels that add up or clear what the others left


def compile_for(arch, folder):
    """(text of ptxas, PTX) of csrc/launch.cu for one architecture."""
    command = ["nvcc", "-std=c++17", "-O3", f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v", "--keep"]
    command += ["--keep-dir", folder]
    done = subprocess.run(
        [*command, "-o", f"{folder}/launch.cubin", str(SOURCE)], capture_output=True, text=True, timeout=600
    )
    if done.returncode:
        sys.exit(f"nvcc failed for sm_{arch}:\n{done.stderr}")
    return done.stdout + done.stderr, (Path(folder) / "launch.ptx").read_text()


def name_of(symbol):
    """Mangled name -> (kernel, dtype or "", template number or "")."""
    kernel = next(
        symbol[found.end() : found.end() + int(found[0])]
        for found in re.finditer(r"(?<!\d)\d+", symbol)
        if symbol[found.end() : found.end() + int(found[0])].endswith("_kernel")
    )
    rest = symbol.split(kernel, 1)[1]
    dtype = "bfloat16" if rest.startswith("I13__nv_bfloat16") else "float32" if rest.startswith("If") else ""
    variant = re.search(r"Li(\d+)E", rest)
    return kernel, dtype, variant[1] if variant else ""


def wide_accesses(ptx):
    """16-byte loads and stores of global memory in each kernel: {symbol: number}."""
    bodies = re.split(r"\.entry\s+", ptx)[1:]
    wide = re.compile(
        r"(?:ld|st)\.global(?:\.\w+)*?\.v4\.[bfus]32|(?:ld|st)\.global(?:\.\w+)*?\.v2\.[bfus]64"
    )
    return {re.match(r"\w+", body)[0]: len(wide.findall(body)) for body in bodies}


def properties(text):
    """{symbol: {registers, stack, spilled, shared}} from the verbose output of ptxas."""
    found = {}
    for block in text.split("Compiling entry function '")[1:]:
        stack, stores, loads = map(
            int,
            re.search(
                r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block
            ).groups(),
        )
        shared = re.search(r"(\d+) bytes smem", block)
        found[block.split("'")[0]] = {
            "registers": int(re.search(r"Used (\d+) registers", block)[1]),
            "stack": stack,
            "spilled": stores + loads,
            "shared": int(shared[1]) if shared else 0,
        }
    return found


def occupancy(arch, registers, shared):
    """Resident blocks of THREADS threads on a multiprocessor."""
    per_thread = -(-registers // 8) * 8
    return min(
        RESIDENT // THREADS, REGISTERS // (per_thread * THREADS), SHARED[arch][0] // (shared + RESERVED)
    )


def predicted(bytes_, operations, blocks, loads):
    """Microseconds on an H100: a prediction, never run on a GPU."""
    in_flight = blocks * THREADS * 16 * loads
    bandwidth = min(0.9, in_flight / (16 << 10)) * 3.35e12
    return 3.0 + 1e6 * max(bytes_ / bandwidth, operations / (0.5 * 67e12))


def rows_of(arch):
    """One row for each kernel, and a list of what is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        text, ptx = compile_for(arch, folder)
    rows, wrong, wide = [], [], wide_accesses(ptx)
    for symbol, found in sorted(properties(text).items(), key=lambda item: name_of(item[0])):
        kernel, dtype, variant = name_of(symbol)
        label = f"sm_{arch} {kernel} {dtype} {KINDS.get(variant, variant)}".strip()
        count = counts(kernel, 2 if dtype == "bfloat16" else 4, variant)
        shared = found["shared"] + (count[2] if count else 0)
        blocks = occupancy(arch, found["registers"], shared)
        if found["spilled"]:
            wrong.append(f"{label}: spills {found['spilled']} bytes")
        if found["registers"] * THREADS > REGISTERS or blocks < 1 or shared > SHARED[arch][1]:
            wrong.append(
                f"{label}: {found['registers']} registers and {shared} bytes of shared memory do not fit"
            )
        if count and count[4] and not wide[symbol]:
            wrong.append(f"{label}: no 16-byte access to global memory")
        row = {"arch": arch, "kernel": kernel, "dtype": dtype, "variant": KINDS.get(variant, variant)}
        row |= {
            "registers": found["registers"],
            "spilled_bytes": found["spilled"],
            "stack_bytes": found["stack"],
        }
        row |= {"shared_bytes": shared, "occupancy": f"{blocks * THREADS / RESIDENT:.3f}"}
        row |= {"wide_accesses": wide[symbol], "megabytes": f"{count[0] / 1e6:.1f}" if count else ""}
        prediction = predicted(*count[:2], blocks, count[3]) if count and arch == 90 else None
        row["predicted_us_H100_never_run_on_a_GPU"] = f"{prediction:.0f}" if prediction else ""
        rows.append(row)
    return rows, wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="80,90,100", help="architectures, separated by commas")
    architectures = [int(x) for x in parser.parse_args().arch.split(",")]
    if shutil.which("nvcc") is None:
        print("nvcc is not on PATH: the CUDA kernels are not compiled, nothing is checked")
        return 0
    rows, wrong = [], []
    for arch in architectures:
        more, faults = rows_of(arch)
        rows, wrong = rows + more, wrong + faults
    for row in rows:
        print(*row.values(), sep="\t")
    if set(architectures) == set(SHARED):
        with open(HERE / "ptx_gate.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    print(
        "\n".join(wrong)
        or f"{len(rows)} kernels: no spills, registers and shared memory fit, wide accesses in place"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
