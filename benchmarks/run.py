# SPDX-License-Identifier: Apache-2.0
"""`python benchmarks/run.py`: measure every case on this CPU, and keep the results as JSON.

Each case passes the gate, is timed, then its memory is measured. After each case the results are
written beside the file, to a name that ends in .unfinished, and replace it after the last one: a
stop loses neither. They name the processor, but neither host, user nor paths.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import gate
import memory
import table
import timing
import torch
from cases import CASES, CLASSES, MODES, BenchmarkCase

from fastrnn import info

ROOT = Path(__file__).resolve().parents[1]
#: Seconds of timing for each case and mode.
SECONDS, QUICK_SECONDS = 5.0, 0.2


def main(argv: list[str] | None = None) -> int:
    """Measure, write, print the table.

    Parameters
    ----------
    argv : list of str, optional
        Arguments, in place of the command line's.

    Returns
    -------
    int
        0; 1 if a case did not pass the gate; 2 if the arguments select nothing.
    """
    args = parse(argv)
    torch.set_num_threads(args.threads)
    cases = [case for case in CASES if args.only in case.name]
    if not cases:
        print(f"no case has {args.only!r} in its name", file=sys.stderr)
        return 2
    report = describe(args.quick, args.only)
    path = args.output or default_path(report, args)
    timing.keep_freed_memory()
    for number, case in enumerate(cases, 1):
        entry = measure(case, QUICK_SECONDS if args.quick else SECONDS)
        report["cases"].append(entry)
        done = number == len(cases)
        report["complete"] = done and not args.part
        write(path, report, done)
        print(f"{number}/{len(cases)} {progress(entry)}", file=sys.stderr, flush=True)
    print(table.render(report))
    return 1 if any(entry["gate"] is not None for entry in report["cases"]) else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Compare fastrnn.RNN with torch.nn.RNN.")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, rougher numbers")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="cases with this name")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N")
    parser.add_argument("--output", type=Path, metavar="PATH", help="JSON file to write")
    args = parser.parse_args(argv)
    args.part = bool(args.quick or args.only)
    return args


def measure(case: BenchmarkCase, seconds: float) -> dict[str, Any]:
    """All of one case: what it is, the gate's word (None is good) and, if good, the numbers."""
    entry: dict[str, Any] = {"spec": case.spec(), "gate": gate.failure(case), "modes": {}}
    if entry["gate"] is not None:
        return entry
    for mode in MODES:
        timed = timing.measure(case, mode, seconds)
        entry["modes"][mode] = {
            "nn_rnn_us": round(timed.nn_rnn * 1e6, 2),
            "fastrnn_us": round(timed.fastrnn * 1e6, 2),
            "speedup": round(timed.speedup, 3),
            "speedup_quartiles": [round(ratio, 3) for ratio in timed.speedup_quartiles],
            "pairs": timed.pairs,
        }
        for name in CLASSES:
            peak = memory.peak_in_own_process(case, name, mode)
            entry["modes"][mode][f"{name}_peak_bytes"] = peak
    return entry


def describe(quick: bool, only: str = "") -> dict[str, Any]:
    """The report without its cases: where, with what and how they were measured.

    Parameters
    ----------
    quick : bool
        Whether the numbers are rough.
    only : str
        What the names of the cases have in common.

    Returns
    -------
    dict
        Fit for JSON, not yet ``complete``.
    """
    facts = info.collect()
    return {
        "device": "cpu",
        "complete": False,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {
            "cpu": facts["cpu"],
            "cores": facts["cpus"],
            "capability": facts["cpu_capability"],
            "os": " ".join([platform.system(), platform.machine(), *platform.libc_ver()]).strip(),
            "build": facts["build"],
        },
        "versions": {
            "python": platform.python_version(),
            "torch": facts["torch"],
            "fastrnn": facts["fastrnn"],
        },
        "commit": commit(),
        "threads": torch.get_num_threads(),
        "settings": {
            "quick": quick,
            "only": only,
            "seconds": QUICK_SECONDS if quick else SECONDS,
            "round_seconds": timing.ROUND,
            "min_pairs": timing.MIN_PAIRS,
        },
        "cases": [],
    }


def commit(root: Path = ROOT) -> dict[str, Any] | None:
    """The commit that is checked out, and whether more than results differs; None without git."""

    def git(*arguments: str) -> str:
        # The ceiling keeps git from answering for a repository that this folder only lies in.
        environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(root.parent)}
        command = ["git", "-C", str(root), *arguments]
        run = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        return run.stdout.strip()

    try:
        changes = git(
            "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"
        )
        return {"hash": git("rev-parse", "HEAD"), "dirty": bool(changes)}
    except (OSError, subprocess.CalledProcessError):
        return None


def default_path(report: dict[str, Any], args: argparse.Namespace) -> Path:
    """The file for this machine and day; another one if not everything is measured."""
    name = f"{report['machine']['cpu']} {report['threads']} threads {report['date'][:10]}"
    return table.RESULTS / file_name(name, args.part)


def file_name(name: str, part: bool) -> str:
    """The name of a file of results, in plain letters; `part`: not everything is measured."""
    plain = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
    return f"{plain}{'-part' if part else ''}.json"


def write(path: Path, report: dict[str, Any], done: bool = True) -> None:
    """Write the report; a stop while writing leaves all files as they were.

    Parameters
    ----------
    path : Path
        The file.
    report : dict
        What is written.
    done : bool
        If not, the report lies beside the file, its name ending in ``.unfinished``: the file may
        hold all that an earlier run of the day measured.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished, writing = path.with_suffix(".unfinished"), path.with_suffix(".writing")
    writing.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    writing.replace(path if done else unfinished)
    if done:
        unfinished.unlink(missing_ok=True)


def described(error: Exception) -> str:
    """The kind of error and the first line of its text."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def without_paths(value: Any) -> Any:
    """A value for the JSON, its text without folders outside the checkout and without the host."""
    if isinstance(value, dict):
        return {key: without_paths(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_paths(each) for each in value]
    if not isinstance(value, str):
        return value
    value = value.replace(f"{ROOT}/", "").replace(str(ROOT), ".")
    # The folders of an absolute path, which may follow an option as in -I/usr/include.
    value = re.sub(r"(?:(?<![\w./-])|(?<=-[ILB]))/(?:[^\s/:;,\"'=()]+/)+", "…/", value)
    host = re.escape(platform.node())
    return re.sub(rf"(?<!\w){host}(?!\w)", "<host>", value) if host else value


def progress(entry: dict[str, Any]) -> str:
    """One line about a finished case."""
    if entry["gate"] is not None:
        return f"{entry['spec']['name']}: WRONG RESULTS: {entry['gate']}"
    ratios = (f"{mode} {numbers['speedup']:.2f}x" for mode, numbers in entry["modes"].items())
    return f"{entry['spec']['name']}: {', '.join(ratios)}"


if __name__ == "__main__":
    sys.exit(main())
