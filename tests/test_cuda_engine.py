# SPDX-License-Identifier: Apache-2.0
"""The CUDA engine without a GPU: fastrnn.RNN on CPU tensors, its operators run by the engine's own
C++ and by its kernels on the emulator (cuda_engine.cpp)."""

import sysconfig
from pathlib import Path

import cuda_host
import pytest
import torch
from torch.utils import cpp_extension

import fastrnn
from fastrnn import testing

pytestmark = pytest.mark.skipif(not cuda_host.available(), reason="needs Linux and g++")

CSRC = cuda_host.ROOT / "csrc"
SOURCES = [
    *sorted((CSRC / "cuda").glob("*.cu")),
    *(path for path in sorted((CSRC / "cuda").glob("*.cpp")) if path.name != "rnn_cuda.cpp"),
    *[CSRC / "layer.cpp", CSRC / "rnn.cpp", Path(__file__).with_name("cuda_engine.cpp")],
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@pytest.fixture(scope="session")
def library():
    torch_libraries = Path(torch.__file__).parent / "lib"
    includes = [*cpp_extension.include_paths(), sysconfig.get_path("include")]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    return cuda_host.build(
        *SOURCES,
        flags=("-std=c++20", "-O1", abi, *(f"-isystem{path}" for path in includes)),
        link=(f"-L{torch_libraries}", "-ltorch_cpu", "-lc10"),
    )


@pytest.fixture
def engine(library):
    """In its scope fastrnn's CPU operators are those of the CUDA engine."""
    override = torch.library.Library("fastrnn", "IMPL")
    for name in ("rnn_forward", "rnn_backward"):
        override.impl(name, getattr(torch.ops.fastrnn_cuda_host, name), "CPU", allow_override=True)
    yield library
    override._destroy()


def cases():
    """The grid, and sizes around those at which the kernels change."""
    result = testing.grid()[::3]
    for H in (16, 31, 33, 64, 65, 128, 129, 192, 193, 256, 257):
        for B, bi in ((1, False), (9, True)):
            result.append(testing.Case(5, B, 3, H, bidirectional=bi, hx=bi))
    return result


@every_dtype
@pytest.mark.parametrize("case", cases(), ids=str)
def test_results_and_gradients_are_as_accurate_as_nn_rnns(engine, case, dtype):
    ours = testing.run(case.module(fastrnn.RNN, dtype), case, dtype)
    theirs = testing.run(case.module(torch.nn.RNN, dtype), case, dtype)
    exact = testing.run(case.module(torch.nn.RNN, dtype).double(), case, dtype)
    if case.nonlinearity == "relu" and dtype.itemsize == 2:
        # A state that rounds to the other side of relu's kink changes a gradient by all of it.
        ours = {name: ours[name] for name in ("output", "h_n")}
        theirs = {name: theirs[name] for name in ours}
    testing.assert_as_accurate(ours, theirs, exact, dtype)
