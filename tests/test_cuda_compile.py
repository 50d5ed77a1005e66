# SPDX-License-Identifier: Apache-2.0
"""The CUDA sources compile without a GPU, and every kernel keeps its data in registers.

`python tests/test_cuda_compile.py` prints the table of kernels and what each takes. Successes are
remembered by content, so that only what was changed is compiled again.
"""

import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from sources import CSRC, code, included
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[1]
FOLDER = CSRC / "cuda" / "kernels"
KERNELS = sorted(FOLDER.glob("*.cu"))
#: What only a build with CUDA compiles: its host code, and the files with parts for it.
HOST_CODE = [
    path
    for path in sorted(CSRC.rglob("*.cpp"))
    if path.parent.name == "cuda" or "FASTRNN_CUDA" in path.read_text(encoding="utf-8")
]
ARCHITECTURES = ("80", "90a")
CACHE = ROOT / ".pytest_cache" / "d" / "cuda_compile"

spec = importlib.util.spec_from_file_location("fastrnn_setup", ROOT / "setup.py")
setup = importlib.util.module_from_spec(spec)
spec.loader.exec_module(setup)

# As in a build.
NVCC_FLAGS = [
    *cpp_extension.COMMON_NVCC_FLAGS,
    *setup.nvcc_flags(debug=False),
    *["-Werror", "all-warnings", "-Xcompiler=-Werror", "-Xptxas", "-v"],
]


def find_nvcc():
    """The path of nvcc; None if there is none."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    folders = [f"{home}/bin" for home in homes if home]
    folders += [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def find_headers():
    """The folder of the CUDA runtime's headers; None if there is none."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if NVCC:
        homes.append(Path(NVCC).resolve().parents[1])
    folders = [Path(home) / "include" for home in homes if home]
    return next((f for f in folders if (f / "cuda_runtime_api.h").exists()), None)


NVCC = find_nvcc()
HEADERS = find_headers()
needs_nvcc = pytest.mark.skipif(
    NVCC is None, reason="no nvcc in CUDA_HOME, the PATH or /usr/local/cuda"
)
needs_headers = pytest.mark.skipif(
    HEADERS is None or shutil.which("g++") is None,
    reason="no g++, or no headers of the CUDA runtime in CUDA_HOME or /usr/local/cuda",
)


class Function(NamedTuple):
    """What ptxas tells of a kernel, or of a function that a kernel calls (registers is None)."""

    name: str  # mangled
    architecture: str
    stack: int  # bytes, as all below but registers
    spills: int
    shared: int = 0  # without what a launch asks for
    registers: int | None = None


def parse(log):
    """The Functions in what `ptxas -v` prints, and its complaints, such as ignored instructions."""
    # A function that two kernels call is listed twice.
    found, architecture, entry = [], "", ""
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for 'sm_(\w+)'", line):
            entry, architecture = match.groups()
        elif match := re.search(r"Function properties for (\S+)", line):
            name = match[1]
        elif match := re.search(r"(\d+) bytes stack.* (\d+) bytes spill s.* (\d+) bytes sp", line):
            stack, stores, loads = map(int, match.groups())
            found.append(Function(name, architecture, stack, stores + loads))
        elif match := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            kernel = next(i for i, f in enumerate(found) if (f.name, f.registers) == (entry, None))
            found[kernel] = found[kernel]._replace(
                registers=int(match[1]), shared=int(shared[1]) if shared else 0
            )
    assert log.count("Compiling entry function") == sum(f.registers is not None for f in found)
    return found, re.findall(r".*\(C\d+\).*", log)


@functools.cache
def version(program):
    return subprocess.run([program, "--version"], capture_output=True, text=True).stdout


def compile_file(source, command, tmp_path=None):
    """What the compiler prints; raises AssertionError with it if it fails. Objects go to tmp_path.

    Not run if it once succeeded with the same arguments, versions and contents.
    """
    parts = [*map(str, command), str(source), torch.__version__]
    parts += [version(program) for program in (command[0], NVCC, "g++") if program]
    digest = hashlib.sha256("\0".join(parts).encode())
    for path in included(source):
        digest.update(path.read_bytes())
    kept = CACHE / f"{digest.hexdigest()[:32]}.txt"
    if kept.exists():
        return kept.read_text(encoding="utf-8")
    output = ["-o", str(tmp_path / "object.o")] if tmp_path else []
    process = subprocess.run([*command, str(source), *output], capture_output=True, text=True)
    log = process.stdout + process.stderr
    if process.returncode != 0:
        raise AssertionError(f"{Path(source).name} does not compile\n{log}")
    CACHE.mkdir(parents=True, exist_ok=True)
    unfinished = kept.with_suffix(f".{os.getpid()}")
    unfinished.write_text(log, encoding="utf-8")
    unfinished.replace(kept)  # at once: other processes may look for it
    return log


def compile_kernels(source, architecture, tmp_path):
    """The Functions of a source for an architecture, and the complaints of ptxas."""
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    return parse(compile_file(source, [NVCC, "-c", *NVCC_FLAGS, target], tmp_path))


def type_check(source):
    """Compile host code as a build with CUDA does, up to the object file."""
    folders = [*cpp_extension.include_paths(), HEADERS, sysconfig.get_path("include")]
    # A torch without CUDA lacks the file that this macro does without.
    macros = ["-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE", "-DTORCH_EXTENSION_NAME=_C"]
    flags = setup.cxx_flags(cuda=True, reason="a test", debug=False)
    system = [f"-isystem{folder}" for folder in folders]
    return compile_file(source, ["g++", "-fsyntax-only", "-Werror", *flags, *macros, *system])


def readable(names):
    """Names of functions as the sources have them, without arguments and our namespaces."""
    program = next(filter(shutil.which, ("c++filt", "cu++filt")), None)
    if program and names:
        process = subprocess.run([program, "-p", *names], capture_output=True, text=True)
        names = process.stdout.splitlines()
    return [re.sub(r"fastrnn::(cuda::)?|\(anonymous namespace\)::", "", name) for name in names]


def table(functions):
    """One line for each Function, as Markdown."""
    lines = [
        "| kernel | architecture | registers | stack | spills | static shared memory |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for name, f in zip(readable([f.name for f in functions]), functions, strict=True):
        cells = [name, f"sm_{f.architecture}", "–" if f.registers is None else f.registers]
        cells += [f.stack, f.spills, f.shared]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def check_local_memory(functions):
    guilty = [f for f in functions if f.stack or f.spills]
    assert not guilty, f"local memory is used:\n{table(guilty)}"


def files_with_ptx(folder):
    """Files in the folder and below it with inline assembly, which is PTX if in a kernel."""
    files = [p for p in folder.rglob("*") if p.is_file()]
    return sorted(p.name for p in files if re.search(r"\b(__)?asm(__)?\b", code(p)))


@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.name)
def test_kernels_keep_to_registers(source, architecture, tmp_path, record_property):
    functions, complaints = compile_kernels(source, architecture, tmp_path)
    assert any(f.registers is not None for f in functions)
    print(table(functions))
    for name, f in zip(readable([f.name for f in functions]), functions, strict=True):
        record_property(f"sm_{architecture} {name}", f"{f.registers} registers, {f.shared} bytes")
    check_local_memory(functions)
    assert complaints == []


@needs_nvcc
def test_blocks_of_one_row_share_a_multiprocessor_as_the_plan_says(tmp_path):
    """BlockFfmaSizes in block_sizes.h: hidden, units, weights in registers, resident."""
    sizes = re.findall(r"\{(\d+), (\d+), (\d+), (\d+)\}", (FOLDER / "block_sizes.h").read_text())
    functions, _ = compile_kernels(FOLDER / "block_ffma.cu", "90a", tmp_path)
    checked = set()
    for function in functions:
        if match := re.search(r"FfmaProductILi(\d)ELi1E", function.name):
            hidden, units, _, resident = map(int, sizes[int(match[1])])
            threads = hidden // units * 4
            assert function.registers * threads * resident <= 65536, readable([function.name])
            checked.add(hidden)
    assert checked == {32, 64, 128, 192, 256}


@needs_headers
@pytest.mark.parametrize("source", HOST_CODE, ids=lambda path: path.name)
def test_host_code_of_the_cuda_part_type_checks(source):
    if "CUDAContext.h" in source.read_text(encoding="utf-8"):
        folders = setup.include_folders(str(HEADERS.parent))
        found = {name: setup.has_header(folders, name) for name in setup.LIBRARY_HEADERS}
        if not all(found.values()):
            pytest.skip(f"of {found} not all are in {HEADERS}, CPATH or CPLUS_INCLUDE_PATH")
    type_check(source)


def test_inline_ptx_is_in_primitives_only():
    # The other one is empty: it keeps a vector in a register of the CPU.
    assert files_with_ptx(CSRC) == ["primitives.cuh", "vectors.inl"]


# The rest plants what must be found.

PLANTED = """
__device__ __noinline__ float pick(const float* p, int n) {
  float a[64];
  for (int i = 0; i < 64; ++i) a[i] = p[(i * n) % 64];
  for (int i = 0; i < n; ++i) a[i] += a[n - i];
  return a[n];
}

__global__ void good(float* p) {
  __shared__ float s[32];
  s[threadIdx.x] = p[threadIdx.x];
  __syncthreads();
  p[threadIdx.x] = s[31 - threadIdx.x];
}

template <int N>
__global__ void __launch_bounds__(1024, 2) spilling(float* p) {
  float a[N];
#pragma unroll
  for (int i = 0; i < N; ++i) a[i] = p[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) p[i * 1024 + threadIdx.x] = a[i] * a[(i * 7 + 1) % N];
}

__global__ void calling(float* p, int n) { p[n] = pick(p, n); }

template __global__ void spilling<80>(float*);
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache: nothing that is planted stays."""
    monkeypatch.setattr(sys.modules[__name__], "CACHE", tmp_path / "cache")


def plant(folder, **files):
    """Write files; in their names, "_" before the suffix is "."."""
    for name, text in files.items():
        (folder / ".".join(name.rsplit("_", 1))).write_text(text, encoding="utf-8")


@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_spills_and_stack_frames_are_found_by_name(tmp_path, cache, architecture):
    plant(tmp_path, a_cu=PLANTED)
    functions, _ = compile_kernels(tmp_path / "a.cu", architecture, tmp_path)
    good, spilling, calling = (
        next(f for f in functions if name in f.name) for name in ("good", "spilling", "calling")
    )
    assert (good.stack, good.spills, good.shared) == (0, 0, 128)
    assert 0 < good.registers < 32 == spilling.registers
    assert spilling.spills > 0
    # The frame of a function is its caller's, even if it was not inlined.
    assert (calling.stack, calling.spills) == (256, 0)
    assert {f.architecture for f in functions} == {architecture}
    with pytest.raises(AssertionError) as error:
        check_local_memory(functions)
    assert "| spilling<80> | sm_" in str(error.value)
    assert "| calling | sm_" in str(error.value)
    assert "| good |" not in str(error.value)
    check_local_memory([good])


@needs_nvcc
def test_warnings_of_nvcc_and_of_the_host_compiler_are_errors(tmp_path, cache):
    plant(tmp_path, a_cu="__global__ void k() { int unused; }")
    plant(tmp_path, b_cu="int f(int n) { for (unsigned i = 0; i < n; ++i) return 2; return 1; }")
    with pytest.raises(AssertionError, match=r"a\.cu does not compile[^$]*unused"):
        compile_kernels(tmp_path / "a.cu", "80", tmp_path)
    with pytest.raises(AssertionError, match=r"b\.cu does not compile[^$]*sign-compare"):
        compile_kernels(tmp_path / "b.cu", "80", tmp_path)


@needs_nvcc
def test_an_instruction_that_ptxas_ignores_is_found(tmp_path, cache):
    body = 'asm volatile("setmaxnreg.inc.sync.aligned.u32 240;"); p[0] = 1;'
    plant(tmp_path, a_cu=f"__global__ void k(float* p) {{ {body} }}")
    _, [complaint] = compile_kernels(tmp_path / "a.cu", "90a", tmp_path)
    assert "setmaxnreg" in complaint


def test_a_log_with_missing_lines_is_not_read():
    with pytest.raises(AssertionError):
        parse("ptxas info : Compiling entry function 'k' for 'sm_80'\n")


@needs_nvcc
def test_only_what_was_changed_is_compiled_again(tmp_path, cache, monkeypatch):
    plant(tmp_path, a_cu='#include "b.h"\n__global__ void k(float* p) { *p = kOne; }')
    plant(tmp_path, b_h='#include "c.h"\n', c_h="constexpr float kOne = 1;\n")
    first = compile_kernels(tmp_path / "a.cu", "80", tmp_path)
    run = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: run.append(command) or 1 / 0)
    assert compile_kernels(tmp_path / "a.cu", "80", tmp_path) == first
    assert run == []
    with pytest.raises(ZeroDivisionError):
        compile_kernels(tmp_path / "a.cu", "90a", tmp_path)
    plant(tmp_path, c_h="constexpr float kOne = 1.0f;\n")
    with pytest.raises(ZeroDivisionError):
        compile_kernels(tmp_path / "a.cu", "80", tmp_path)
    assert len(run) == 2


@pytest.mark.parametrize("statement", ['asm("")', 'asm volatile("")', '__asm__ ("")'])
def test_inline_ptx_is_found(tmp_path, statement):
    plant(tmp_path, a_cu="// asm\n/*\nasm */ int asma;\n", b_cuh=f"void f() {{ {statement}; }}\n")
    assert files_with_ptx(tmp_path) == ["b.cuh"]


@needs_headers
def test_errors_of_type_in_host_code_are_found(tmp_path, cache):
    text = "#include <c10/cuda/CUDAStream.h>\n{} f() {{ return c10::cuda::CUDAStream::unpack3; }}"
    right = "auto"
    plant(tmp_path, a_cpp=text.format(right), b_cpp=text.format("int"))
    type_check(tmp_path / "a.cpp")
    with pytest.raises(AssertionError, match=r"b\.cpp does not compile"):
        type_check(tmp_path / "b.cpp")


def main():
    """Print the table."""
    if NVCC is None:
        sys.exit("no nvcc in CUDA_HOME, the PATH or /usr/local/cuda")
    functions = []
    with tempfile.TemporaryDirectory() as folder:
        for source in KERNELS:
            for architecture in ARCHITECTURES:
                functions += compile_kernels(source, architecture, Path(folder))[0]
    print(table(functions))


if __name__ == "__main__":
    main()
