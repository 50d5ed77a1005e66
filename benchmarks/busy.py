# SPDX-License-Identifier: Apache-2.0
"""`python benchmarks/busy.py`: measure nn.RNN and fastrnn where threads come late: while other
processes want the cores, and in calls that are far apart, since threads without work sleep.

A number is the mean of some turns' means, not a median: a thread that comes late makes a few calls
long. Each class has a process for each number of threads, as in compare.py, and passes its gate
before.
"""

import argparse
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

import busy_table
import compare
import run
from cases import CLASSES, MODES, BenchmarkCase, by_name
from peers.worker import Worker

#: Rows or columns of a step, parts of the batch, layers: what threads share.
CASES = [by_name(name) for name in ("medium-64", "medium-128", "row-256", "row-layers")]
CASES.append(by_name("large-256"))
#: Seconds of calls in a turn, and turns of each process.
SECONDS, QUICK_SECONDS = 1.0, 0.01
TURNS = 3
#: Seconds of rest before each of the calls that are far apart.
PAUSE = 0.03


def main(argv: list[str] | None = None) -> int:
    """Measure, write, print the table.

    Parameters
    ----------
    argv : list of str, optional
        Arguments, in place of the command line's.

    Returns
    -------
    int
        0.
    """
    args = compare.parse_fixed(argv, "Measure nn.RNN and fastrnn on busy cores.")
    report = describe(args)
    path = args.output or compare.default_path(report, args)
    workers = [Worker(name, threads) for name in CLASSES for threads in report["threads"]]
    try:
        with tempfile.TemporaryDirectory() as folder:
            reference = Path(folder) / "reference"
            for case in CASES:
                workers[0].ask("reference", case, reference)
                entry: dict[str, Any] = {"spec": case.spec(), "modes": {}}
                report["cases"].append(entry)
                for mode in MODES:
                    entry["modes"][mode] = measure(case, mode, workers, reference, report)
                    print(f"{case.name} {mode}", file=sys.stderr, flush=True)
    finally:
        for worker in workers:
            worker.close()
    report["complete"] = not args.part
    run.write(path, report)
    print(busy_table.render(report))
    print(f"written to {path.name}", file=sys.stderr)
    return 0


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """The report without its cases, as of run.py."""
    report = run.describe(args.quick)
    report["threads"] = sorted({1, args.threads})
    report["busy"] = sorted({0, 1, args.threads})
    report["settings"] = {
        "quick": args.quick,
        "seconds": QUICK_SECONDS if args.quick else SECONDS,
        "turns": TURNS,
        "pause": PAUSE,
    }
    cases = report.pop("cases")  # stay last
    return {"study": "busy", **report, "cases": cases}


def measure(
    case: BenchmarkCase, mode: str, workers: list[Any], reference: Path, report: dict[str, Any]
) -> list[dict[str, Any]]:
    """The mean time of a call of each worker beside each number of busy processes, and after rests.

    Raises
    ------
    ValueError
        If the results of a class are wrong.
    """
    for worker in workers:
        loaded = worker.ask("load", case, mode, reference)
        if "calls" not in loaded:
            raise ValueError(f"{worker.name}, {case.name}, {mode}: {loaded}")
    order, results = random.Random(0), []
    for count, pause in [*((count, 0.0) for count in report["busy"]), (0, PAUSE)]:
        times: dict[Any, list[float]] = {worker: [] for worker in workers}
        with busy_processes(count):
            for _ in range(TURNS):
                for worker in order.sample(workers, len(workers)):
                    answer = worker.ask("mean", report["settings"]["seconds"], pause)
                    times[worker].append(answer["seconds"])
        results += [
            {
                "busy": count,
                "pause": pause,
                "peer": worker.name,
                "threads": worker.threads,
                "us": round(1e6 * mean(of_worker), 2),
            }
            for worker, of_worker in times.items()
        ]
    return results


@contextmanager
def busy_processes(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Keep so many cores busy."""
    code = "print(flush=True)\nwhile True: pass"
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(count)]
    try:
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


if __name__ == "__main__":
    sys.exit(main())
