# SPDX-License-Identifier: Apache-2.0
"""The floor of a case: a time that no implementation can be faster than on a machine.

From the shape of the case and the machine's limits, as limits.py measures them, alone. Inference
has one phase, training two, and each takes at least the longer of

- its arithmetic: every product at the peak of all threads, and tanh beside them;
- its recurrence, which is the longest of its own arithmetic, of reading `W_hh` once in each step
  through the caches that hold it, and of the chain of steps, each awaiting only the one before.

A sequence of a layer and direction is walked by one thread; if there are fewer of these than
threads, others may share the steps, which adds a hand-over to each. The better way counts.

What could overlap counts as overlapping, so that the times of a phase are not added. Backward has
the forward's products twice (once for the first layer's input, which needs no gradient). Without
`hx` the first step has no product with `W_hh`. tanh is the library's own, relu is free.
"""

from dataclasses import dataclass
from typing import Any

from cases import BenchmarkCase, dtype_name

#: FLOPs of tanh's derivative times a gradient: two multiply-adds.
DERIVATIVE = 4


@dataclass(frozen=True)
class Work:
    """What the shape of a case asks for, in all layers and directions."""

    input_flops: float  # x W_ih^T
    upper_flops: float  # the part of these above the first layer
    recurrent_flops: float  # h W_hh^T
    tanhs: float
    weights: int  # bytes of one W_hh
    reads: int  # how often one of them is read
    chain: int  # steps that follow one another, whatever runs beside them
    walks: int  # sequences that can be walked at the same time


def work(case: BenchmarkCase) -> Work:
    """Count the work of a case's forward; hx is not looked at."""
    T, B, H, layers = case.T, case.B, case.H, case.num_layers
    directions = 2 if case.bidirectional else 1
    if case.lengths:
        T, B = max(case.lengths), len(case.lengths)
    rows = sum(case.lengths or [T * B])
    cells = layers * directions
    upper = 2 * rows * H * directions * H * (cells - directions)
    return Work(
        input_flops=2 * rows * H * case.I * directions + upper,
        upper_flops=upper,
        recurrent_flops=2 * (rows - B) * H * H * cells,
        tanhs=rows * H * cells if case.nonlinearity == "tanh" else 0,
        weights=H * H * case.dtype.itemsize,
        reads=(T - 1) * cells,
        # A layer can follow the one below by a step, unless that one also walks from the end.
        chain=T * layers if directions == 2 else T + layers - 1,
        walks=B * (directions if directions == 2 else layers),
    )


def floor(case: BenchmarkCase, mode: str, report: dict[str, Any]) -> float | None:
    """The floor of a case.

    Parameters
    ----------
    case : BenchmarkCase
        Any.
    mode : str
        One of `cases.MODES`; training is as there, without a gradient of the input.
    report : dict
        Results of limits.py.

    Returns
    -------
    float or None
        Microseconds; None if the peak for this dtype is not known.
    """
    limits, dtype = report["limits"], dtype_name(case)
    if limits["gflops"].get(dtype, ()) is None:
        return None
    needed, own = work(case), "float64" if dtype == "float64" else "float32"
    products = needed.input_flops + needed.recurrent_flops
    tanh, step = limits["tanh_ns"][own] * needed.tanhs, limits["step_ns"][own]
    latency = step if needed.tanhs else dict.fromkeys(step, 0.0)
    nanoseconds = phase(report, dtype, needed, products, 0, tanh, latency["forward"])
    if mode == "training":
        derivative = DERIVATIVE * needed.tanhs
        products += needed.upper_flops + needed.recurrent_flops
        nanoseconds += phase(report, dtype, needed, products, derivative, 0, latency["backward"])
    return nanoseconds / 1e3


def phase(
    report: dict[str, Any],
    dtype: str,
    needed: Work,
    products: float,
    derivative: float,
    tanh: float,
    latency: float,
) -> float:
    """Nanoseconds of one walk through all layers, forward or backward."""
    limits, threads = report["limits"], report["threads"][-1]
    peak = limits["gflops"].get(dtype, limits["gflops"]["float32"])

    def arithmetic(flops: float, used: int) -> float:
        return (flops + derivative) / rate(peak, used) + tanh / used

    def recurrence(used: int, latency: float) -> float:
        reading = needed.reads * read(needed.weights, used, limits)
        own = arithmetic(needed.recurrent_flops, used)
        return max(own, reading, needed.chain * latency)

    steps = recurrence(min(threads, needed.walks), latency)
    if needed.walks < threads:
        steps = min(steps, recurrence(threads, latency + limits["hand_over_ns"]))
    return max(arithmetic(products, threads), steps)


def read(size: int, threads: int, limits: dict[str, Any]) -> float:
    """Nanoseconds of reading so many bytes again, the nearest caches full of them."""
    time, rest = 0.0, size
    for cache in limits["caches"]:
        part = min(rest, cache["bytes"] * min(threads, cache["instances"]))
        time += part / rate(limits["read_gb_s"][cache["level"]], threads)
        rest -= part
    return time + rest / rate(limits["read_gb_s"]["DRAM"], threads)


def rate(measured: list[float], threads: int) -> float:
    """What so many threads reach at most, measured with one and with all."""
    return min(threads * measured[0], measured[-1])
