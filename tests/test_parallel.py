# SPDX-License-Identifier: Apache-2.0
"""When threads share a region, and when the caller runs it alone because they come too late."""

import ctypes
import sysconfig
import time
from pathlib import Path

import cuda_host
import pytest
import torch
from test_teams import threads
from torch.utils import cpp_extension

pytestmark = pytest.mark.skipif(not cuda_host.available(), reason="needs Linux and g++")

MOST = 20_000_000  # nanoseconds that the account holds at most


@pytest.fixture(scope="module")
def library():
    includes = [*cpp_extension.include_paths(), sysconfig.get_path("include")]
    compiled = cuda_host.compile_source(
        Path(__file__).with_name("parallel.cpp"),
        ("-std=c++20", "-fopenmp", *(f"-isystem{path}" for path in includes)),
    )
    torch_libraries = Path(torch.__file__).parent / "lib"
    link = (f"-L{torch_libraries}", "-ltorch_cpu", "-lc10", "-fopenmp")
    return ctypes.CDLL(str(cuda_host.make(".so", ["-shared", compiled, *link], [compiled])))


def set_saved(library, nanoseconds):
    library.set_saved(ctypes.c_int64(nanoseconds))


@pytest.fixture
def region(library):
    """Runs a region for two threads, the second late; returns how many it had."""
    with threads(2):
        set_saved(library, MOST)
        yield lambda milliseconds=0, needs=False, parallel=True: library.run_region(
            ctypes.c_int64(milliseconds), needs, parallel
        )


def test_a_region_has_two_threads_unless_its_caller_wants_one(region):
    assert region() == 2
    assert region(parallel=False) == 1
    torch.set_num_threads(1)
    assert region() == 1


@pytest.mark.parametrize("needs", [False, True], ids=["at the end", "inside its turn"])
def test_after_a_long_wait_the_caller_goes_on_alone(library, region, needs):
    for _ in range(2):  # a wait is measured by one clock, and after a long one by two
        set_saved(library, MOST)
        assert region(100, needs) == 2
        assert region() == 1


def test_a_short_wait_changes_nothing(region):
    assert region(2) == region(2, needs=True) == region() == 2


def test_time_fills_the_account(library, region):
    set_saved(library, -1_000_000)
    assert region() == 1
    time.sleep(0.02)
    assert region() == 2
