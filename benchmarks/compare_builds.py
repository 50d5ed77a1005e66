# SPDX-License-Identifier: Apache-2.0
"""`python benchmarks/compare_builds.py OLD NEW`: has a change of the extension made it slower?

OLD and NEW are two checkouts, each with its extension built in place. Each has one process. For a
case, a mode and a number of threads, first the results of both pass the gate; then the two make
short bursts of calls in turns, old, new, new, old, so that whatever drifts meets both alike. Two
neighbouring bursts give a ratio, old time / new time: above 1 the new build is faster. A number of
the report is the median of these. Peak memory is measured at the end.

The rule: a geometric mean of at least `MEAN` in each mode and number of threads, no case below
`CASE` (below `STACK`, if it is a stack of layers with one sequence), and no peak of memory in
training above `MEMORY` of the old one. A case that seems slower is measured again, for longer
and in new processes, before it is called so. The exit status is 1 if the rule is broken or results
are wrong.
"""

import argparse
import gc
import statistics
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from statistics import geometric_mean
from time import perf_counter
from typing import Any

import gate
import timing
import torch
from cases import CASES, MODES, BenchmarkCase, from_spec, parse_shape
from report import commit, default_path, described, write
from report import describe as describe_run
from run import numbers
from table import duration, extras, markdown, shape
from worker import Worker

import fastrnn

#: The rule. Times: old / new; memory: new / old.
MEAN, CASE, STACK, MEMORY = 0.98, 0.90, 0.80, 1.05
#: Seconds for each case, mode and number of threads; rounds that are made however long they take.
SECONDS, QUICK_SECONDS, MIN_ROUNDS, QUICK_ROUNDS = 4.0, 0.4, 3, 1
#: So many new pairs of processes decide where a case seems slower.
AGAIN = 3
#: Seconds of a burst, and its calls at least; a call of more than `LONG` seconds is a burst alone.
BURST, MIN_CALLS, LONG = 0.025, 3, 0.3
#: Rows of the table of worst cases.
WORST = 12
BUILDS = ("old", "new")


class Runner:
    """What the process of a build does; the folder of the build is first on its path."""

    def __init__(self, folder: str) -> None:
        for module in (fastrnn, import_module("fastrnn._C")):
            if Path(str(module.__file__)).resolve().parent != Path(folder) / "fastrnn":
                raise ImportError(f"{module.__file__} is not of the build in {folder}")
        timing.keep_freed_memory()

    def results(self, case: BenchmarkCase, threads: int, path: Path) -> None:
        """Write all that the measured calls compute to `path`."""
        self._step = None
        torch.set_num_threads(threads)
        torch.save(gate.results(case.module(fastrnn.RNN, case.dtype), case), path)

    def load(self, case: BenchmarkCase, mode: str, threads: int) -> float:
        """Get ready for bursts of a case; the seconds of a call, roughly."""
        self._step = None
        gc.collect()
        torch.set_num_threads(threads)
        self._mode, self._step = mode, case.step("fastrnn", mode)
        with torch.inference_mode(mode == "inference"):
            # The least of some: what else runs here makes a time longer, never shorter.
            seconds = min(timing.round_of(self._step, 1) for _ in range(2))
            self._warm_up = seconds < LONG
            if self._warm_up:
                calls = timing.calls_of_round(self._step)
                seconds = min(timing.round_of(self._step, calls) for _ in range(3))
        timing.rest()
        return seconds

    def burst(self, calls: int) -> float:
        """Seconds of a call."""
        assert self._step is not None
        with torch.inference_mode(self._mode == "inference"):
            return timing.burst(self._step, calls, self._warm_up)

    def peak(self, case: BenchmarkCase) -> int:
        """Peak memory of a call in training, in bytes."""
        self._step = None
        gc.collect()
        torch.set_num_threads(1)
        return timing.peak(case, "fastrnn", "training")


def main(argv: list[str] | None = None) -> int:
    """Measure, write, print the tables.

    Parameters
    ----------
    argv : list of str, optional
        Arguments, in place of the command line's.

    Returns
    -------
    int
        0; 1 if the rule is broken or results are wrong; 2 if the arguments select nothing.
    """
    args = parse(argv)
    cases = args.shapes or [case for case in CASES if args.only in case.name]
    if not cases:
        print(f"no case has {args.only!r} in its name", file=sys.stderr)
        return 2
    report = describe(args)
    path = args.output or default_path(report, args.part)
    workers = {
        build: Worker(
            "compare_builds:Runner",
            str(folder),
            environment={
                "PYTHONPATH": str(folder),
                "OMP_NUM_THREADS": str(max(args.threads)),
                "KINETO_LOG_LEVEL": "99",  # the profiler is silent
            },
        )
        for build, folder in zip(BUILDS, (args.old, args.new), strict=True)
    }
    before = torch.get_num_threads()
    # For nn.RNN's results, here: on busy cores it stalls with more.
    torch.set_num_threads(1)
    try:
        sweep(report, cases, workers, args)
    finally:
        torch.set_num_threads(before)
        for worker in workers.values():
            worker.close()
    report["failures"] = failures(report)
    report["complete"] = not args.part
    print(render(report))
    write(path, report)
    print(f"written to {path.name}", file=sys.stderr)
    return 1 if report["failures"] else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    cores = torch.get_num_threads()
    parser = argparse.ArgumentParser(description="Compare two builds of the extension.")
    parser.add_argument("old", type=folder_of_build, help="a checkout, built in place")
    parser.add_argument("new", type=folder_of_build, help="another one")
    parser.add_argument("--quick", action="store_true", help="few rounds, rough numbers")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="cases with this name")
    parser.add_argument("--shapes", type=parse_shape, nargs="+", metavar="T,B,I,H[,KEY=VALUE...]",
                        help="these in place of the registry's cases")  # fmt: skip
    parser.add_argument("--modes", type=modes, default=list(MODES), metavar="A,B")
    parser.add_argument("--threads", type=numbers, default=sorted({1, cores}), metavar="N,M")
    parser.add_argument("--seconds", type=float, metavar="S", help="for each ratio")
    parser.add_argument("--rounds", type=int, metavar="N", help="at least, for each ratio")
    parser.add_argument("--no-memory", action="store_true", help="only times")
    parser.add_argument("--output", type=Path, metavar="PATH", help="JSON file to write")
    args = parser.parse_args(argv)
    args.part = bool(args.quick or args.only or args.shapes or args.modes != list(MODES))
    args.part = args.part or args.no_memory
    if args.seconds is None:
        args.seconds = QUICK_SECONDS if args.quick else SECONDS
    if args.rounds is None:
        args.rounds = QUICK_ROUNDS if args.quick else MIN_ROUNDS
    return args


def folder_of_build(text: str) -> Path:
    """A checkout with an extension."""
    folder = Path(text).resolve()
    if not list((folder / "fastrnn").glob("_C*.so")):
        raise argparse.ArgumentTypeError(f"{text} has no fastrnn/_C*.so")
    return folder


def modes(text: str) -> list[str]:
    """The modes of an argument, in the order of `MODES`."""
    if set(text.split(",")) - set(MODES):
        raise argparse.ArgumentTypeError(f"modes are {', '.join(MODES)}")
    return [mode for mode in MODES if mode in text.split(",")]


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """The report without its cases."""
    names = ("quick", "only", "modes", "seconds", "rounds")
    settings = {**{name: getattr(args, name) for name in names}, "burst_seconds": BURST}
    report = describe_run("builds", args.threads, settings)
    # Those of this checkout, which may be neither build.
    del report["commit"], report["machine"]["build"]
    return {**report, "commits": {b: commit(getattr(args, b)) for b in BUILDS}, "cases": []}


def sweep(
    report: dict[str, Any],
    cases: list[BenchmarkCase],
    workers: dict[str, Any],
    args: argparse.Namespace,
) -> None:
    """Measure the cases into the report."""
    for number, case in enumerate(cases, 1):
        began = perf_counter()
        entry: dict[str, Any] = {"spec": case.spec(), "times": []}
        report["cases"].append(entry)
        try:
            entry["gate"], entry["same_bits"] = compared(case, workers, args.threads)
            if entry["gate"] is None:
                for threads in args.threads:
                    for mode in args.modes:
                        timed = measure(case, mode, threads, workers, args)
                        entry["times"].append({"mode": mode, "threads": threads, **timed})
        except (TimeoutError, ChildProcessError) as error:
            entry["gate"] = described(error)
        took = f"{perf_counter() - began:.0f} s"
        print(f"{number}/{len(cases)} {said(entry)}, {took}", file=sys.stderr, flush=True)
    # Last: the profiler may leave something behind.
    for case, entry in zip(cases, report["cases"], strict=True):
        if entry["gate"] is not None or args.no_memory:
            continue
        try:
            entry |= memory_of(case, workers)
        except (TimeoutError, ChildProcessError) as error:
            entry["gate"] = described(error)


def compared(
    case: BenchmarkCase, workers: dict[str, Any], threads: list[int]
) -> tuple[str | None, bool]:
    """What is wrong with the results of a build, None if nothing is; whether both have equal bits.

    Each build is held against torch.nn.RNN, and the new one against the old one, by the gate.
    """
    module = case.module(torch.nn.RNN, case.dtype)
    theirs, exact = gate.results(module, case), gate.results(module.double(), case)
    timing.rest()
    same = True
    with tempfile.TemporaryDirectory() as folder:
        for count in threads:
            found = {}
            for build, worker in workers.items():
                path = Path(folder) / build
                worker.ask("results", case, count, path)
                found[build] = torch.load(path)
            for build, against in (("old", theirs), ("new", theirs), ("new", found["old"])):
                try:
                    gate.assert_right(found[build], against, exact, case)
                except AssertionError as error:
                    whom = "nn.RNN" if against is theirs else "old"
                    return f"{build} against {whom}, threads {count}: {error}", False
            same = same and all(torch.equal(t, found["new"][n]) for n, t in found["old"].items())
    return None, same


def measure(
    case: BenchmarkCase,
    mode: str,
    threads: int,
    workers: dict[str, Any],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """The times of both builds and their ratio.

    If the new build seems slower, new processes decide: where memory lies in one is chance, and
    may cost some per cent.
    """

    def times() -> list[tuple[float, float]]:
        seconds = min(worker.ask("load", case, mode, threads) for worker in workers.values())
        calls = calls_of_burst(seconds)
        return pairs(lambda build: workers[build].ask("burst", calls), args.seconds, args.rounds)

    found = summary(times())
    if found["ratio"][0] >= allowed(case):
        return found
    more: list[tuple[float, float]] = []
    for _ in range(AGAIN):
        for worker in workers.values():
            worker.close()
        more += times()
    return {**summary(more), "first_ratio": found["ratio"][0]}


def calls_of_burst(seconds: float) -> int:
    """So many calls of so many seconds make a burst."""
    if seconds > LONG:
        return 1
    return max(MIN_CALLS, round(BURST / seconds))


def pairs(burst: Callable[[str], float], seconds: float, rounds: int) -> list[tuple[float, float]]:
    """Times of a call, (old, new), measured in turns: old, new, new, old."""
    made: list[tuple[float, float]] = []
    end = perf_counter() + seconds
    while len(made) < 2 * rounds or perf_counter() < end:
        first, second, third, fourth = map(burst, ("old", "new", "new", "old"))
        made += [(first, second), (fourth, third)]
    return made


def summary(times: list[tuple[float, float]]) -> dict[str, Any]:
    """Median times of both builds; ``ratio``: of the ratios of pairs, median and quartiles."""
    old, new = ([1e6 * pair[place] for pair in times] for place in (0, 1))
    return {
        "old_us": round(statistics.median(old), 2),
        "new_us": round(statistics.median(new), 2),
        "ratio": timing.median(timing.ratios(old, new)),
        "pairs": len(times),
    }


def memory_of(case: BenchmarkCase, workers: dict[str, Any]) -> dict[str, Any]:
    """The peaks of both builds in training, and their ratio.

    With one thread: the profiler sees what the calling thread allocates, and no other.
    """
    peaks = {build: worker.ask("peak", case) for build, worker in workers.items()}
    return {"peak_bytes": peaks, "memory": round(peaks["new"] / peaks["old"], 3)}


def allowed(case: BenchmarkCase) -> float:
    """The least ratio that a case may have."""
    return STACK if case.num_layers > 1 and case.B == 1 else CASE


def means(report: dict[str, Any]) -> dict[tuple[str, int], float]:
    """The geometric mean of the ratios in each mode and number of threads."""
    ratios: dict[tuple[str, int], list[float]] = {}
    for entry in report["cases"]:
        for timed in entry["times"]:
            ratios.setdefault((timed["mode"], timed["threads"]), []).append(timed["ratio"][0])
    return {key: geometric_mean(of_key) for key, of_key in ratios.items()}


def failures(report: dict[str, Any]) -> list[str]:
    """Every place where the rule is broken or results are wrong."""
    found = []
    for (mode, threads), mean in means(report).items():
        if mean < MEAN:
            found.append(f"{mode} @{threads}: geometric mean {mean:.3f}, allowed {MEAN:.2f}")
    for entry in report["cases"]:
        name, least = entry["spec"]["name"], allowed(from_spec(entry["spec"]))
        if entry["gate"] is not None:
            found.append(f"{name}: {entry['gate']}")
        for t in entry["times"]:
            if t["ratio"][0] < least:
                said = f"{t['ratio'][0]:.3f}, allowed {least:.2f}"
                found.append(f"{name} {t['mode']} @{t['threads']}: {said}")
        if entry.get("memory", 0) > MEMORY:
            found.append(f"{name}: memory {entry['memory']:.3f}, allowed {MEMORY:.2f}")
    return found


def render(report: dict[str, Any]) -> str:
    """The means, the worst cases and what is broken, in Markdown."""
    timed = [(from_spec(entry["spec"]), t) for entry in report["cases"] for t in entry["times"]]
    timed.sort(key=lambda each: each[1]["ratio"])
    peaks = [entry["memory"] for entry in report["cases"] if "memory" in entry]
    groups = {"memory, new / old": peaks} if peaks else {}
    for _, t in timed:
        groups.setdefault(f"{t['mode']} @{t['threads']}", []).append(t["ratio"][0])
    rows = [
        [name, str(len(ratios)), f"{geometric_mean(ratios):.3f}", f"{min(ratios):.2f}",
         f"{max(ratios):.2f}"]
        for name, ratios in sorted(groups.items())
    ]  # fmt: skip
    means = markdown(["old / new", "cases", "geometric mean", "least", "most"], rows, "-")
    columns = ["worst", "(T, B, I, H)", "", "", "old", "new", "old / new", "quartiles"]
    worst = markdown(columns, (worst_row(*each) for each in timed[:WORST]), "----")
    same = sum(entry.get("same_bits", False) for entry in report["cases"])
    bits = f"Results have the same bits in {same} of {len(report['cases'])} cases."
    broken = report["failures"]
    verdict = "\n".join([*(f"- {failure}" for failure in broken), "FAILED" if broken else "passed"])
    return "\n\n".join([means, worst, bits, verdict])


def worst_row(case: BenchmarkCase, timed: dict[str, Any]) -> list[str]:
    """One case in one mode and number of threads."""
    ratio, lower, upper = timed["ratio"]
    cells = [case.name, shape(case), extras(case), f"{timed['mode']} @{timed['threads']}"]
    cells += [duration(timed["old_us"]), duration(timed["new_us"])]
    return [*cells, f"{ratio:.3f}", f"{lower:.2f} to {upper:.2f}"]


def said(entry: dict[str, Any]) -> str:
    """One line about a finished case."""
    name = entry["spec"]["name"]
    if entry["gate"] is not None:
        return f"{name}: WRONG: {entry['gate']}"
    ratios = [f"{t['mode']} @{t['threads']} {t['ratio'][0]:.2f}" for t in entry["times"]]
    return f"{name}: {', '.join(ratios)}"


if __name__ == "__main__":
    sys.exit(main())
