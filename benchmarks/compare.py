# SPDX-License-Identifier: Apache-2.0
"""`python benchmarks/compare.py`: measure fastrnn and every installed peer on this CPU.

Each peer has a process for each number of threads. For a case and a mode every process loads it and
passes the gate; then they make bursts of calls in turns, in a new random order each round. After
each mode the results are written beside the file, as run.py does after each case.
"""

import argparse
import random
import statistics
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import peers_table
import run
import table
import timing
import torch
from cases import CASES, MODES, BenchmarkCase
from peers import PEERS
from peers.interface import version
from peers.worker import Worker

#: Seconds of bursts for each case and mode, and rounds that are made however long they take.
SECONDS, QUICK_SECONDS = 5.0, 0.5
MIN_ROUNDS = 5
#: The class that the others are divided by.
BASE = "fastrnn"


def main(argv: list[str] | None = None) -> int:
    """Measure, write, print the table.

    Parameters
    ----------
    argv : list of str, optional
        Arguments, in place of the command line's.

    Returns
    -------
    int
        0; 1 if a peer's results were wrong; 2 if the arguments select nothing.
    """
    cores = torch.get_num_threads()
    return study("peers", CASES, argv, list(PEERS), sorted({1, cores}))


def study(
    name: str,
    cases: list[BenchmarkCase],
    argv: list[str] | None,
    peers: list[str],
    threads: list[int],
) -> int:
    """As `main`, with the name of the results, the cases and what is measured by default."""
    args = parse(argv, peers, threads)
    cases = [case for case in cases if args.only in case.name]
    if not cases:
        print(f"no case has {args.only!r} in its name", file=sys.stderr)
        return 2
    report = describe(args, name)
    path = args.output or default_path(report, args)
    sweep(report, cases, args, path)
    print(peers_table.render(report))
    print(f"written to {path.name}", file=sys.stderr)
    return 1 if any("wrong" in each for each in results_of(report)) else 0


def parse(argv: list[str] | None, peers: list[str], threads: list[int]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Measure fastrnn and other runtimes in turns.")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, rougher numbers")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="cases with this name")
    parser.add_argument("--peers", type=names, default=peers, metavar="A,B",
                        help=f"of {', '.join(PEERS)}; {BASE} always")  # fmt: skip
    parser.add_argument("--threads", type=numbers, default=threads, metavar="N,M")
    parser.add_argument("--seconds", type=float, metavar="S", help="for each case and mode")
    parser.add_argument("--output", type=Path, metavar="PATH", help="JSON file to write")
    args = parser.parse_args(argv)
    args.part = bool(args.quick or args.only or args.peers != peers)
    if args.seconds is None:
        args.seconds = QUICK_SECONDS if args.quick else SECONDS
    return args


def parse_fixed(argv: list[str] | None, description: str) -> argparse.Namespace:
    """Read the command line of a study that measures the same with one thread and with all."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer repeats, rougher numbers")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N")
    parser.add_argument("--output", type=Path, metavar="PATH", help="JSON file to write")
    args = parser.parse_args(argv)
    args.part = args.quick
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


def describe(args: argparse.Namespace, study: str) -> dict[str, Any]:
    """The report without its cases: as of run.py, and what else was running."""
    report = run.describe(args.quick, args.only)
    packages = sorted({package for name in args.peers for package in PEERS[name].packages})
    report["versions"] |= {package: version(package) for package in packages}
    report["threads"] = args.threads
    report["settings"] = {
        **{name: getattr(args, name) for name in ("quick", "only", "peers", "seconds")},
        "round_seconds": timing.ROUND,
        "min_rounds": MIN_ROUNDS,
    }
    # Cases stay last.
    return {"study": study, **report, "cases": report["cases"]}


def default_path(report: dict[str, Any], args: argparse.Namespace) -> Path:
    """The file for this machine and day; another one if not everything is measured."""
    threads = "-".join(map(str, report["threads"]))
    name = f"{report['study']} {report['machine']['cpu']} {threads} threads {report['date'][:10]}"
    return table.RESULTS / run.file_name(name, args.part)


def sweep(
    report: dict[str, Any], cases: list[BenchmarkCase], args: argparse.Namespace, path: Path
) -> None:
    """Measure the cases into the report, and write it as it grows."""
    present = [name for name in args.peers if PEERS[name].missing() is None]
    report["not_installed"] = {
        name: PEERS[name].missing() for name in args.peers if name not in present
    }
    workers = [Worker(name, threads) for name in present for threads in args.threads]
    try:
        with tempfile.TemporaryDirectory() as folder:
            for number, case in enumerate(cases, 1):
                entry: dict[str, Any] = {"spec": case.spec(), "modes": {}}
                report["cases"].append(entry)
                reference = Path(folder) / "reference"
                workers[-1].ask("reference", case, reference)
                for mode in MODES:
                    entry["modes"][mode] = measure(case, mode, workers, reference, args.seconds)
                    last = number == len(cases) and mode == MODES[-1]
                    report["complete"] = last and not args.part
                    run.write(path, report, done=last)
                    progress = f"{number}/{len(cases)} {case.name} {mode}"
                    print(progress, said(entry["modes"][mode]), file=sys.stderr, flush=True)
    finally:
        for worker in workers:
            worker.close()


def measure(
    case: BenchmarkCase, mode: str, workers: list[Any], reference: Path, seconds: float
) -> dict[str, Any]:
    """All of one mode: the numbers of each worker, or why there are none, and the best peer."""
    results, ready = [], []
    began = perf_counter()
    for worker in workers:
        result = {"peer": worker.name, "threads": worker.threads}
        result |= asked(worker, "load", case, mode, reference)
        results.append(result)
        if "calls" in result:
            ready.append((worker, result))
    loaded = perf_counter()
    rounds = in_turns(ready, seconds)
    times = {}
    for (worker, result), of_worker in zip(ready, rounds, strict=True):
        if "not_run" not in result:
            times[worker.name, worker.threads] = of_worker
            result |= quartiles("us", [1e6 * time for time in of_worker])
    for result in results:
        key, base = (result["peer"], result["threads"]), (BASE, result["threads"])
        if key in times and base in times and key != base:
            result |= quartiles("ratio", ratios(times[key], times[base]))
    return {
        "rounds": len(rounds[0]) if rounds else 0,
        "load_seconds": round(loaded - began, 1),
        "seconds": round(perf_counter() - loaded, 1),
        "results": results,
        "best": best(times),
    }


def in_turns(ready: list[tuple[Any, dict[str, Any]]], seconds: float) -> list[list[float]]:
    """Seconds of a call of each worker in each round; one that fails has no further rounds."""
    order = random.Random(0)
    rounds: list[list[float]] = [[] for _ in ready]
    end = perf_counter() + seconds
    done = 0
    while done < MIN_ROUNDS or perf_counter() < end:
        for place in order.sample(range(len(ready)), len(ready)):
            worker, result = ready[place]
            if "not_run" not in result:
                answer = asked(worker, "burst")
                result |= {k: v for k, v in answer.items() if k != "seconds"}
                rounds[place].append(answer.get("seconds", 0.0))
        done += 1
    return rounds


def asked(worker: Any, method: str, *arguments: Any) -> dict[str, Any]:
    """The answer of a worker; a process that fails has not run."""
    try:
        answer: dict[str, Any] = worker.ask(method, *arguments)
        return answer
    except (TimeoutError, ChildProcessError) as error:
        return {"not_run": run.described(error)}


def best(times: dict[tuple[str, int], list[float]]) -> dict[str, Any]:
    """fastrnn with its best number of threads against nn.RNN and the best peer with theirs."""
    medians = {key: statistics.median(of_key) for key, of_key in times.items()}
    ours = [key for key in medians if key[0] == BASE]
    found: dict[str, Any] = {}
    if not ours:
        return found
    base = min(ours, key=medians.__getitem__)
    found[BASE] = {"threads": base[1], "us": round(1e6 * medians[base], 2)}
    everyone = [key for key in medians if key[0] != BASE]
    for label, keys in (
        ("nn_rnn", [key for key in everyone if key[0] == "nn_rnn"]),
        ("peer", everyone),
    ):
        if keys:
            name, threads = key = min(keys, key=medians.__getitem__)
            found[label] = {"name": name, "threads": threads, "us": round(1e6 * medians[key], 2)}
            found[label] |= quartiles("ratio", ratios(times[key], times[base]))
    return found


def ratios(times: list[float], base: list[float]) -> list[float]:
    """Round by round: how many times as long."""
    return [a / b for a, b in zip(times, base, strict=True)]


def quartiles(name: str, values: list[float]) -> dict[str, Any]:
    """The median under this name and both quartiles, to be written."""
    lower, middle, upper = statistics.quantiles(values, n=4, method="inclusive")
    digits = 2 if name == "us" else 3
    return {
        name: round(middle, digits),
        f"{name}_quartiles": [round(lower, digits), round(upper, digits)],
    }


def results_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Every worker's result in every case and mode."""
    modes = [mode for case in report["cases"] for mode in case["modes"].values()]
    return [result for mode in modes for result in mode["results"]]


def said(mode: dict[str, Any]) -> str:
    """One line about a finished mode."""
    found = mode["best"]
    words = [f"{found[BASE]['us']:.1f} us"] if BASE in found else [f"no {BASE}"]
    for label in ("nn_rnn", "peer"):
        if label in found:
            words.append(f"{found[label]['name']} {found[label]['ratio']:.2f}x")
    words += [f"WRONG: {r['peer']}@{r['threads']}" for r in mode["results"] if "wrong" in r]
    words.append(f"{mode['rounds']} rounds, {mode['load_seconds']:.0f}+{mode['seconds']:.0f} s")
    return ", ".join(words)


if __name__ == "__main__":
    sys.exit(main())
