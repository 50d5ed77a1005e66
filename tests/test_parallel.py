# SPDX-License-Identifier: Apache-2.0
"""When threads share a region, and when the caller runs it alone because they come too late."""

import ctypes
import time
from pathlib import Path

import cuda_host
import pytest
import torch
from accuracy import threads

pytestmark = pytest.mark.skipif(not cuda_host.available(), reason="needs Linux and g++")

MOST = 20_000_000  # nanoseconds that may be lost by waiting, at most


@pytest.fixture(scope="module")
def library():
    flags, link = cuda_host.torch_flags()
    source = Path(__file__).with_name("parallel.cpp")
    compiled = cuda_host.compile_source(source, ("-fopenmp", *flags))
    path = cuda_host.make(".so", ["-shared", compiled, *link, "-fopenmp"], [compiled])
    library = ctypes.CDLL(str(path))
    library.set_credit.argtypes = [ctypes.c_int64]
    library.rest.argtypes = [ctypes.c_int64]
    library.run_region.argtypes = [ctypes.c_int64, ctypes.c_bool, ctypes.c_bool]
    return library


@pytest.fixture
def region(library):
    """Runs a region for two threads, the second late; returns how many it had."""
    with threads(2):
        library.rest(1_000_000_000)
        library.set_credit(MOST)
        yield lambda milliseconds=0, needs=False, parallel=True: library.run_region(
            milliseconds, needs, parallel
        )


def test_a_region_has_two_threads_unless_its_caller_wants_one(region):
    assert region() == 2
    assert region(parallel=False) == 1
    torch.set_num_threads(1)
    assert region() == 1


@pytest.mark.parametrize("needs", [False, True], ids=["at the end", "inside its turn"])
def test_after_a_long_wait_the_caller_goes_on_alone(region, needs):
    assert region(100, needs) == 2
    assert region() == 1


@pytest.mark.full
@pytest.mark.parametrize("needs", [False, True], ids=["at the end", "inside its turn"])
def test_a_short_wait_changes_nothing(library, region, needs):
    for _ in range(50):
        library.set_credit(MOST)
        begin = time.perf_counter()
        assert region(2, needs) == 2
        if time.perf_counter() - begin < 0.01:  # half of the credit
            assert region() == 2
            return
    pytest.skip("this machine is too busy for a short wait")


@pytest.mark.full
def test_credit_comes_back_with_time(library, region):
    library.set_credit(-10_000_000)
    assert region() == 1
    time.sleep(0.1)
    assert region() == 2


def test_after_a_rest_threads_are_not_woken_for_a_small_call(library, region):
    library.rest(10_000)
    assert region() == region() == 1


def test_after_a_rest_threads_are_woken_for_a_large_call(library, region):
    library.rest(10_000_000)
    assert region() == 2


@pytest.mark.full
def test_they_are_woken_once_the_caller_has_been_busy_for_a_while(library, region):
    def threads_of_two_calls():
        library.rest(0)
        return region(2), region()

    # On a busy machine the caller may lose its core between the two, which is another rest.
    assert (1, 2) in (threads_of_two_calls() for _ in range(20))
