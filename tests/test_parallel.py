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

MOST = 20_000_000  # nanoseconds that the account holds at most


@pytest.fixture(scope="module")
def library():
    flags, link = cuda_host.torch_flags()
    source = Path(__file__).with_name("parallel.cpp")
    compiled = cuda_host.compile_source(source, ("-fopenmp", *flags))
    path = cuda_host.make(".so", ["-shared", compiled, *link, "-fopenmp"], [compiled])
    library = ctypes.CDLL(str(path))
    library.set_saved.argtypes = [ctypes.c_int64]
    library.set_wake_time.argtypes = [ctypes.c_int64, ctypes.c_int64]
    library.run_region.argtypes = [ctypes.c_int64, ctypes.c_bool, ctypes.c_bool, ctypes.c_int64]
    return library


@pytest.fixture
def region(library):
    """Runs a region for two threads, the second late; returns how many it had."""
    with threads(2):
        library.set_saved(MOST)
        library.set_wake_time(0, 0)
        yield lambda milliseconds=0, needs=False, parallel=True, work=0: library.run_region(
            milliseconds, needs, parallel, work
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


@pytest.mark.full
@pytest.mark.parametrize("needs", [False, True], ids=["at the end", "inside its turn"])
def test_a_short_wait_changes_nothing(library, region, needs):
    for _ in range(50):
        library.set_saved(MOST)
        library.set_wake_time(0, 0)
        begin = time.perf_counter()
        assert region(2, needs) == 2
        if time.perf_counter() - begin < 0.01:  # half of what the account holds
            library.set_wake_time(0, 0)
            assert region() == 2
            return
    pytest.skip("this machine is too busy for a short wait")


@pytest.mark.full
def test_time_fills_the_account(library, region):
    library.set_saved(-100_000_000)
    assert region() == 1
    time.sleep(0.85)
    assert region() == 2


@pytest.fixture
def rest(library):
    """Makes a rest, since which threads wake up slowly, as they did some seconds ago."""

    def rest(seconds=0, wake_time=1_000_000):
        library.set_wake_time(wake_time, seconds)
        library.rest()

    return rest


def test_after_a_rest_threads_that_wake_up_slowly_are_not_woken(region, rest):
    rest(wake_time=1_000_000_000)  # longer than a busy machine keeps the caller from its core
    assert region() == region() == 1


@pytest.mark.full
def test_they_are_woken_once_the_caller_has_been_busy_for_some_time(region, rest):
    def threads_of_two_calls():
        rest()
        return region(5), region()

    # On a busy machine the caller may lose its core between the two, which is another rest.
    assert (1, 2) in (threads_of_two_calls() for _ in range(20))
    rest()
    assert region() == 1


@pytest.mark.full
def test_they_are_woken_for_a_call_that_takes_longer(region, rest):
    rest()
    assert region(work=1_000_000) == 1
    assert region(work=1_000_000_000) == 2


def test_they_are_woken_after_some_seconds_since_they_may_be_faster_by_then(region, rest):
    rest(seconds=30)
    assert region() == 2


@pytest.mark.full
def test_how_long_they_take_is_measured_after_a_rest(library, region):
    def threads_of_two_calls():
        library.set_wake_time(0, 0)
        library.set_saved(MOST)
        library.rest()
        late = region(50)
        library.set_saved(MOST)
        return late, region()

    assert (2, 2) in (threads_of_two_calls() for _ in range(20))  # see above
    library.rest()
    assert region() == 1
