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
from time import perf_counter

import torch
from cases import BenchmarkCase

#: A round takes at least so long, in seconds.
ROUND = 0.01
#: Pairs of rounds, however long they take.
MIN_PAIRS = 5


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
