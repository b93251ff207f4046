"""Metadata is in pyproject.toml; here the optional compiled parts are declared.

Each of them has a plain Python twin with the same results, so an installation without a C++ compiler succeeds
and says in one line what it went without. GPU kernels are not built here.
"""

import sys

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup
from setuptools.errors import BaseError, CCompilerError, CompileError

# Without contraction to fused multiply-add, compiled and plain code give the same bits on every machine.
EXACT = [] if sys.platform == "win32" else ["-O3", "-ffp-contract=off"]

EXTENSIONS = [
    Pybind11Extension(
        "megatron_commute._mixture",
        ["csrc/mixture.cpp"],
        depends=["csrc/mixture.h"],
        cxx_std=17,
        extra_compile_args=EXACT,
        optional=True,
    ),
]


class OptionalBuild(build_ext):
    """Build what the compiler at hand can build; name what it cannot, and go on."""

    def build_extension(self, extension):
        try:
            super().build_extension(extension)
        except (BaseError, CCompilerError, CompileError) as error:
            reason = str(error).splitlines()[0]
            print(f"{extension.name} not compiled ({reason}): its Python twin gives the same results, slower")


setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": OptionalBuild})
