# SPDX-License-Identifier: Apache-2.0
"""`make mutants`: whether the quick suite notices the faults of faults.py.

In a copy of the built checkout, each fault is planted by itself, the extension is built again where
it is C++, and the quick suite runs up to its first failure, the files about the fault's folder
first. The table is written to docs/mutants.md. Before, the suite has to pass without a fault. All
this takes hours, so it is no part of the suite.

    python tests/mutants.py                     # all faults, and the table
    python tests/mutants.py recurrence walk     # those whose file's name holds one of these words
    python tests/mutants.py --suite tests/test_errors.py walk     # another jury; no table
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from time import monotonic
from typing import NamedTuple

from faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs" / "mutants.md"
#: What is copied, besides the files that git knows: the extension, and what was compiled for it.
BUILT = ("build", "fastrnn/*.so", ".pytest_cache/d")
#: Seconds for the suite; a fault that makes it stand still is noticed too.
LIMIT = 3600
#: The tests that run first for a fault in a folder: nearest first, then all others.
NEAREST = {
    "csrc/cuda/": "test_cuda_engine.py test_cuda_compile.py test_cuda_host.py test_cuda_plan.py",
    "csrc/cpu/": "test_operators.py test_hypothesis.py test_results.py test_activations.py",
    "csrc/": "test_operators.py test_errors.py test_operator_errors.py test_autograd.py",
    "fastrnn/": "test_module.py test_results.py test_errors.py test_testing.py test_info.py",
}


class Verdict(NamedTuple):
    """What became of a fault: the test that noticed it, or None, and seconds without the build."""

    fault: Fault
    test: str | None
    seconds: float


def planted(text: str, fault: Fault) -> str:
    """The source with the fault; an error if its text is not there exactly once."""
    if text.count(fault.before) != 1:
        raise SystemExit(
            f"{fault.file} holds {fault.before!r} {text.count(fault.before)} times, not once: "
            "bring tests/faults.py up to date"
        )
    return text.replace(fault.before, fault.after)


def copy_checkout(target: Path) -> None:
    """The files of the checkout as they are, and what an earlier build has left."""
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, capture_output=True, check=True, text=True,
    ).stdout.split("\0")  # fmt: skip
    built = [str(p.relative_to(ROOT)) for pattern in BUILT for p in ROOT.glob(pattern)]
    for name in [name for name in names if name] + built:
        source, copy = ROOT / name, target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copy, symlinks=True)
        elif source.exists():  # else deleted, and git does not know yet
            shutil.copy2(source, copy)


class Workshop:
    """A copy of the checkout in which faults are planted, one at a time."""

    def __init__(self, folder: Path, suite: list[str]) -> None:
        self.folder, self.suite = folder, suite
        copy_checkout(folder)
        self.environment = os.environ | {"PYTHONPATH": str(folder), "FASTRNN_CUDA": "0"}

    def build(self) -> None:
        """Bring the extension up to date with the sources."""
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        process = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True
        )
        if process.returncode != 0:
            raise SystemExit(f"it does not build:\n{(process.stdout + process.stderr)[-4000:]}")

    def first_failure(self, file: str) -> tuple[str | None, float]:
        """The first test of the suite that fails, files near `file` first, and the seconds."""
        command = [sys.executable, "-m", "pytest", "-x", "-v", "-rfE", "-p", "no:cacheprovider"]
        begin = monotonic()
        process = subprocess.Popen(
            [*command, *self.files(file)], cwd=self.folder, env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            return f"{last_started(output)} (stood still)", monotonic() - begin
        seconds = monotonic() - begin
        if process.returncode == 0:
            return None, seconds
        failed = re.search(r"^(?:FAILED|ERROR) (tests/\S+?\.py(?:::.*?)?)(?: - .*)?$", output, re.M)
        return failed[1] if failed else f"{last_started(output)} (crashed)", seconds

    def files(self, file: str) -> list[str]:
        if self.suite:
            return self.suite
        nearest = next((n for folder, n in NEAREST.items() if file.startswith(folder)), "")
        every = sorted(p.name for p in (self.folder / "tests").glob("test_*.py"))
        first = [name for name in nearest.split() if name in every]
        return [f"tests/{name}" for name in [*first, *(n for n in every if n not in first)]]

    def judge(self, fault: Fault) -> Verdict:
        """Plant the fault, build, ask the suite, and take the fault out again."""
        source = self.folder / fault.file
        text = source.read_text(encoding="utf-8")
        source.write_text(planted(text, fault), encoding="utf-8")
        try:
            if fault.file.startswith("csrc/"):
                self.build()
            return Verdict(fault, *self.first_failure(fault.file))
        finally:
            source.write_text(text, encoding="utf-8")
            for extension in ROOT.glob("fastrnn/*.so"):
                shutil.copy2(extension, self.folder / "fastrnn")


def last_started(output: str) -> str:
    """The last test that pytest has named."""
    names = re.findall(r"^(tests/\S+?\.py::.*?)(?: [A-Z]+ .*| Fatal Python.*)?$", output, re.M)
    return names[-1] if names else "no test"


def table(verdicts: list[Verdict]) -> str:
    """The page for docs/."""
    caught = sum(v.test is not None for v in verdicts)
    lines = [
        "# Planted faults",
        "",
        f"`make mutants` wrote this page: {caught} of {len(verdicts)} faults of "
        "[faults.py](../tests/faults.py) are noticed by the quick suite. Seconds: from the start "
        "of pytest to the first failure, the files about the fault's folder first.",
        "",
        "| file | fault | instead of | there is | noticed by | s |",
        "|---|---|---|---|---|---|",
    ]
    for fault, test, seconds in verdicts:
        cells = [fault.file, fault.kind, code(fault.before), code(fault.after)]
        cells += [f"`{test}`" if test else "**nothing**", f"{seconds:.0f}"]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def code(text: str) -> str:
    text = " ".join(text.split())
    return f"`{text}`" if text else "nothing"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("words", nargs="*", help="faults whose file's name holds one of them")
    parser.add_argument("--suite", nargs="+", default=[], help="pytest's arguments instead of all")
    arguments = parser.parse_args()
    for fault in FAULTS:
        planted((ROOT / fault.file).read_text(encoding="utf-8"), fault)
    words = arguments.words
    chosen = [f for f in FAULTS if not words or any(w in Path(f.file).name for w in words)]
    verdicts = []
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(Path(folder), arguments.suite)
        if not words:
            test, seconds = workshop.first_failure("")
            if test is not None:
                raise SystemExit(f"without a fault, {test} fails")
            print(f"no fault: passed in {seconds:.0f} s", flush=True)
        for fault in chosen:
            verdicts.append(workshop.judge(fault))
            print(*verdicts[-1][0][:2], "->", *verdicts[-1][1:], flush=True)
    if not words and not arguments.suite:
        TABLE.write_text(table(verdicts), encoding="utf-8")
    if any(v.test is None for v in verdicts):
        raise SystemExit("some faults were not noticed")


if __name__ == "__main__":
    main()
