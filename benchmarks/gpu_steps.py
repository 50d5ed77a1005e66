# SPDX-License-Identifier: Apache-2.0
"""The steps of gpu.py before the measurements, each a program with a limit of time.

Every step returns a dict for the JSON: ``status`` is ``"passed"``, ``"failed"``, ``"timed out"`` or
``"absent"``, ``seconds`` what it took, ``output`` the end of what it printed if it did not pass,
without paths.
"""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any
from xml.etree import ElementTree

import torch
from report import ROOT, without_paths

#: Characters of output that are kept, of a failed test's message, and lines that tell of errors.
TAIL, MESSAGE, ERROR_LINES = 6000, 300, 40
#: The files with tests for a GPU, each entry a run of pytest. Where pytest-xdist is there, several
#: processes share the tests of a run, but for those that measure time and memory.
SUITE = (
    "gpu_graphs gpu_results gpu_errors gpu_module "
    "autograd autograd_use empty integration module results",
    "gpu_use",
)
ALONE, PROCESSES = ("gpu_use",), max(2, (os.cpu_count() or 1) - 2)
#: Failures after which a run is given up.
MOST_FAILURES = 40
#: Seconds that a program has to end by itself, and pytest to write what it found.
GRACE = 20
#: After so many seconds in one test pytest tells where it is, and goes on.
SLOW_TEST = 60
#: Exit status of pytest when no test was selected.
NO_TESTS = 5


def build(limit: float) -> dict[str, Any]:
    """Build the extension with CUDA into the checkout; ``errors``: lines that tell of one."""
    environment = {**os.environ, "FASTRNN_CUDA": "1", **toolkit()}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    step = execute(command, limit, environment, tail=None)
    if step["status"] != "passed":
        lines = step["output"].splitlines()
        errors = [line for line in lines if re.search(r"\berror\b", line, re.I)]
        step |= {"errors": errors[:ERROR_LINES], "output": step["output"][-TAIL:]}
    return without_output(step)


def without_output(step: dict[str, Any]) -> dict[str, Any]:
    """A step without what it printed, if it passed."""
    passed = step["status"] == "passed"
    return {key: value for key, value in step.items() if not (passed and key == "output")}


def toolkit() -> dict[str, str]:
    """CUDA_HOME, unless it is set: PyTorch would take the folder of the nvcc in PATH, which may be
    a script that stands elsewhere."""
    usual = "/usr/local/cuda"
    is_there = Path(usual, "include", "cuda_runtime.h").exists()
    return {"CUDA_HOME": usual} if is_there and "CUDA_HOME" not in os.environ else {}


def suite(limit: float) -> dict[str, Any]:
    """Run the tests marked `gpu`: counts, which failed and how, and the step of each run.

    Where the time was over, tests under way count as passed: pytest tells no more of them.
    """
    start = monotonic()
    files = {name: suite_file(name, start + limit - monotonic()) for name in SUITE}
    order = ("failed", "timed out", "passed", "absent")
    status = min((file["status"] for file in files.values()), key=order.index)
    found = counts("<none/>")
    for file in files.values():
        for key, value in file.pop("tests", {}).items():
            found[key] += value
    return {"status": status, "seconds": round(monotonic() - start, 1), **found, "files": files}


def suite_file(name: str, limit: float) -> dict[str, Any]:
    """Run one of `SUITE`; ``tests``: their counts."""
    if limit <= 0:
        return {"status": "timed out", "seconds": 0.0}
    files = [f"tests/test_{part}.py" for part in name.split()]
    command = [sys.executable, "-m", "pytest", *files, "-m", "gpu", "-q"]
    command += ["-p", "no:cacheprovider", "--tb=short", f"--maxfail={MOST_FAILURES}"]
    command += ["-o", f"faulthandler_timeout={SLOW_TEST}"]
    environment = dict(os.environ)
    if name not in ALONE and importlib.util.find_spec("xdist"):
        # A few tests at a time: the precisions of one case, and not all that take long.
        command += ["-n", str(PROCESSES), "--maxschedchunk", "5"]
        environment["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "junit.xml"
        step = execute([*command, f"--junitxml={xml}"], limit, environment)
        if xml.exists():
            step["tests"] = without_paths(counts(xml.read_text(encoding="utf-8")))
    if step.get("returncode") == NO_TESTS:
        step["status"] = "absent"
    return without_output(step)


def counts(junit: str) -> dict[str, Any]:
    """What a JUnit file tells: how many tests passed, failed and were skipped, which failed and
    how."""
    found: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "failing": []}
    for test in ElementTree.fromstring(junit).iter("testcase"):
        problems = [*test.iter("failure"), *test.iter("error")]
        if problems:
            found["failed"] += 1
            message = (problems[0].get("message") or "")[:MESSAGE]
            found["failing"].append(f"{test.get('classname')}::{test.get('name')}: {message}")
        elif test.find("skipped") is not None:
            found["skipped"] += 1
        else:
            found["passed"] += 1
    return found


def execute(
    command: list[str],
    limit: float,
    environment: dict[str, str] | None = None,
    tail: int | None = TAIL,
) -> dict[str, Any]:
    """Run a program in the checkout; when it must be ended, so are the programs it started.

    It is asked to end first, as by Ctrl-C, and killed if it does not.

    Parameters
    ----------
    command : list of str
        The program and its arguments.
    limit : float
        Seconds until it is ended.
    environment : dict, optional
        In place of this process's.
    tail : int or None
        How much of the end of the output is kept; None for all of it.

    Returns
    -------
    dict
        As every step's, with the ``returncode`` if it ended by itself.
    """
    start = monotonic()
    step: dict[str, Any] = {"status": "timed out"}
    # A file and no pipe: a program that was started in turn may hold a pipe open.
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # Ignored in what a shell runs in the background.
                preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
            )
            try:
                code = process.wait(max(limit, 0))
                step = {"status": "failed" if code else "passed", "returncode": code}
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        except OSError as error:
            step = {"status": "failed", "error": without_paths(str(error))}
        step["seconds"] = round(monotonic() - start, 1)
        output.seek(0)
        text = output.read().decode(errors="replace")
    step["output"] = without_paths(text if tail is None else text[-tail:])
    return step


def gpu() -> dict[str, Any] | None:
    """What the first GPU is; None if there is none."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "l2_bytes": getattr(found, "L2_cache_size", None),
    }


def versions() -> dict[str, Any]:
    """Versions of the driver, CUDA and cuDNN; None for what there is not."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = execute(command, 30.0)
    lines = driver["output"].split() if driver["status"] == "passed" else []
    return {
        "driver": lines[0] if lines else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
