# SPDX-License-Identifier: Apache-2.0
"""How gpu.py measures: rounds in turns, CUDA graphs, memory, and the process that does it.

As timing.py, but a call only queues its work: a round ends when the device is done. All of it runs
in a process of its own, so that a fault or a kernel that never ends costs one case and no more.
"""

import faulthandler
import gc
import multiprocessing
import statistics
from collections.abc import Callable
from time import perf_counter
from typing import Any

import timing
import torch
from cases import CLASSES, MODES
from gpu_cases import Bench, GpuCase, failure, settings_of
from run import described

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
        Time to spend on each mode, as of `timing.measure`.

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
        pairs of rounds, their quartiles, and the number of pairs.
    """
    rounds: dict[str, list[tuple[float, ...]]] = {name: [] for name in steps}
    with timing.undisturbed():
        calls = {name: calls_of_round(step, device) for name, step in steps.items()}
        end = perf_counter() + seconds
        done = 0
        while steps and (done < timing.MIN_PAIRS or perf_counter() < end):
            for name, step in steps.items():
                rounds[name].append(round_of(step, calls[name], device))
            done += 1
    found: dict[str, Any] = {"pairs": done} if len(steps) == len(CLASSES) else {}
    for place, clock in enumerate(("", "gpu_")[: 2 if device == "cuda" else 1]):
        times = {name: [each[place] for each in of_class] for name, of_class in rounds.items()}
        for name in steps:
            found[f"{name}_{clock}us"] = round(statistics.median(times[name]) * 1e6, 2)
        if len(steps) == len(CLASSES):
            ratios = [a / b for a, b in zip(times["nn_rnn"], times["fastrnn"], strict=True)]
            lower, middle, upper = statistics.quantiles(ratios, n=4, method="inclusive")
            found[f"{clock}speedup"] = round(middle, 3)
            found[f"{clock}speedup_quartiles"] = [round(lower, 3), round(upper, 3)]
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


class Worker:
    """A process that calls functions, one after another, and is replaced when it fails."""

    def __init__(self) -> None:
        self._process: Any = None

    def ask(self, function: Callable[..., Any], *arguments: Any, limit: float) -> Any:
        """Call `function` in the process, which is started if there is none.

        Parameters
        ----------
        function : callable
            Of a module that the process can import, as its arguments and its result.
        limit : float
            Seconds until the process is killed.

        Raises
        ------
        TimeoutError
            At the limit.
        ChildProcessError
            If the process ends instead of answering.
        """
        if self._process is None:
            self._start()
        try:
            self._connection.send((function, arguments))
            # poll() cannot wait for ever.
            if not self._connection.poll(min(limit, 1e6)):
                self.close()
                raise TimeoutError(f"no answer in {limit:.0f} s")
            answer, healthy = self._connection.recv()
        except (EOFError, ConnectionError) as error:
            self._process.join(10)
            code = self._process.exitcode
            self.close()
            raise ChildProcessError(f"the process ended with exit code {code}") from error
        if not healthy:
            self.close()
        return answer

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other,), daemon=True)
        self._process.start()
        other.close()

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join(10)
            self._connection.close()
            self._process = None


def serve(connection: Any) -> None:
    """Answer a `Worker` until it is gone."""
    faulthandler.enable()
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        answer = function(*arguments)
        connection.send((answer, healthy(answer)))


def healthy(answer: Any) -> bool:
    """Whether this process can go on: after a fault, a CUDA context fails at every call.

    A failed capture can leave the allocator as if it went on.
    """
    modes = answer.get("graph", {}).values() if isinstance(answer, dict) else ()
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
