# SPDX-License-Identifier: Apache-2.0
"""A process for each peer and number of threads, so that no runtime's threads disturb another's.

A worker loads a case, then waits; asked for a burst, it makes calls for about ten milliseconds and
answers with the time of one. It answers when its threads have stopped spinning, so that the next
worker has the processor alone.
"""

import gc
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter, process_time, sleep
from typing import Any

import timing
import torch
from cases import BenchmarkCase
from run import described, without_paths

from . import PEERS, reference
from .interface import Loaded

#: Seconds until a worker is taken to hang: loading may compile.
LIMIT = 600.0
#: A call of more seconds is a burst by itself, all of it timed.
LONG = 0.1
#: Seconds of calls before a burst, not timed: they bring the weights back into the caches, and the
#: threads to life.
WARM_UP = 0.004
#: Seconds that a process has to end by itself.
CLOSING = 5.0
#: A process rests when it uses less than this share of a processor, in steps of so many seconds.
REST_SHARE, REST_STEP, REST_LIMIT = 0.5, 0.001, 0.1


class Runner:
    """One peer with so many threads; what a worker does, in whatever process it is made."""

    def __init__(self, name: str, threads: int) -> None:
        self._peer = PEERS[name]
        self._threads = threads
        self._loaded: Loaded | None = None
        self._calls, self._long = 1, False
        torch.set_num_threads(threads)
        timing.keep_freed_memory()

    def reference(self, case: BenchmarkCase, path: Path) -> None:
        """Compute torch.nn.RNN's results and write them to `path`."""
        torch.save(vars(reference.compute(case)), path)

    def load(self, case: BenchmarkCase, mode: str, path: Path) -> dict[str, Any]:
        """Get ready for bursts of a case, in place of the one before.

        Returns
        -------
        dict
            ``calls`` of a burst; or ``not_run``, a reason; or ``wrong``, what the gate says.
        """
        self._loaded = None
        gc.collect()
        reason = self._peer.missing() or self._peer.unsupported(case, mode)
        if reason:
            return {"not_run": reason}
        try:
            with torch.inference_mode(mode == "inference"):
                loaded = self._peer.load(case, mode, self._threads)
                results = loaded.results()
        except Exception as error:
            return {"not_run": without_paths(described(error))}
        numbers = reference.Reference(**torch.load(path, mmap=True))
        failure = reference.failure(self._peer, case, mode, results, numbers)
        if failure:
            return {"wrong": failure}
        self._loaded, self._mode = loaded, mode
        with torch.inference_mode(mode == "inference"):
            seconds = timing.round_of(loaded.step, 1)
            self._long = seconds > LONG
            # The search for a number of calls makes several more.
            self._calls = 1 if self._long else timing.calls_of_round(loaded.step)
        return {"calls": self._calls}

    def burst(self) -> dict[str, float]:
        """``seconds`` of a call, from one round of them."""
        assert self._loaded is not None
        with torch.inference_mode(self._mode == "inference"):
            end = perf_counter() + WARM_UP
            while not self._long and perf_counter() < end:
                self._loaded.step()
            seconds = timing.round_of(self._loaded.step, self._calls)
        rest()
        return {"seconds": seconds}

    def mean(self, seconds: float, pause: float) -> dict[str, float]:
        """``seconds`` of a call, the mean of one or more in so long, each after a pause."""
        assert self._loaded is not None
        calls, spent, end = 0, 0.0, perf_counter() + seconds
        with torch.inference_mode(self._mode == "inference"):
            while calls == 0 or perf_counter() < end:
                if pause > 0:
                    sleep(pause)
                spent += timing.round_of(self._loaded.step, 1)
                calls += 1
        return {"seconds": spent / calls}


def rest() -> None:
    """Wait until this process is idle: OpenMP's and other pools spin for a while after a call."""
    end = perf_counter() + REST_LIMIT
    while perf_counter() < end:
        wall, used = perf_counter(), process_time()
        sleep(REST_STEP)
        if process_time() - used < REST_SHARE * (perf_counter() - wall):
            return


class Worker:
    """A `Runner` in a process of its own, which is started anew after it failed."""

    def __init__(self, name: str, threads: int) -> None:
        self.name, self.threads = name, threads
        self._process: Any = None

    def ask(self, method: str, *arguments: Any, limit: float = LIMIT) -> Any:
        """Call a method of the runner.

        Raises
        ------
        TimeoutError
            After `limit` seconds.
        ChildProcessError
            If the process ends instead of answering.
        """
        if self._process is None:
            self._start()
        try:
            self._connection.send((method, arguments))
            if not self._connection.poll(limit):
                self._process.kill()
                self.close()
                raise TimeoutError(f"no answer in {limit:.0f} s")
            return self._connection.recv()
        except (EOFError, ConnectionError) as error:
            self._process.join(CLOSING)
            code = self._process.exitcode
            self.close()
            raise ChildProcessError(f"the process ended with exit code {code}") from error

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(
            target=serve, args=(other, self.name, self.threads), daemon=True
        )
        with environment(self.threads):
            self._process.start()
        other.close()

    def close(self) -> None:
        """End the process: by itself if it listens, else by force."""
        if self._process is not None:
            self._connection.close()
            self._process.join(CLOSING)
            self._process.kill()
            self._process.join(CLOSING)
            self._process = None


def serve(connection: Any, name: str, threads: int) -> None:
    """Answer a `Worker` until it is gone. Garbage is collected when a case is loaded."""
    gc.disable()
    gc.freeze()
    runner = Runner(name, threads)
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        connection.send(getattr(runner, method)(*arguments))


@contextmanager
def environment(threads: int) -> Iterator[None]:
    """Variables that a new process reads before it can be told otherwise."""
    before = dict(os.environ)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    # The pool of XLA, which JAX cannot set.
    os.environ["NPROC"] = str(threads)
    # Inductor: no processes besides this one.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
