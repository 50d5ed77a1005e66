# SPDX-License-Identifier: Apache-2.0
"""The time and the memory of a call, measured in this process.

A round is as many calls as take about ten milliseconds, or one. A burst is a round of one of
several processes that take turns: warm before, at rest after. Where two times are compared, they
are of neighbouring rounds, and the ratio that is told is the median of the rounds' ratios, not the
ratio of two medians that may come from different moments.
"""

import gc
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from time import perf_counter, process_time, sleep

import torch
from cases import BenchmarkCase
from torch.profiler import ProfilerActivity, profile

#: A round takes at least so long, in seconds.
ROUND = 0.01
#: Rounds that are made however long they take.
MIN_ROUNDS = 5
#: A call of more seconds is a burst by itself, without a warm-up.
LONG = 0.1
#: Seconds of calls before a burst, not timed: they bring the weights back into the caches, and the
#: threads to life.
WARM_UP = 0.004
#: A process rests when it uses less than this share of a processor, in steps of so many seconds.
REST_SHARE, REST_STEP, REST_LIMIT = 0.5, 0.001, 0.1


def round_of(step: Callable[[], object], calls: int) -> float:
    """Seconds of a call, from one round of `calls`."""
    start = perf_counter()
    for _ in range(calls):
        step()
    return (perf_counter() - start) / calls


def calls_of_round(step: Callable[[], object]) -> int:
    """The power of two of calls that fills a round; finding it is the warm-up."""
    step()
    step()
    calls = 1
    while round_of(step, calls) * calls < ROUND:
        calls *= 2
    return calls


def burst(step: Callable[[], object], calls: int, warm_up: bool = True) -> float:
    """As `round_of`, for one of several processes in turns: warm before, at rest after."""
    end = perf_counter() + WARM_UP
    while warm_up and perf_counter() < end:
        step()
    seconds = round_of(step, calls)
    rest()
    return seconds


def rest() -> None:
    """Wait until this process is idle: OpenMP's and other pools spin for a while after a call."""
    end = perf_counter() + REST_LIMIT
    while perf_counter() < end:
        wall, used = perf_counter(), process_time()
        sleep(REST_STEP)
        if process_time() - used < REST_SHARE * (perf_counter() - wall):
            return


def median(values: Sequence[float], digits: int = 3) -> list[float]:
    """The median and both quartiles, rounded, to be written."""
    lower, middle, upper = statistics.quantiles(values, n=4, method="inclusive")
    return [round(value, digits) for value in (middle, lower, upper)]


def ratios(times: Sequence[float], base: Sequence[float]) -> list[float]:
    """Round by round: how many times as long."""
    return [a / b for a, b in zip(times, base, strict=True)]


def keep_freed_memory() -> None:
    """Bring this process into the state of one that has freed a large tensor.

    glibc raises its limits for giving memory back with the largest block that was freed, up to
    32 MB. Before, calls spend time on page faults, by luck of what ran before.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Keep the garbage collector from running inside, and collect what there is before."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def peak(case: BenchmarkCase, class_name: str, mode: str) -> int:
    """Peak memory of one call, after one that warms up.

    What PyTorch's allocator hands out during the call, less what it gets back, at its highest:
    weights, input and the output's gradient are there before and do not count, the results and the
    gradients of the weights do. What ran before in this process may be felt.

    Parameters
    ----------
    case : BenchmarkCase
        What to run.
    class_name, mode : str
        As of `BenchmarkCase.step`.

    Returns
    -------
    int
        Bytes.
    """
    step = case.step(class_name, mode)
    with torch.inference_mode(mode == "inference"):
        step()
        gc.collect()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step()
    assert profiler.profiler is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events, "the profiler saw no allocation"
    events.sort(key=lambda event: event.start_ns())
    return int(max(accumulate(event.nbytes() for event in events)))
