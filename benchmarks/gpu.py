# SPDX-License-Identifier: Apache-2.0
"""`python benchmarks/gpu.py`: build with CUDA, test and measure on this GPU, keep it all as JSON.

For a checkout on a machine with a GPU and a CUDA toolkit; nothing is downloaded. Each step stands
on its own: one that fails is reported, and the next ones run where they still make sense. The file
is written after each step and case, and names neither host, user nor paths.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# fastrnn is not installed before the first step.
sys.path.insert(0, str(ROOT))

import gpu_steps  # noqa: E402
import gpu_table  # noqa: E402
import timing  # noqa: E402
import torch  # noqa: E402
from gpu_cases import CASES, GpuCase  # noqa: E402
from gpu_timing import WAYS  # noqa: E402
from report import RESULTS, default_path, described, load, without_paths, write  # noqa: E402
from report import describe as describe_run  # noqa: E402
from worker import Worker  # noqa: E402

#: Seconds of timing for each case, way and mode.
SECONDS, QUICK_SECONDS = 1.0, 0.1
#: Minutes after which a quick run stops measuring.
QUICK_MINUTES = 10.0
#: Seconds after which a step, or one case in one way, is taken to hang.
BUILD_LIMIT, SUITE_LIMIT, CASE_LIMIT = 1800.0, 1800.0, 120.0
#: The suite leaves the rest of the time to the measurements.
SUITE_SHARE = 0.4


class Budget:
    """The time that is left: `minutes` from now, or no end."""

    def __init__(self, minutes: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = math.inf if minutes is None else clock() + 60 * minutes

    def left(self) -> float:
        """Seconds; negative when it is over."""
        return self._end - self._clock()


def main(argv: list[str] | None = None) -> int:
    """Build, test, measure, write, print the table.

    Parameters
    ----------
    argv : list of str, optional
        Arguments, in place of the command line's.

    Returns
    -------
    int
        0; 1 if a step failed, a case did not pass the gate or could not be measured; 2 if the
        arguments select nothing or there is no GPU.
    """
    args = parse(argv)
    if args.table:
        print(gpu_table.render(load(args.table)))
        return 0
    cases = [case for case in CASES if args.only in case.name]
    if not cases:
        print(f"no case has {args.only!r} in its name", file=sys.stderr)
        return 2
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no GPU here; --device cpu tries the script", file=sys.stderr)
        return 2
    budget = Budget(args.minutes)
    report = describe(args)
    gpu = report["machine"]["gpu"]
    path = args.output / default_path(report, is_part(args), gpu["name"] if gpu else "cpu").name
    save = partial(write, path, report)
    take_steps(report, args, budget, save)
    worker = Worker("gpu_timing:Runner")
    try:
        report["machine"] = worker.ask("machine", args.device, limit=CASE_LIMIT)
    except (TimeoutError, ChildProcessError) as error:
        report["machine_error"] = without_paths(described(error))
    tasks = plan(cases, args.device)
    if built(report):
        measure(report, tasks, partial(ask, worker, args), budget, save)
    else:
        report["not_measured"] = [label(*task) for task in tasks]
    worker.close()
    report["complete"] = not (is_part(args) or report["not_measured"])
    save()
    print(gpu_table.render(report))
    print(f"written to {path.name}", file=sys.stderr)
    return 1 if is_red(report) else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Build, test and measure fastrnn on a GPU.")
    parser.add_argument("--quick", action="store_true", help="rougher numbers, ten minutes at most")
    parser.add_argument("--minutes", type=float, metavar="N", help="stop measuring after so long")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="cases with this name")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--skip-build", action="store_true", help="use the extension as it is")
    parser.add_argument("--skip-tests", action="store_true", help="measure alone")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of this JSON")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda",
                        help="cpu: try the script; without graphs")  # fmt: skip
    args = parser.parse_args(argv)
    if args.quick and args.minutes is None:
        args.minutes = QUICK_MINUTES
    return args


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """The report without its steps and cases: where, with what and how they were measured."""
    settings = {
        **{name: getattr(args, name) for name in ("quick", "only", "minutes")},
        "seconds": QUICK_SECONDS if args.quick else SECONDS,
        "round_seconds": timing.ROUND,
        "min_pairs": timing.MIN_ROUNDS,
        "matmul_tf32": torch.backends.cuda.matmul.allow_tf32,
    }
    report = describe_run("gpu", [], settings)
    on_gpu = args.device == "cuda"
    report["device"] = "cuda" if on_gpu else "cpu, to try the script"
    del report["threads"]
    report["machine"] = without_paths(report["machine"])
    report["machine"]["gpu"] = gpu_steps.gpu() if on_gpu else None
    report["versions"] |= gpu_steps.versions()
    return {**report, "steps": {}, "cases": [], "not_measured": []}


def is_part(args: argparse.Namespace) -> bool:
    """Whether the options leave anything out."""
    skip = args.skip_build or args.skip_tests
    return bool(args.quick or args.minutes or args.only or skip or args.device == "cpu")


def take_steps(
    report: dict[str, Any], args: argparse.Namespace, budget: Budget, save: Callable[[], None]
) -> None:
    """Build, then run the suite."""
    limit = min(BUILD_LIMIT, budget.left())
    take(report, save, "build", gpu_steps.build, limit, args.skip_build)
    limit = min(SUITE_LIMIT, SUITE_SHARE * budget.left())
    take(report, save, "suite", gpu_steps.suite, limit, args.skip_tests or not built(report))


def take(
    report: dict[str, Any],
    save: Callable[[], None],
    name: str,
    step: Callable[[float], dict[str, Any]],
    limit: float,
    skip: bool,
) -> None:
    """Take one step, unless it is skipped or there is no time; the result goes into the report."""
    steps = report["steps"]
    steps[name] = {"status": "skipped"} if skip or limit <= 0 else step(limit)
    print(f"{name}: {steps[name]['status']}", file=sys.stderr, flush=True)
    save()


def built(report: dict[str, Any]) -> bool:
    """Whether the build left something to test, by this run or one before."""
    return report["steps"]["build"]["status"] in ("passed", "skipped")


def plan(cases: list[GpuCase], device: str) -> list[tuple[GpuCase, str]]:
    """What is measured, in order: the main cases by themselves, then as graphs; then the others."""
    ways = WAYS if device == "cuda" else WAYS[:1]
    main, others = ([c for c in cases if c.is_main is wanted] for wanted in (True, False))
    return [(case, way) for part in (main, others) for way in ways for case in part]


def ask(
    worker: Worker, args: argparse.Namespace, case: GpuCase, way: str, limit: float
) -> dict[str, Any]:
    """Have the worker perform one task; a process that cannot go on is replaced."""
    seconds = QUICK_SECONDS if args.quick else SECONDS
    found: dict[str, Any]
    found, healthy = worker.ask("perform", case, way, args.device, seconds, limit=limit)
    if not healthy:
        worker.close()
    return found


def measure(
    report: dict[str, Any],
    tasks: list[tuple[GpuCase, str]],
    ask: Callable[..., dict[str, Any]],
    budget: Budget,
    save: Callable[[], None],
) -> None:
    """Perform the tasks in order until the time is over.

    Parameters
    ----------
    report : dict
        Its ``cases`` and ``not_measured`` are filled.
    tasks : list
        As of `plan`.
    ask : callable
        As the function of this name, without its first two arguments.
    budget : Budget
        A task that does not end in this time counts as not measured.
    save : callable
        Called after each task.
    """
    entries: dict[str, dict[str, Any]] = {}
    for number, (case, way) in enumerate(tasks):
        entry = entries.get(case.name) or blank(case)
        if case.name in entries and gpu_table.is_red(entry):
            continue
        found = attempt(ask, case, way, budget.left())
        if found is None:
            report["not_measured"] = [label(*task) for task in tasks[number:]]
            save()
            return
        entry |= without_paths(found)
        if case.name not in entries:
            entries[case.name] = entry
            report["cases"].append(entry)
        save()
        done = f"{number + 1}/{len(tasks)} {gpu_table.line(entry, way)}"
        print(done, file=sys.stderr, flush=True)


def blank(case: GpuCase) -> dict[str, Any]:
    """What the report has of a case before its first result."""
    spec = case.spec()
    name, part = spec.pop("name"), spec.pop("part")
    return {"name": name, "part": part, "spec": spec, "gate": "not run", "error": None}


def label(case: GpuCase, way: str) -> str:
    """The name of a task."""
    return f"{case.name} ({way})"


def attempt(
    ask: Callable[..., dict[str, Any]], case: GpuCase, way: str, left: float
) -> dict[str, Any] | None:
    """One task in the `left` seconds: what it found or how it failed; None if they are too few."""
    if left <= 0:
        return None
    try:
        return ask(case, way, min(CASE_LIMIT, left))
    except TimeoutError as error:
        return None if left < CASE_LIMIT else {"error": f"{way}: {error}"}
    except ChildProcessError as error:
        return {"error": f"{way}: {error}"}


def is_red(report: dict[str, Any]) -> bool:
    """Whether a step failed or a case has wrong results or an error; no figure decides this."""
    steps = any(s["status"] in ("failed", "timed out") for s in report["steps"].values())
    return steps or any(map(gpu_table.is_red, report["cases"]))


if __name__ == "__main__":
    sys.exit(main())
