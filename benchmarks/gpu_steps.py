# SPDX-License-Identifier: Apache-2.0
"""The steps of gpu.py before the measurements, each a program with a limit of time.

Every step returns a dict for the JSON: ``status`` is ``"passed"``, ``"failed"``, ``"timed out"`` or
``"absent"``, ``seconds`` what it took, ``output`` the end of what it printed, without paths.
"""

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from time import monotonic
from typing import Any
from xml.etree import ElementTree

import torch

ROOT = Path(__file__).resolve().parents[1]
MICRO = ROOT / "benchmarks" / "gpu_micro.cu"
#: Characters of output that are kept.
TAIL = 6000
#: After so many seconds in one test pytest tells where it is, and goes on.
SLOW_TEST = 60
#: Exit status of pytest when no test was selected.
NO_TESTS = 5
#: wgmma and setmaxnreg need the second: native is sm_90 without the "a".
ARCHITECTURES = (["-arch=native"], ["-gencode=arch=compute_90a,code=sm_90a"])


def build(limit: float) -> dict[str, Any]:
    """Build the extension with CUDA into the checkout: by pip, else by setup.py itself."""
    environment = {**os.environ, "FASTRNN_CUDA": "1"}
    options = ["--no-build-isolation", "--no-deps", "--editable"]
    by_pip = [sys.executable, "-m", "pip", "install", "--verbose", *options, "."]
    by_setup = [sys.executable, "setup.py", "build_ext", "--inplace"]
    first = execute(by_pip, limit, environment)
    if first["status"] != "failed" or first["seconds"] >= limit:
        return {"by": "pip", **first}
    second = execute(by_setup, limit - first["seconds"], environment)
    return {"by": "setup.py", "pip_output": first["output"], **second}


def suite(limit: float) -> dict[str, Any]:
    """Run the tests marked `gpu`: counts, and the names of those that failed."""
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "tests", "-m", "gpu", "-q"]
        command += ["-p", "no:cacheprovider", f"--junitxml={xml}"]
        command += ["-o", f"faulthandler_timeout={SLOW_TEST}"]
        step = execute(command, limit)
        if xml.exists():
            step |= without_paths(counts(xml.read_text(encoding="utf-8")))
    if step.get("returncode") == NO_TESTS:
        step["status"] = "absent"
    return step


def counts(junit: str) -> dict[str, Any]:
    """What a JUnit file tells: how many tests passed, failed and were skipped, and which failed."""
    found: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "failing": []}
    for test in ElementTree.fromstring(junit).iter("testcase"):
        if test.find("failure") is not None or test.find("error") is not None:
            found["failed"] += 1
            found["failing"].append(f"{test.get('classname')}::{test.get('name')}")
        elif test.find("skipped") is not None:
            found["skipped"] += 1
        else:
            found["passed"] += 1
    return found


def micro(limit: float) -> dict[str, Any]:
    """Compile and run the microbenchmarks, if there are any; ``results`` is what they print."""
    if not MICRO.exists():
        return {"status": "absent"}
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or f"{home}/bin/nvcc"
    end = monotonic() + limit
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/gpu_micro"
        for architecture in ARCHITECTURES:
            command = [nvcc, "-O3", "-std=c++17", *architecture, "-o", program, str(MICRO)]
            step = execute(command, end - monotonic())
            if step["status"] == "passed":
                step = execute([program], end - monotonic(), tail=None)
                break
    if step["status"] == "passed":
        text = step["output"]
        try:
            # Warnings may stand around it.
            step["results"] = json.loads(text[text.find("{") : text.rfind("}") + 1])
            step["output"] = ""
        except ValueError as error:
            step |= {"status": "failed", "error": f"printed no JSON object: {error}"}
    step["output"] = step["output"][-TAIL:]
    return step


def execute(
    command: list[str],
    limit: float,
    environment: dict[str, str] | None = None,
    tail: int | None = TAIL,
) -> dict[str, Any]:
    """Run a program in the checkout; when it must be ended, so are the programs it started.

    Parameters
    ----------
    command : list of str
        The program and its arguments.
    limit : float
        Seconds until it is killed.
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
            )
            try:
                code = process.wait(max(limit, 0))
                step = {"status": "failed" if code else "passed", "returncode": code}
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        except OSError as error:
            step = {"status": "failed", "error": without_paths(str(error))}
        step["seconds"] = round(monotonic() - start, 1)
        output.seek(0)
        text = output.read().decode(errors="replace")
    step["output"] = without_paths(text if tail is None else text[-tail:])
    return step


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
