# SPDX-License-Identifier: Apache-2.0
"""Builds fastrnn._C. Needs an installed torch: use `pip install --no-build-isolation`.

The CUDA part is built where torch has CUDA and a CUDA toolkit of the same major version is found;
a GPU is not needed. `python -m fastrnn.info` tells afterwards whether it was built, and why.

Environment: FASTRNN_CUDA=0 leaves the CUDA part out, 1 makes its absence an error;
TORCH_CUDA_ARCH_LIST for its GPUs; DEBUG=1 for a build with assertions, its C++ hardly optimised;
MAX_JOBS for parallel compilation.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup

try:
    import torch
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
except ModuleNotFoundError:
    raise SystemExit(
        "fastrnn: install torch first, then use pip install --no-build-isolation"
    ) from None

ROOT = Path(__file__).parent
DEBUG = os.environ.get("DEBUG", "0") == "1"
#: Unless TORCH_CUDA_ARCH_LIST is set, whatever GPU this machine has. Machine code of 8.0 runs on
#: every 8.x. 9.0a is Hopper with the instructions that it alone has, so its PTX would run nowhere
#: else: newer GPUs get the PTX of 8.0, which their driver compiles.
ARCHITECTURES = "8.0+PTX;9.0a"
#: Only a toolkit has all headers of the runtime: wheels lack those of the compiler (crt/).
RUNTIME_HEADER = "cuda_runtime.h"
#: Headers of libraries that ATen/cuda/CUDAContext.h includes. A small toolkit may lack them.
LIBRARY_HEADERS = ("cublas_v2.h", "cusparse.h", "cusolverDn.h")


class Facts(NamedTuple):
    """What the decision about the CUDA part depends on."""

    asked: str  # FASTRNN_CUDA; empty if unset
    torch: str
    torch_cuda: str | None  # the CUDA that torch was built with
    home: str | None  # folder of the CUDA toolkit
    nvcc: str | None  # version of the nvcc in it
    lacks: str | None  # the first header that the compiler would not find
    beside: tuple[str, ...] = ()  # folders of headers that only torch's wheels have


def gather_facts() -> Facts:
    """The facts of this machine; without torch.cuda.is_available(), as none is about a GPU."""
    cuda, home = torch.version.cuda, toolkit_home()
    facts = Facts(
        os.environ.get("FASTRNN_CUDA", ""), str(torch.__version__), cuda, home, None, None
    )
    if not cuda or not home:
        return facts
    lacks = None if has_header(include_folders(home), RUNTIME_HEADER) else RUNTIME_HEADER
    beside: list[str] = []
    for name in LIBRARY_HEADERS:
        if not has_header(include_folders(home), name):
            folder = next((f for f in wheel_folders(cuda) if has_header([f], name)), None)
            if folder is None:
                lacks = lacks or name
            elif folder not in beside:
                beside.append(folder)
    return facts._replace(nvcc=nvcc_version(Path(home)), lacks=lacks, beside=tuple(beside))


def toolkit_home() -> str | None:
    """The folder of the CUDA toolkit: that of torch if it has headers, else that of its nvcc.

    torch takes the folder above the nvcc in the PATH. Where that nvcc is a script or a link, the
    toolkit is elsewhere, and nvcc itself knows where.
    """
    home = cpp_extension.CUDA_HOME
    program = shutil.which("nvcc", path=f"{home}/bin") if home else None
    if program is None or has_header([f"{home}/include"], RUNTIME_HEADER):
        return home
    # A linked nvcc takes the link's folder for its own, so it is asked by its real name as well.
    said = [nvcc_folder(name) for name in (program, os.path.realpath(program))]
    return next((f for f in said if f and has_header([f"{f}/include"], RUNTIME_HEADER)), home)


def nvcc_folder(program: str) -> str | None:
    """The folder above the one in which nvcc says it is; None if it does not say."""
    command = [program, "--dryrun", "-E", "-x", "cu", os.devnull]
    try:
        process = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    found = re.search(r"^#\$ _HERE_=(.+)$", process.stderr, re.MULTILINE)
    return os.path.dirname(found[1]) if found else None


def include_folders(home: str) -> list[str]:
    """The toolkit's folder of headers, and those where the environment tells compilers to look."""
    paths = (os.environ.get(variable, "") for variable in ("CPATH", "CPLUS_INCLUDE_PATH"))
    return [f"{home}/include", *filter(None, os.pathsep.join(paths).split(os.pathsep))]


def wheel_folders(cuda: str) -> list[str]:
    """The folders of headers in the CUDA wheels that pip installs along with torch.

    They are nvidia/cu13/include since CUDA 13, and nvidia/cublas/include and the like before.
    """
    spec = importlib.util.find_spec("nvidia")
    homes = spec.submodule_search_locations if spec else None
    found = sorted(folder for home in homes or () for folder in Path(home).glob("*/include"))
    own = f"cu{cuda.split('.')[0]}"
    other = [f for f in found if not re.fullmatch(r"cu\d+", f.parent.name)]
    return [str(f) for f in [*(f for f in found if f.parent.name == own), *other]]


def has_header(folders: list[str], name: str) -> bool:
    """Whether a header is in one of these folders."""
    return any(Path(folder, name).exists() for folder in folders)


def nvcc_version(home: Path) -> str | None:
    """The version of a toolkit's nvcc; None if there is no nvcc that runs."""
    program = shutil.which("nvcc", path=str(home / "bin"))
    if program is None:
        return None
    try:
        process = subprocess.run([program, "--version"], capture_output=True, text=True)
    except OSError:
        return None
    found = re.search(r"release (\d+\.\d+)", process.stdout)
    return found[1] if found else None


def what_is_missing(facts: Facts) -> tuple[str, str] | None:
    """What keeps the CUDA part from being built and what to do about it; None if nothing does."""
    if not facts.torch_cuda:
        return f"torch {facts.torch} has no CUDA", "install a torch that is built with CUDA"
    torch_has = f"torch {facts.torch} has CUDA {facts.torch_cuda}"
    major = facts.torch_cuda.split(".")[0]
    remedy = f"install the CUDA toolkit {major}.x, or set CUDA_HOME to its folder"
    if not facts.home:
        return f"{torch_has}, but no CUDA toolkit was found", remedy
    if not facts.nvcc:
        return f"{torch_has}, but the CUDA toolkit at {facts.home} has no working nvcc", remedy
    if facts.lacks:
        return (
            f"{torch_has}, but there is no include/{facts.lacks} at {facts.home}",
            f"{remedy}, or CPATH to that of the header",
        )
    if facts.nvcc.split(".")[0] != major:
        return f"{torch_has}, but nvcc at {facts.home} is of CUDA {facts.nvcc}", remedy
    return None


def decide_cuda(facts: Facts) -> tuple[bool, str]:
    """Whether to build the CUDA part, and the reason in a sentence."""
    if facts.asked not in ("", "0", "1"):
        raise SystemExit(f"fastrnn: FASTRNN_CUDA must be 0, 1 or unset, not {facts.asked!r}")
    if facts.asked == "0":
        return False, "FASTRNN_CUDA=0 left it out"
    missing = what_is_missing(facts)
    if missing is None:
        return True, f"torch {facts.torch} has CUDA {facts.torch_cuda}, nvcc is {facts.nvcc}"
    what, remedy = missing
    if facts.asked == "1":
        raise SystemExit(
            f"fastrnn: FASTRNN_CUDA=1 asks for the CUDA part, but it cannot be built: {what}. "
            f"To build it, {remedy}; to build without it, set FASTRNN_CUDA=0."
        )
    return False, what


def sources(root: Path, cuda: bool) -> list[str]:
    """Every source under csrc/; of csrc/cuda/ the plan alone unless the CUDA part is built."""
    found = [p.relative_to(root) for p in (root / "csrc").rglob("*") if p.suffix in (".cpp", ".cu")]
    return sorted(
        p.as_posix() for p in found if cuda or p.parts[1] != "cuda" or p.name == "plan.cpp"
    )


def after_all(folders: tuple[str, ...]) -> list[str]:
    """Flags by which a compiler looks into these folders last.

    Wheels also have headers of the runtime, and these must not hide the toolkit's own.
    """
    return [flag for folder in folders for flag in ("-idirafter", folder)]


def cxx_flags(cuda: bool, reason: str, debug: bool) -> list[str]:
    """Flags for the C++ sources.

    The instruction set of each recurrence_*.cpp is chosen inside the file, so one list of flags
    serves all; the recurrence is optimised in a debug build too, since its tiles live in registers.
    """
    level = ["-O1", "-g", "-UNDEBUG"] if debug else ["-O3", "-g0"]
    # Else the times of a single sequence depend by 5 % on what else is linked before its loops.
    level.append("-falign-functions=64")
    # Escapes of JSON are escapes of C++.
    facts = [f"-DFASTRNN_CUDA_REASON={json.dumps(reason, ensure_ascii=False)}"]
    if cuda:
        facts.append("-DFASTRNN_CUDA=1")
    return [*level, "-std=c++20", "-Wall", *openmp_flags(), *facts]


def nvcc_flags(debug: bool) -> list[str]:
    """Flags for the kernels, without architectures: torch adds these and bans implicit half casts.

    A debug build is optimised as well. Unlike Python's flags for C++, torch's leave assertions on.
    """
    return ["-O3", "-std=c++20", "-Xcompiler=-Wall", "-lineinfo" if debug else "-DNDEBUG"]


def openmp_flags() -> list[str]:
    """For at::parallel_for; Apple's compiler has no OpenMP."""
    return [] if sys.platform == "darwin" else ["-fopenmp"]


def extension(cuda: bool, reason: str, beside: tuple[str, ...] = ()) -> Extension:
    """The extension module; `beside`: folders of headers that the CUDA part needs as well."""
    make = CUDAExtension if cuda else CppExtension
    last = after_all(beside)
    flags = {
        "cxx": [*cxx_flags(cuda, reason, DEBUG), *last],
        "nvcc": [*nvcc_flags(DEBUG), *(f"-Xcompiler={flag}" for flag in last)],
    }
    return make(
        "fastrnn._C",
        sources(ROOT, cuda),
        extra_compile_args=flags,
        extra_link_args=openmp_flags(),
    )


def main() -> None:
    """Decide and build."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        raise SystemExit(f"fastrnn: torch 2.11 or newer is needed, not {torch.__version__}")
    facts = gather_facts()
    cuda, reason = decide_cuda(facts)
    cpp_extension.CUDA_HOME = facts.home  # torch takes nvcc, headers and libraries from there
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        os.environ["TORCH_CUDA_ARCH_LIST"] = ARCHITECTURES
    setup(
        ext_modules=[extension(cuda, reason, facts.beside)],
        cmdclass={"build_ext": BuildExtension},
        # Only ninja looks at headers and flags; without it nothing would be built anew for them.
        options={"build_ext": {"force": True}},
    )


if __name__ == "__main__":
    main()
