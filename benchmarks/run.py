# SPDX-License-Identifier: Apache-2.0
"""`python benchmarks/run.py`: measure every case on this CPU, and keep the results as JSON.

Each case passes the gate, is timed, then its memory is measured. The file is written after each
case, so that a stop loses nothing. It names the processor, but neither host, user nor paths.
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
        0, or 1 if a case did not pass the gate.
    """
    args = parse(argv)
    torch.set_num_threads(args.threads)
    cases = [case for case in CASES if args.only in case.name]
    if not cases:
        print(f"no case has {args.only!r} in its name", file=sys.stderr)
        return 2
    report = describe(args)
    path = args.output or default_path(report, args)
    timing.keep_freed_memory()
    for number, case in enumerate(cases, 1):
        entry = measure(case, QUICK_SECONDS if args.quick else SECONDS, not args.no_memory)
        report["cases"].append(entry)
        whole = not (args.quick or args.only or args.no_memory)
        report["complete"] = whole and number == len(cases)
        write(path, report)
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
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory")
    return parser.parse_args(argv)


def measure(case: BenchmarkCase, seconds: float, with_memory: bool) -> dict[str, Any]:
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
        for name in CLASSES if with_memory else ():
            peak = memory.peak_in_own_process(case, name, mode)
            entry["modes"][mode][f"{name}_peak_bytes"] = peak
    return entry


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """The report without its cases: where, with what and how they were measured."""
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
            "quick": args.quick,
            "only": args.only,
            "seconds": QUICK_SECONDS if args.quick else SECONDS,
            "round_seconds": timing.ROUND,
            "min_pairs": timing.MIN_PAIRS,
        },
        "cases": [],
    }


def commit() -> dict[str, Any] | None:
    """The commit that is checked out, and whether more than results differs; None without git."""

    def git(*arguments: str) -> str:
        # The ceiling keeps git from answering for a repository that this folder only lies in.
        environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(ROOT.parent)}
        command = ["git", "-C", str(ROOT), *arguments]
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
    return table.RESULTS / file_name(name, bool(args.quick or args.only or args.no_memory))


def file_name(name: str, part: bool) -> str:
    """The name of a file of results, in plain letters; `part`: not everything is measured."""
    plain = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
    return f"{plain}{'-part' if part else ''}.json"


def write(path: Path, report: dict[str, Any]) -> None:
    """Write the report; a stop while writing leaves the file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


def progress(entry: dict[str, Any]) -> str:
    """One line about a finished case."""
    if entry["gate"] is not None:
        return f"{entry['spec']['name']}: WRONG RESULTS: {entry['gate']}"
    ratios = (f"{mode} {numbers['speedup']:.2f}x" for mode, numbers in entry["modes"].items())
    return f"{entry['spec']['name']}: {', '.join(ratios)}"


if __name__ == "__main__":
    sys.exit(main())
