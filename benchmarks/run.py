# SPDX-License-Identifier: Apache-2.0
"""`python benchmarks/run.py STUDY`: measure on this CPU, and keep the results as JSON.

The studies are

- ``bench``: fastrnn and nn.RNN, time and memory, with all threads;
- ``peers``: fastrnn, nn.RNN and every installed peer, with one thread and with all;
- ``scaling``: the time of a call against T, B, H, the layers and the threads;
- ``busy``: fastrnn and nn.RNN where threads come late: while other processes want the cores, and in
  calls that are far apart, since threads without work sleep.

Each peer has a process for each number of threads. For a case and a mode every process loads it and
passes the gate; then they make bursts of calls in turns, in a new random order each round. ``busy``
has means in place of medians: a thread that comes late makes a few calls long.

After each mode the results are written beside the file, to a name that ends in .unfinished, and
replace it after the last one: a stop loses neither.
"""

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import report
import table
import timing
import torch
from cases import BUSY, CASES, CLASSES, MODES, SCALING, BenchmarkCase
from peers import PEERS
from peers.interface import version
from worker import Worker

#: The peer that the others are divided by.
BASE = "fastrnn"
CORES = torch.get_num_threads()
#: ``busy``: turns of each process, and seconds of rest before each of the calls that are far apart.
TURNS, PAUSE = 3, 0.03


@dataclass(frozen=True)
class Study:
    """What is measured if the command line does not say otherwise.

    `seconds`, of a quick run `quick_seconds`: for each case and mode; in ``busy`` for each turn.
    """

    cases: list[BenchmarkCase]
    peers: list[str]
    threads: list[int]
    seconds: float
    quick_seconds: float


STUDIES = {
    "bench": Study(CASES, [*CLASSES], [CORES], 5.0, 0.2),
    "peers": Study(CASES, [*PEERS], sorted({1, CORES}), 5.0, 0.5),
    "scaling": Study(
        SCALING,
        ["fastrnn", "nn_rnn", "jax_scan", "onednn"],
        sorted({CORES, *(2**i for i in range(CORES.bit_length()) if 2**i <= CORES)}),
        5.0,
        0.5,
    ),
    "busy": Study(BUSY, [*CLASSES], sorted({1, CORES}), 1.0, 0.01),
}


def start(name: str, threads: int) -> Worker:
    """The process of a peer."""
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "NPROC": str(threads),  # the pool of XLA, which JAX cannot set
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # no processes besides this one
        "KINETO_LOG_LEVEL": "99",  # the profiler is silent
    }
    return Worker("peers:Runner", name, threads, environment=environment)


def main(argv: list[str] | None = None) -> int:
    """Measure, write, print the table.

    Parameters
    ----------
    argv : list of str, optional
        Arguments, in place of the command line's.

    Returns
    -------
    int
        0; 1 if results were wrong; 2 if the arguments select nothing.
    """
    args = parse(argv)
    cases = [case for case in STUDIES[args.study].cases if args.only in case.name]
    if not cases:
        print(f"no case has {args.only!r} in its name", file=sys.stderr)
        return 2
    found = describe(args)
    path = args.output or report.default_path(found, args.part)
    sweep(found, cases, args, path)
    print(table.render(found))
    print(f"written to {path.name}", file=sys.stderr)
    return 1 if any("wrong" in m for case in found["cases"] for m in case["modes"].values()) else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Measure fastrnn and others on this CPU.")
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, rougher numbers")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="cases with this name")
    parser.add_argument("--peers", type=names, metavar="A,B",
                        help=f"of {', '.join(PEERS)}; {BASE} always")  # fmt: skip
    parser.add_argument("--threads", type=numbers, metavar="N,M")
    parser.add_argument("--seconds", type=float, metavar="S", help="for each case and mode")
    parser.add_argument("--output", type=Path, metavar="PATH", help="JSON file to write")
    args = parser.parse_args(argv)
    study = STUDIES[args.study]
    args.part = bool(args.quick or args.only or args.peers)
    args.peers = args.peers or study.peers
    args.threads = args.threads or study.threads
    if args.study == "bench" and len(args.threads) > 1:
        parser.error("bench takes one number of threads")
    if args.seconds is None:
        args.seconds = study.quick_seconds if args.quick else study.seconds
    return args


def names(text: str) -> list[str]:
    """The peers of an argument, in the order of `PEERS`."""
    asked = {BASE, *text.split(",")}
    if asked - PEERS.keys():
        raise argparse.ArgumentTypeError(f"no peer {', '.join(sorted(asked - PEERS.keys()))}")
    return [name for name in PEERS if name in asked]


def numbers(text: str) -> list[int]:
    """The numbers of an argument, ascending."""
    return sorted({int(number) for number in text.split(",")})


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """The report without its cases."""
    settings = {name: getattr(args, name) for name in ("quick", "only", "peers", "seconds")}
    if args.study == "busy":
        settings |= {"turns": TURNS, "pause": PAUSE, "busy": sorted({0, *args.threads})}
    else:
        settings |= {"round_seconds": timing.ROUND, "min_rounds": timing.MIN_ROUNDS}
    found = report.describe(args.study, args.threads, settings)
    packages = sorted({package for name in args.peers for package in PEERS[name].packages})
    found["versions"] |= {package: version(package) for package in packages}
    missing = {name: reason for name in args.peers if (reason := PEERS[name].missing())}
    return {**found, "not_installed": missing, "cases": []}


def sweep(
    found: dict[str, Any], cases: list[BenchmarkCase], args: argparse.Namespace, path: Path
) -> None:
    """Measure the cases into the report, and write it as it grows."""
    present = [name for name in args.peers if name not in found["not_installed"]]
    whos = [(name, count) for name in present for count in args.threads]
    workers = {f"{name}@{count}": start(name, count) for name, count in whos}
    # In processes of their own, which only bench asks: the profiler may leave something behind.
    memory = {f"{name}@{count}": start(name, count) for name, count in whos}
    try:
        with tempfile.TemporaryDirectory() as folder:
            for number, case in enumerate(cases, 1):
                entry: dict[str, Any] = {"spec": case.spec(), "modes": {}}
                found["cases"].append(entry)
                reference = Path(folder) / "reference"
                [*workers.values()][-1].ask("reference", case, reference)
                for mode in MODES:
                    of_mode = measure(case, mode, workers, reference, args)
                    if args.study == "bench":
                        of_mode["peak_bytes"] = {
                            who: memory[who].ask("peak", case, mode) for who in of_mode["us"]
                        }
                    entry["modes"][mode] = of_mode
                    last = number == len(cases) and mode == MODES[-1]
                    found["complete"] = last and not args.part
                    report.write(path, found, done=last)
                    progress = f"{number}/{len(cases)} {case.name} {mode}:"
                    print(progress, said(of_mode), file=sys.stderr, flush=True)
    finally:
        for worker in [*workers.values(), *memory.values()]:
            worker.close()


def measure(
    case: BenchmarkCase,
    mode: str,
    workers: dict[str, Any],
    reference: Path,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """All of one mode: the numbers of each worker, or why there are none.

    Returns
    -------
    dict
        ``not_run`` and ``wrong`` with reasons, where there are any; else as of the study.
    """
    found: dict[str, Any] = {}
    ready = {}
    for who, worker in workers.items():
        name = who.split("@")[0]
        reason = PEERS[name].unsupported(case, mode)
        answer = {"not_run": reason} if reason else asked(worker, "load", case, mode, reference)
        if "calls" in answer:
            ready[who] = worker
        for kind, text in answer.items():
            if kind in ("not_run", "wrong"):
                found.setdefault(kind, {})[name if reason else who] = text
    if args.study == "busy":
        return found | late(ready, args)
    rounds, failed = in_turns(ready, args.seconds)
    if failed:
        found.setdefault("not_run", {}).update(failed)
    return found | summary(rounds)


def asked(worker: Any, method: str, *arguments: Any) -> dict[str, Any]:
    """The answer of a worker; a process that fails has not run."""
    try:
        answer: dict[str, Any] = worker.ask(method, *arguments)
        return answer
    except (TimeoutError, ChildProcessError) as error:
        return {"not_run": report.described(error)}


def in_turns(
    workers: dict[str, Any], seconds: float
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of a call of each worker in each round, and why a worker has none: it failed."""
    order = random.Random(0)
    rounds: dict[str, list[float]] = {who: [] for who in workers}
    failed: dict[str, str] = {}
    end = perf_counter() + seconds
    done = 0
    while rounds and (done < timing.MIN_ROUNDS or perf_counter() < end):
        for who in order.sample([*rounds], len(rounds)):
            try:
                rounds[who].append(workers[who].ask("burst"))
            except (TimeoutError, ChildProcessError) as error:
                failed[who] = report.described(error)
                del rounds[who]
        done += 1
    return rounds, failed


def summary(rounds: dict[str, list[float]]) -> dict[str, Any]:
    """What is kept of the rounds.

    Returns
    -------
    dict
        The number of ``rounds``; ``us``: the median time of a call of each worker, in microseconds;
        ``fastest``: which workers of fastrnn, of nn.RNN and of all peers are; ``ratio``: how many
        times as long as fastrnn the latter two take in a round, the median and both quartiles.
    """
    medians = {who: statistics.median(times) for who, times in rounds.items()}
    groups = {
        BASE: [who for who in rounds if who.startswith(f"{BASE}@")],
        "nn_rnn": [who for who in rounds if who.startswith("nn_rnn@")],
        "peer": [who for who in rounds if not who.startswith(f"{BASE}@")],
    }
    fastest = {name: min(of_group, key=medians.__getitem__) for name, of_group in groups.items()
               if of_group}  # fmt: skip
    ratio = {
        name: timing.median(timing.ratios(rounds[who], rounds[fastest[BASE]]))
        for name, who in fastest.items()
        if name != BASE and BASE in fastest
    }
    return {
        "rounds": max(map(len, rounds.values()), default=0),
        "us": {who: round(1e6 * time, 2) for who, time in medians.items()},
        "fastest": fastest,
        "ratio": ratio,
    }


def late(workers: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Microseconds of a call of each worker: ``us`` beside each number of busy processes, and in
    calls that are far apart."""
    order, found = random.Random(0), {}
    counts = {str(count): (count, 0.0) for count in sorted({0, *args.threads})}
    for name, (count, pause) in {**counts, "apart": (0, PAUSE)}.items():
        times: dict[str, list[float]] = {who: [] for who in workers}
        with busy_processes(count):
            for _ in range(TURNS):
                for who in order.sample([*workers], len(workers)):
                    times[who].append(workers[who].ask("mean", args.seconds, pause))
        found[name] = {who: round(1e6 * statistics.mean(each), 2) for who, each in times.items()}
    return {"us": found}


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


def said(mode: dict[str, Any]) -> str:
    """One line about a finished mode."""
    words = []
    if BASE in mode.get("fastest", {}):
        words.append(f"{mode['us'][mode['fastest'][BASE]]:.1f} us")
        others = {mode["fastest"][name]: r[0] for name, r in mode["ratio"].items()}
        words += [f"{who} {ratio:.2f}x" for who, ratio in others.items()]
    return ", ".join([*words, *(f"WRONG: {who}" for who in mode.get("wrong", {}))])


if __name__ == "__main__":
    sys.exit(main())
