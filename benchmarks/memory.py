# SPDX-License-Identifier: Apache-2.0
"""`python benchmarks/memory.py CASE CLASS MODE`: peak memory of one call, in bytes.

What PyTorch's allocator hands out during the call, less what it gets back, at its highest: weights,
input and the output's gradient are there before and do not count, the results and the gradients of
the weights do. A process measures one class in one mode, so that none inherits from another.
"""

import argparse
import gc
import os
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import torch
from cases import CASES, CLASSES, MODES, BenchmarkCase, by_name
from torch.profiler import ProfilerActivity, profile

import fastrnn


def peak(case: BenchmarkCase, class_name: str, mode: str) -> int:
    """Measure one call in this process, after one that warms up.

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


def peak_in_own_process(case: BenchmarkCase, class_name: str, mode: str) -> int:
    """As `peak`, in a new process with as many threads and the same fastrnn.

    Raises
    ------
    subprocess.CalledProcessError
        If that process fails; its standard error is in it.
    """
    command = [sys.executable, __file__, case.name, class_name, mode]
    # The profiler logs on standard error.
    process = subprocess.run(command, env=environment(), check=True, capture_output=True, text=True)
    return int(process.stdout)


def environment() -> dict[str, str]:
    """The environment in which a new process has as many threads and finds the same fastrnn."""
    paths = [str(Path(fastrnn.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }


def main(argv: list[str] | None = None) -> int:
    """Print the peak of the call that the arguments name."""
    parser = argparse.ArgumentParser(description="Peak memory of one call, in bytes.")
    parser.add_argument("case", choices=[case.name for case in CASES])
    parser.add_argument("cls", metavar="class", choices=list(CLASSES))
    parser.add_argument("mode", choices=MODES)
    args = parser.parse_args(argv)
    print(peak(by_name(args.case), args.cls, args.mode))
    return 0


if __name__ == "__main__":
    sys.exit(main())
