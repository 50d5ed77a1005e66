# SPDX-License-Identifier: Apache-2.0
"""Time nn.RNN and fastrnn.RNN in turns: what disturbs the machine disturbs both.

A round is as many calls of one class as take about ten milliseconds, or one. A pair of rounds, one
of each class, gives one ratio; the speed-up is the median of these, not the ratio of two medians
that may come from different moments.
"""

import gc
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter, process_time, sleep

import torch
from cases import BenchmarkCase

#: A round takes at least so long, in seconds.
ROUND = 0.01
#: Pairs of rounds, however long they take.
MIN_PAIRS = 5
#: A call of more seconds is a burst by itself, without a warm-up.
LONG = 0.1
#: Seconds of calls before a burst, not timed: they bring the weights back into the caches, and the
#: threads to life.
WARM_UP = 0.004
#: A process rests when it uses less than this share of a processor, in steps of so many seconds.
REST_SHARE, REST_STEP, REST_LIMIT = 0.5, 0.001, 0.1


@dataclass(frozen=True)
class Timing:
    """Medians over the rounds: seconds of a call, and nn.RNN's time / fastrnn's, pair by pair."""

    nn_rnn: float
    fastrnn: float
    speedup: float
    speedup_quartiles: tuple[float, float]
    pairs: int


def measure(case: BenchmarkCase, mode: str, seconds: float) -> Timing:
    """Time both classes in `mode`.

    Parameters
    ----------
    case : BenchmarkCase
        What to run.
    mode : str
        One of `cases.MODES`.
    seconds : float
        Time to spend after the warm-up; `MIN_PAIRS` are made even if they take longer.

    Returns
    -------
    Timing
        The medians.
    """
    theirs, ours = (case.step(name, mode) for name in ("nn_rnn", "fastrnn"))
    pairs: list[tuple[float, float]] = []
    with undisturbed(), torch.inference_mode(mode == "inference"):
        their_calls, our_calls = calls_of_round(theirs), calls_of_round(ours)
        end = perf_counter() + seconds
        while len(pairs) < MIN_PAIRS or perf_counter() < end:
            pairs.append((round_of(theirs, their_calls), round_of(ours, our_calls)))
    lower, middle, upper = statistics.quantiles((a / b for a, b in pairs), n=4, method="inclusive")
    their_time, our_time = map(statistics.median, zip(*pairs, strict=True))
    return Timing(their_time, our_time, middle, (lower, upper), len(pairs))


def round_of(step: Callable[[], None], calls: int) -> float:
    """Seconds of a call, from one round of `calls`."""
    start = perf_counter()
    for _ in range(calls):
        step()
    return (perf_counter() - start) / calls


def burst(step: Callable[[], None], calls: int, warm_up: bool = True) -> float:
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


def calls_of_round(step: Callable[[], None]) -> int:
    """The power of two of calls that fills a round; finding it is the warm-up."""
    step()
    step()
    calls = 1
    while round_of(step, calls) * calls < ROUND:
        calls *= 2
    return calls


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
