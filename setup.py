"""Metadata is in pyproject.toml; here the optional compiled parts are declared.

Each of them has a plain Python twin with the same results, so an installation without a C++
compiler or without nvcc succeeds and says in one line what it went without. No part needs torch to
be built.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import Extension, setup
from setuptools.errors import BaseError, CCompilerError, CompileError

WINDOWS = sys.platform == "win32"
# Without contraction to fused multiply-add, compiled and plain code give the same bits on every
# machine.
EXACT = [] if WINDOWS else ["-O3", "-ffp-contract=off"]
# Loops become vector code only where no errno and no trap must be kept; NaN and infinity keep their
# meaning.
FAST = (
    []
    if WINDOWS
    else ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fopenmp-simd", "-Wno-psabi"]
)
OPENMP = ["/openmp"] if WINDOWS else ["-fopenmp"]
ARCHITECTURES = (80, 90, 100)
GPU = Path("/dev/nvidiactl")  # there where a driver is loaded
KERNELS = ("norm", "activation", "cross_entropy", "gram", "displace", "attention")

EXTENSIONS = [
    Pybind11Extension(
        "megatron_commute.kernels._mixture",
        ["csrc/mixture.cpp"],
        depends=["csrc/mixture.h", "csrc/hashes.h"],
        cxx_std=17,
        extra_compile_args=EXACT,
        optional=True,
    ),
    Pybind11Extension(
        "megatron_commute.kernels._cpu",
        ["csrc/bindings.cpp", *(f"csrc/{name}.cpp" for name in KERNELS)],
        depends=[str(path) for path in Path("csrc").glob("*.h")],
        cxx_std=17,
        extra_compile_args=FAST + OPENMP,
        extra_link_args=[] if WINDOWS else OPENMP,
        optional=True,
    ),
    Extension(
        "megatron_commute.kernels._cuda",
        ["csrc/launch.cu"],
        depends=[str(path) for path in Path("csrc").glob("*.cuh")],
        optional=True,
    ),
]


def without_openmp(extension):
    """The same extension for a compiler that has no OpenMP: one thread."""
    extension.extra_compile_args = [flag for flag in extension.extra_compile_args if flag not in OPENMP]
    extension.extra_link_args = [flag for flag in extension.extra_link_args if flag not in OPENMP]
    return extension


class OptionalBuild(build_ext):
    """Build what the tools at hand can build; name what they cannot, and go on."""

    def build_extension(self, extension):
        try:
            if extension.name.endswith("_cuda"):
                self.build_cuda(extension)
            elif extension.name.endswith("_cpu"):
                self.build_cpu(extension)
            else:
                super().build_extension(extension)
        except (BaseError, CCompilerError, CompileError) as error:
            reason = str(error).splitlines()[0]
            print(f"{extension.name} not compiled ({reason}): its Python twin gives the same results, slower")

    def build_cpu(self, extension):
        try:
            super().build_extension(extension)
        except (BaseError, CCompilerError, CompileError):
            print(f"{extension.name}: no OpenMP with this compiler, trying one thread")
            super().build_extension(without_openmp(extension))

    def build_cuda(self, extension):
        """A plain shared library of launchers that take raw pointers and a stream; no header of
        torch or Python.
        """
        nvcc = shutil.which("nvcc")
        if nvcc is None:
            raise CompileError("nvcc is not on PATH")
        if os.environ.get("MEGATRON_COMMUTE_CUDA", "1" if GPU.exists() else "0") != "1":
            raise CompileError("no GPU is visible; MEGATRON_COMMUTE_CUDA=1 compiles for one elsewhere")
        target = Path(self.get_ext_fullpath(extension.name))
        newest = max(path.stat().st_mtime for path in map(Path, extension.sources + extension.depends))
        if not self.force and target.exists() and target.stat().st_mtime > newest:
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
        options = ["-O3", "-std=c++17", "--shared", "-Xcompiler=-fPIC", "--threads", str(os.cpu_count() or 1)]
        done = subprocess.run([nvcc, *options, *codes, "-o", str(target), *extension.sources], check=False)
        if done.returncode != 0:
            raise CompileError(f"nvcc ended with {done.returncode}, see above")


if __name__ == "__main__":
    ParallelCompile(default=2).install()
    setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": OptionalBuild})
