# SPDX-License-Identifier: Apache-2.0
"""How gpu.py measures: rounds in turns, CUDA graphs, memory, and the process that does it.

As timing.py, but a call only queues its work: a round ends when the device is done. All of it runs
in a process of its own, so that a fault or a kernel that never ends costs one case and no more.
"""

import gc
import statistics
from collections.abc import Callable
from time import perf_counter
from typing import Any

import gpu_steps
import timing
import torch
from cases import CLASSES, MODES
from gpu_cases import Bench, GpuCase, failure, settings_of
from report import describe, described, without_paths

#: How a step is called: by Python, or as a CUDA graph that was captured once.
WAYS = ("eager", "graph")
#: Calls before the capture of a graph, which lets libraries allocate what they keep.
WARM_UP = 3

Step = Callable[[], None]


def perform(case: GpuCase, way: str, device: str, seconds: float) -> dict[str, Any]:
    """Measure a case in one of `WAYS`, behind the gate in the first of them.

    Parameters
    ----------
    case : GpuCase
        What to run.
    way : str
        One of `WAYS`.
    device : str
        ``"cuda"``, or ``"cpu"`` to try the script; that has no graphs.
    seconds : float
        Time to spend on each mode, but for a few rounds that are made in any case.

    Returns
    -------
    dict
        ``gate`` where it ran (None is good), the numbers of each mode under the way's name, and
        ``error`` if something raised.
    """
    entry: dict[str, Any] = {}
    with settings_of(case):
        try:
            if way == "eager":
                entry["gate"] = failure(case, device)
            if entry.get("gate") is None:
                entry[way] = {}
                bench = Bench(case, device)
                for mode in MODES:
                    entry[way][mode] = measure(bench, way, mode, device, seconds)
        except Exception as error:
            entry["error"] = f"{way}: {described(error)}"
    return entry


def measure(bench: Bench, way: str, mode: str, device: str, seconds: float) -> dict[str, Any]:
    """The numbers of one mode; of the other class alone if one cannot be captured."""
    steps: dict[str, Step] = {name: bench.step(name, mode) for name in CLASSES}
    found: dict[str, Any] = {}
    with torch.inference_mode(mode == "inference"):
        if way == "graph":
            for name in CLASSES:
                try:
                    steps[name] = captured(steps[name])
                except Exception as error:
                    del steps[name]
                    found[f"{name}_error"] = described(error)
        elif device == "cuda":
            found |= {f"{name}_peak_bytes": peak(step) for name, step in steps.items()}
        return found | in_turns(steps, device, seconds)


def in_turns(steps: dict[str, Step], device: str, seconds: float) -> dict[str, Any]:
    """Time the steps in rounds that take turns.

    Returns
    -------
    dict
        Microseconds of a call: ``<class>_us`` by the wall clock, ``<class>_gpu_us`` between two
        events on the stream, which includes what the device waits for the host. With both classes
        also nn.RNN's time / fastrnn's by either: ``speedup``, ``gpu_speedup``, the medians over
        pairs of rounds and their quartiles, and the number of pairs.
    """
    rounds: dict[str, list[tuple[float, ...]]] = {name: [] for name in steps}
    with timing.undisturbed():
        calls = {name: calls_of_round(step, device) for name, step in steps.items()}
        end = perf_counter() + seconds
        done = 0
        while steps and (done < timing.MIN_ROUNDS or perf_counter() < end):
            for name, step in steps.items():
                rounds[name].append(round_of(step, calls[name], device))
            done += 1
    found: dict[str, Any] = {"pairs": done} if len(steps) == len(CLASSES) else {}
    for place, clock in enumerate(("", "gpu_")[: 2 if device == "cuda" else 1]):
        times = {name: [each[place] for each in of_class] for name, of_class in rounds.items()}
        for name in steps:
            found[f"{name}_{clock}us"] = round(statistics.median(times[name]) * 1e6, 2)
        if len(steps) == len(CLASSES):
            ratios = timing.ratios(times["nn_rnn"], times["fastrnn"])
            found[f"{clock}speedup"] = timing.median(ratios)
    return found


def round_of(step: Step, calls: int, device: str) -> tuple[float, ...]:
    """Seconds of a call, from one round of `calls`: by the wall clock, on CUDA also by events."""
    if device != "cuda":
        return (timing.round_of(step, calls),)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start = perf_counter()
    begin.record()
    for _ in range(calls):
        step()
    end.record()
    torch.cuda.synchronize()
    wall = perf_counter() - start
    return wall / calls, begin.elapsed_time(end) / 1e3 / calls


def calls_of_round(step: Step, device: str) -> int:
    """The power of two of calls that fills a round; finding it is the warm-up."""
    calls = 1
    round_of(step, 2, device)
    while round_of(step, calls, device)[0] * calls < timing.ROUND:
        calls *= 2
    return calls


def captured(step: Step) -> Step:
    """Capture one call as a CUDA graph; its replay reads the same input each time."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def peak(step: Step) -> int:
    """Bytes that one call needs at its highest, besides what is there before."""
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


class Runner:
    """What the process does for gpu.py."""

    def machine(self, device: str) -> dict[str, Any]:
        """What a report tells of the machine; only now can a process load what was built."""
        found: dict[str, Any] = without_paths(describe("gpu", [], {})["machine"])
        return found | {"gpu": gpu_steps.gpu() if device == "cuda" else None}

    def perform(
        self, case: GpuCase, way: str, device: str, seconds: float
    ) -> tuple[dict[str, Any], bool]:
        """As the function of this name, and whether this process can go on."""
        found = perform(case, way, device, seconds)
        return found, healthy(found)


def healthy(found: dict[str, Any]) -> bool:
    """Whether this process can go on: after a fault, a CUDA context fails at every call.

    A failed capture can leave the allocator as if it went on.
    """
    modes = found.get("graph", {}).values()
    if any(key.endswith("_error") for numbers in modes for key in numbers):
        return False
    gc.collect()
    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.empty_cache()
        torch.zeros(1, device="cuda").item()
    except RuntimeError:
        return False
    return True
