# SPDX-License-Identifier: Apache-2.0
"""Builds fastrnn._C. Needs an installed torch: use `pip install --no-build-isolation`.

Environment: DEBUG=1 for an unoptimised build with assertions, MAX_JOBS for parallel compilation.
"""

import os
import sys
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
DEBUG = os.environ.get("DEBUG", "0") == "1"


def cpu_extension() -> CppExtension:
    """The extension module: every source under csrc/, with OpenMP for at::parallel_for.

    The instruction set of each recurrence_*.cpp is chosen inside the file, so one list of flags
    serves all; the recurrence is optimised in a debug build too, since its tiles live in registers.
    """
    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cpp"))
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    level = ["-O1", "-g", "-UNDEBUG"] if DEBUG else ["-O3", "-g0"]
    return CppExtension(
        "fastrnn._C",
        sources,
        extra_compile_args=[*level, "-std=c++20", "-Wall", *openmp],
        extra_link_args=openmp,
    )


setup(ext_modules=[cpu_extension()], cmdclass={"build_ext": BuildExtension})
