# SPDX-License-Identifier: Apache-2.0
"""oneDNN: its vanilla RNN primitive, through a driver of our own that is compiled when needed."""

import ctypes
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import native
import torch
from cases import BenchmarkCase
from torch import Tensor

from .interface import Loaded, Peer, Problem

SOURCE = Path(__file__).with_name("onednn_driver.cpp")
LIBRARY, HEADERS = "onednn-cpu-gomp", "onednn-devel-cpu-gomp"
ERROR_SIZE = 1024


class OneDnn(Peer):
    """The bare primitive: no autograd, memory that is allocated once.

    In inference the weights are packed once, in training for each call, as they change. The
    primitive computes the input's gradient as well, which the other peers need not.
    """

    name = "onednn"
    packages = (LIBRARY, HEADERS)
    dtypes = (torch.float32, torch.bfloat16)

    def missing(self) -> str | None:
        """As of `Peer`."""
        absent = super().missing()
        return absent or (None if shutil.which("g++") else "not installed: g++")

    def unsupported(self, case: BenchmarkCase, mode: str) -> str | None:
        """As of `Peer`."""
        if case.num_layers > 1 and (case.bidirectional or case.I != case.H):
            return "one primitive has several layers only in one direction and if I = H"
        return super().unsupported(case, mode)

    def floor_ulps(self, dtype: torch.dtype) -> float:
        """As of `Peer`. The bias's gradient is summed row by row in float32: 16 at 16000 rows."""
        return 64 if dtype is torch.float32 else 8

    def load(self, case: BenchmarkCase, mode: str, threads: int) -> Loaded:
        """As of `Peer`."""
        problem = Problem(case)
        training = mode == "training"
        buffers = allocate(case, problem, training)
        driver = ctypes.CDLL(str(built()))
        driver.onednn_rnn_make.restype = ctypes.c_void_p
        error = ctypes.create_string_buffer(ERROR_SIZE)
        shape = Shape(
            *(*problem.x.shape, case.H, case.num_layers, 2 if case.bidirectional else 1),
            *(case.nonlinearity == "relu", case.dtype is torch.bfloat16, training, threads),
        )
        pointers = Buffers(**{name: tensor.data_ptr() for name, tensor in buffers.items()})
        handle = driver.onednn_rnn_make(
            ctypes.byref(shape), ctypes.byref(pointers), error, ERROR_SIZE
        )
        if handle is None:
            raise RuntimeError(error.value.decode())
        call = Call(driver, handle, buffers)
        names = list(problem.weights)

        def results() -> dict[str, Tensor]:
            call()
            found = {"output": buffers["y"]}
            if not training:
                return found | {"h_n": buffers["h_n"].flatten(0, 1)}
            # (layers, directions, ...), the one bias for both of torch.nn.RNN's
            parts = [buffers[name].flatten(0, 1) for name in ("dw_ih", "dw_hh", "db", "db")]
            cells = [gradient for cell in zip(*parts, strict=True) for gradient in cell]
            return found | {f"grad_{n}": g.clone() for n, g in zip(names, cells, strict=True)}

        return Loaded(call, results)


class Call:
    """One call of the driver; keeps its memory alive and frees it at the end."""

    def __init__(self, driver: ctypes.CDLL, handle: int, buffers: dict[str, Tensor]) -> None:
        self._run, self._free = driver.onednn_rnn_run, driver.onednn_rnn_free
        self._handle = ctypes.c_void_p(handle)
        self._buffers = buffers

    def __call__(self) -> None:
        if self._run(self._handle):
            raise RuntimeError("oneDNN failed")

    def __del__(self) -> None:
        self._free(self._handle)


def allocate(case: BenchmarkCase, problem: Problem, training: bool) -> dict[str, Tensor]:
    """Everything that the driver reads and writes, by the names of `Buffers`."""
    T, B, I = problem.x.shape
    L, D, H = case.num_layers, 2 if case.bidirectional else 1, case.H

    def stack(part: Any) -> Tensor:
        return torch.stack([torch.stack([part(cell) for cell in row]) for row in problem.layers])

    buffers = {
        "x": problem.x,
        "w_ih": stack(lambda cell: cell[0]),
        "w_hh": stack(lambda cell: cell[1]),
        "bias": stack(lambda cell: cell[2].float() + cell[3].float()),
        "y": torch.zeros(T, B, D * H, dtype=case.dtype),
        "h_0": torch.zeros(L, D, B, H, dtype=case.dtype),
        "h_n": torch.zeros(L, D, B, H, dtype=case.dtype),
    }
    if training:
        # Gradients are in float32 in any case.
        buffers["dy"] = problem.cotangent().float()
        sizes = {"dx": (T, B, I), "dh_0": (L, D, B, H), "dh_n": (L, D, B, H), "db": (L, D, H)}
        sizes |= {"dw_ih": (L, D, H, buffers["w_ih"].shape[-1]), "dw_hh": (L, D, H, H)}
        buffers |= {name: torch.zeros(size) for name, size in sizes.items()}
    return buffers


class Shape(ctypes.Structure):
    """The driver's struct of this name."""

    _fields_ = [(name, ctypes.c_int) for name in
                ("T", "B", "I", "H", "L", "D", "relu", "bfloat16",
                 "training", "threads")]  # fmt: skip


class Buffers(ctypes.Structure):
    """The driver's struct of this name; gradients are null in inference."""

    _fields_ = [(name, ctypes.c_void_p) for name in
                ("x", "w_ih", "w_hh", "bias", "y", "h_0", "h_n",
                 "dy", "dx", "dh_0", "dh_n", "dw_ih", "dw_hh", "db")]  # fmt: skip


def built() -> Path:
    """The driver as a shared library, compiled if there is none of this source and oneDNN."""
    headers = installed(HEADERS, "include/oneapi/dnnl/dnnl.hpp").parents[2]
    library = installed(LIBRARY, ".so.3")
    options = ["-O2", "-fopenmp", f"-I{headers}", str(library), f"-Wl,-rpath,{library.parent}"]
    return native.library(SOURCE, *options, key=metadata.version(LIBRARY))


def installed(package: str, end: str) -> Path:
    """The file of an installed package whose path ends like this."""
    files = [file for file in metadata.files(package) or () if str(file).endswith(end)]
    return Path(str(files[0].locate())).resolve()
