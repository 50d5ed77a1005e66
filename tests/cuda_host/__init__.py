# SPDX-License-Identifier: Apache-2.0
"""Compiles torch-free CUDA sources with g++ and runs their kernels on the CPU: see cuda_host.h.

A source exports `extern "C" int name(...)` around launches, its body inside cuda_host::guarded.
"""

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import weakref
from pathlib import Path

import torch
from torch.utils import cpp_extension

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CACHE = ROOT / ".pytest_cache" / "d" / "cuda_host"
COMPILER = "g++"
# No unique symbols: they would be shared by all libraries of the process. Kernels reinterpret
# shared memory, which nvcc allows.
FLAGS = [
    *["-std=c++20", "-O2", "-g", "-fPIC", "-fno-gnu-unique", "-fno-strict-aliasing"],
    *["-Wall", "-Wno-unknown-pragmas", f"-I{HERE}", f"-I{ROOT / 'csrc'}"],
]
# Each bug that depends on the order of threads shows in at least one of these.
ORDERS = [("ascending", 0), ("descending", 0), *(("shuffled", seed) for seed in (1, 2, 3))]


def available():
    """Whether kernels can be compiled and run here: fibers and faults are those of Linux."""
    return sys.platform == "linux" and shutil.which(COMPILER) is not None


def run_compiler(*arguments):
    process = subprocess.run([COMPILER, *map(str, arguments)], capture_output=True, text=True)
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(process.args)}\n{process.stderr}")
    return process.stdout


@functools.cache
def compiler_version():
    return run_compiler("--version")


def make(suffix, arguments, inputs):
    """The file that the compiler makes with the arguments, named by all that it depends on."""
    parts = [compiler_version(), *map(str, arguments)]
    digest = hashlib.sha256("\0".join(parts).encode())
    for path in inputs:
        digest.update(path.read_bytes())
    target = CACHE / (digest.hexdigest()[:32] + suffix)
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_suffix(f".{os.getpid()}{suffix}")
        run_compiler(*arguments, "-o", unfinished)
        unfinished.replace(target)  # at once: other processes may look for it
    return target


def compile_source(source, flags):
    arguments = [*FLAGS, *flags, "-x", "c++", source]
    rule = run_compiler(*arguments, "-MM")  # "name.o: source header header ..."
    used = [Path(name) for name in re.split(r"[\s\\]+", rule.partition(":")[2]) if name]
    return make(".o", [*arguments, "-c"], used)


@functools.cache
def torch_flags():
    """What compiles and what links a source that includes torch."""
    includes = [*cpp_extension.include_paths(), sysconfig.get_path("include")]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    libraries = Path(torch.__file__).parent / "lib"
    return (
        (abi, *(f"-isystem{path}" for path in includes)),
        (f"-L{libraries}", "-ltorch_cpu", "-lc10"),
    )


@functools.cache
def build(*sources, flags=(), link=()):
    """The Library of the sources (absolute paths), compiled unless this was done before."""
    emulator = sorted(HERE.glob("*.cpp"))
    objects = [compile_source(source, flags) for source in [*emulator, *map(Path, sources)]]
    return Library(make(".so", ["-shared", *objects, *link], objects))


class Library:
    """A compiled library. It has its own buffers and its own order."""

    def __init__(self, path):
        self._functions = ctypes.CDLL(str(path))
        self._functions.fastrnn_host_allocate.restype = ctypes.c_void_p
        self._functions.fastrnn_host_last_error.restype = ctypes.c_char_p

    def call(self, name, *arguments):
        """Call an exported function with ints, buffers and ctypes values; raise its error."""
        converted = [ctypes.c_int64(a) if isinstance(a, int) else a for a in arguments]
        if self._functions[name](*converted) != 0:
            raise self._error()

    def set_order(self, kind, seed=0):
        kinds = ["ascending", "descending", "shuffled"]
        self.call("fastrnn_host_set_order", kinds.index(kind), seed)

    def launches(self):
        """How many kernels have been launched."""
        return self._functions.fastrnn_host_launches()

    def allocate(self, size, name):
        address = self._functions.fastrnn_host_allocate(ctypes.c_size_t(size), name.encode())
        if address is None:
            raise self._error()
        return address

    def release(self, address):
        self.call("fastrnn_host_release", ctypes.c_void_p(address))

    def _error(self):
        return RuntimeError(self._functions.fastrnn_host_last_error().decode())


class DeviceBuffer:
    """A guarded copy of a tensor in a library's device memory; an argument of Library.call."""

    def __init__(self, library, tensor, name):
        self._like = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        size = tensor.numel() * tensor.element_size()
        self.address = library.allocate(size, name)
        self._finalizer = weakref.finalize(self, library.release, self.address)
        self._as_parameter_ = ctypes.c_void_p(self.address)
        self.copy_from(tensor)

    @classmethod
    def unwritten(cls, library, shape, dtype, name):
        """A buffer of which every byte is 0xFF: NaN in every float type, -1 in integers."""
        size = torch.Size(shape).numel() * dtype.itemsize
        poison = torch.full([size], 0xFF, dtype=torch.uint8)
        return cls(library, poison.view(dtype).reshape(shape), name)

    def copy_from(self, tensor):
        assert tensor.shape == self._like.shape and tensor.dtype == self._like.dtype
        source = tensor.detach().contiguous()
        ctypes.memmove(self.address, source.data_ptr(), source.numel() * source.element_size())

    def tensor(self):
        """A copy of what the buffer holds now."""
        result = torch.empty_like(self._like)
        ctypes.memmove(result.data_ptr(), self.address, result.numel() * result.element_size())
        return result
