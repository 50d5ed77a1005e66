# SPDX-License-Identifier: Apache-2.0
"""Results: where and how they were measured, their files, and which of them are published.

A file has a summary for each case, and no rounds. There is one current file for each study and
machine; it names the processor, but neither host, user nor paths.
"""

import json
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fastrnn import info

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
#: Columns of a line of JSON.
WIDTH = 300


def describe(study: str, threads: list[int], settings: dict[str, Any]) -> dict[str, Any]:
    """The report without its results: where, with what and how they are measured.

    Parameters
    ----------
    study : str
        What is measured; part of the file's name.
    threads : list of int
        The numbers of threads.
    settings : dict
        How it is measured.

    Returns
    -------
    dict
        Fit for JSON, not yet ``complete``.
    """
    facts = info.collect()
    return {
        "study": study,
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
        "threads": threads,
        "settings": settings,
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


def default_path(report: dict[str, Any], part: bool, machine: str = "") -> Path:
    """The file of this study and machine; another one if only a part is measured."""
    processor, cores = report["machine"]["cpu"], report["machine"]["cores"]["usable"]
    name = f"{report['study']} {machine or f'{processor} {cores} cores'}"
    plain = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
    return RESULTS / f"{plain}{'-part' if part else ''}.json"


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
        hold all that an earlier run measured.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished, writing = path.with_suffix(".unfinished"), path.with_suffix(".writing")
    writing.write_text(dumps(report) + "\n", encoding="utf-8")
    writing.replace(path if done else unfinished)
    if done:
        unfinished.unlink(missing_ok=True)


def dumps(value: Any, indent: int = 0) -> str:
    """JSON in which everything that fits has one line."""
    line = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict | list) or indent + len(line) <= WIDTH:
        return line
    open_, close = ("{", "}") if isinstance(value, dict) else ("[", "]")
    keys = (
        [f"{json.dumps(key)}: " for key in value] if isinstance(value, dict) else [""] * len(value)
    )
    values = value.values() if isinstance(value, dict) else value
    space = "\n" + " " * (indent + 1)
    items = [key + dumps(each, indent + 1) for key, each in zip(keys, values, strict=True)]
    return f"{open_}{space}{f',{space}'.join(items)}\n{' ' * indent}{close}"


def load(path: Path) -> dict[str, Any]:
    """Read a file of results."""
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return report


def newest(study: str, like: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """The latest complete results of a study on a CPU, by the date in them; None without any.

    Parameters
    ----------
    study : str
        ``"bench"``, ``"peers"``, ``"scaling"``, ``"busy"`` or ``"limits"``.
    like : dict, optional
        A report: of the same processor and numbers of cores and threads alone.
    """
    reports = [report for report in map(load, RESULTS.glob("*.json")) if report.get("complete")]
    reports = [r for r in reports if (r.get("device"), r.get("study")) == ("cpu", study)]
    if like is not None:
        reports = [r for r in reports if conditions(r) == conditions(like)]
    return max(reports, key=lambda report: str(report["date"]), default=None)


def conditions(report: dict[str, Any]) -> tuple[Any, ...]:
    """What must be the same for times to be compared."""
    machine = report["machine"]
    return machine["cpu"], machine["cores"], report["threads"]


def source(report: dict[str, Any]) -> str:
    """Of which commit and day a report is."""
    commit = report["commit"]
    name = f"commit {commit['hash'][:10]}" if commit else "no commit"
    changes = " with changes" if commit and commit["dirty"] else ""
    return f"{name}{changes}; {report['date'][:10]}"


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
