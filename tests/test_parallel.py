# SPDX-License-Identifier: Apache-2.0
"""When threads share a region, and when the caller runs it alone because they come too late."""

import ctypes
import time
from pathlib import Path

import cuda_host
import pytest
import torch
from test_teams import threads

pytestmark = pytest.mark.skipif(not cuda_host.available(), reason="needs Linux and g++")

MOST = 20_000_000  # nanoseconds that the account holds at most


@pytest.fixture(scope="module")
def library():
    flags, link = cuda_host.torch_flags()
    source = Path(__file__).with_name("parallel.cpp")
    compiled = cuda_host.compile_source(source, ("-fopenmp", *flags))
    path = cuda_host.make(".so", ["-shared", compiled, *link, "-fopenmp"], [compiled])
    library = ctypes.CDLL(str(path))
    library.set_saved.argtypes = [ctypes.c_int64]
    library.run_region.argtypes = [ctypes.c_int64, ctypes.c_bool, ctypes.c_bool]
    return library


@pytest.fixture
def region(library):
    """Runs a region for two threads, the second late; returns how many it had."""
    with threads(2):
        library.set_saved(MOST)
        yield lambda milliseconds=0, needs=False, parallel=True: library.run_region(
            milliseconds, needs, parallel
        )


def test_a_region_has_two_threads_unless_its_caller_wants_one(region):
    assert region() == 2
    assert region(parallel=False) == 1
    torch.set_num_threads(1)
    assert region() == 1


@pytest.mark.parametrize("needs", [False, True], ids=["at the end", "inside its turn"])
def test_after_a_long_wait_the_caller_goes_on_alone(library, region, needs):
    for _ in range(2):  # a wait is measured by one clock, and after a long one by two
        library.set_saved(MOST)
        assert region(100, needs) == 2
        assert region() == 1


def test_a_short_wait_changes_nothing(region):
    assert region(2) == region(2, needs=True) == region() == 2


def test_time_fills_the_account(library, region):
    library.set_saved(-1_000_000)
    assert region() == 1
    time.sleep(0.02)
    assert region() == 2
