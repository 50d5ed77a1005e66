# SPDX-License-Identifier: Apache-2.0
"""What fastrnn is compared with, besides torch.nn.RNN; every one is optional.

A new peer is a class beside the others and one entry in `PEERS`.
"""

import gc
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import gate
import report
import timing
import torch
from cases import BenchmarkCase

from .graphs import OnnxRuntime, OpenVino
from .interface import Loaded, Peer
from .jax_scan import JaxScan
from .onednn import OneDnn
from .torch_peers import (
    CompiledLoop,
    CompiledNnRnn,
    FastRnn,
    NnRnn,
    NnRnnCell,
    ScriptLoop,
)

#: By name, in the order of the table's columns.
PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        FastRnn(),
        NnRnn(),
        NnRnnCell(),
        ScriptLoop(),
        CompiledNnRnn(),
        CompiledLoop(),
        JaxScan(),
        OnnxRuntime(),
        OpenVino(),
        OneDnn(),
    )
}


class Runner:
    """One peer with so many threads: what its process does."""

    def __init__(self, name: str, threads: int) -> None:
        self._name, self._peer, self._threads = name, PEERS[name], threads
        self._loaded: Loaded | None = None
        self._calls, self._long = 1, False
        torch.set_num_threads(threads)
        timing.keep_freed_memory()

    def reference(self, case: BenchmarkCase, path: Path) -> None:
        """Compute torch.nn.RNN's results and write them to `path`."""
        torch.save(vars(gate.reference(case)), path)

    def load(self, case: BenchmarkCase, mode: str, path: Path) -> dict[str, Any]:
        """Get ready for bursts of a case, in place of the one before.

        Returns
        -------
        dict
            ``calls`` of a burst; or ``not_run``, a reason; or ``wrong``, what the gate says.
        """
        self._loaded = None
        gc.collect()
        try:
            with torch.inference_mode(mode == "inference"):
                loaded = self._peer.load(case, mode, self._threads)
                results = loaded.results()
        except Exception as error:
            return {"not_run": report.without_paths(report.described(error))}
        reference = gate.Reference(**torch.load(path, mmap=True))
        failure = gate.wrong(results, case, mode, reference, self._peer.floor_ulps(case.dtype))
        if failure:
            return {"wrong": failure}
        self._loaded, self._mode = loaded, mode
        with torch.inference_mode(mode == "inference"):
            self._long = timing.round_of(loaded.step, 1) > timing.LONG
            # The search for a number of calls makes several more.
            self._calls = 1 if self._long else timing.calls_of_round(loaded.step)
        return {"calls": self._calls}

    def burst(self) -> float:
        """Seconds of a call, from one burst of them."""
        assert self._loaded is not None
        with torch.inference_mode(self._mode == "inference"):
            return timing.burst(self._loaded.step, self._calls, warm_up=not self._long)

    def mean(self, seconds: float, pause: float) -> float:
        """Seconds of a call, the mean of one or more in so long, each after a pause."""
        assert self._loaded is not None
        calls, spent, end = 0, 0.0, perf_counter() + seconds
        with torch.inference_mode(self._mode == "inference"):
            while calls == 0 or perf_counter() < end:
                if pause > 0:
                    sleep(pause)
                spent += timing.round_of(self._loaded.step, 1)
                calls += 1
        return spent / calls

    def peak(self, case: BenchmarkCase, mode: str) -> int:
        """Bytes, as of `timing.peak`."""
        return timing.peak(case, self._name, mode)
