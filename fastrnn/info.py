# SPDX-License-Identifier: Apache-2.0
"""`python -m fastrnn.info [--json]`: what a bug report needs to know of this installation.

Every fact is found on its own. A fact that cannot be found is shown as unknown, with the reason,
and the rest still prints. Exits with 1 if the extension did not load.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

import fastrnn
from fastrnn import _extension, functional

#: (T, B, I, H) of the layers whose plan on the CPU is reported, in float32.
SHAPES = ((100, 1, 64, 64), (100, 32, 128, 128), (50, 64, 512, 512))

ENVIRONMENT = (
    "ATEN_CPU_CAPABILITY",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "MKL_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "FASTRNN_CUDA_WALK",
)


def collect() -> dict[str, Any]:
    """Gather all facts.

    Returns
    -------
    dict
        One entry per line of the report, fit for JSON; None for what is unknown. ``errors`` tells
        why, by the name of the entry.
    """
    report: dict[str, Any] = {}
    errors: dict[str, str] = {}
    for name, probe in _PROBES.items():
        try:
            report[name] = probe()
        except Exception as error:
            report[name] = None
            errors[name] = _describe(error)
    report["errors"] = errors
    return report


def as_text(report: dict[str, Any]) -> str:
    """The report as aligned lines, one per fact."""
    width = max(len(name) for name in report) + 2
    errors = report["errors"]
    lines = []
    for name, value in report.items():
        if name == "errors":
            continue
        text = f"unknown ({errors[name]})" if name in errors else _shown(value)
        lines.append(f"{name.replace('_', ' '):{width}}{text}")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        shown = (f"{key.replace('_', ' ')}: {_shown(v)}" for key, v in value.items())
        return ", ".join(shown) or "none set"
    if isinstance(value, list):
        return "; ".join(map(_shown, value)) or "none"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _python() -> str:
    return f"{platform.python_version()} ({platform.python_implementation()})"


def _cpu() -> str:
    """The model's name: each system keeps it elsewhere."""
    if sys.platform.startswith("linux"):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model", "cpu model"):
                return value.strip()
    elif sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()
    return platform.processor() or platform.machine()


def _cpus() -> dict[str, Any]:
    # A container or taskset may leave fewer than the machine has. Linux only.
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "of_machine": os.cpu_count(),
        "usable": len(affinity(0)) if affinity else os.cpu_count(),
    }


def _torch_build() -> list[str]:
    """What torch tells of its build, without the compiler flags, which fill a page."""
    lines = (line.strip().removeprefix("- ") for line in torch.__config__.show().splitlines()[1:])
    return [line for line in lines if line and not line.startswith("Build settings:")]


def _threads() -> dict[str, int]:
    return {"intraop": torch.get_num_threads(), "interop": torch.get_num_interop_threads()}


def _extension_state() -> dict[str, Any]:
    """Whether fastrnn._C loaded, and from where; else why not, and which built files there are."""
    if _extension.load_error is None:
        return {"loaded": True, "file": sys.modules["fastrnn._C"].__file__}
    directory = Path(fastrnn.__file__).parent
    built = sorted(p.name for p in directory.glob("_C.*") if p.suffix in (".so", ".pyd"))
    return {"loaded": False, "error": _describe(_extension.load_error), "files": built}


def _cpu_capability() -> dict[str, str | None]:
    """Instruction sets in use; both obey ATEN_CPU_CAPABILITY."""
    ours = None if _extension.load_error else _extension.C.cpu_capability()
    return {"fastrnn": ours, "torch": torch.backends.cpu.get_cpu_capability()}


def _gpus() -> list[str]:
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _cpu_plan() -> dict[str, str]:
    """How layers of SHAPES run: who makes each product, and how threads share the work."""
    names = ("input", "state", "delta", "sharing", "threads", "row_blocks", "column_blocks")
    plans = {}
    for shape in SHAPES:
        plan = _extension.C.cpu_plan(*shape)
        plans[str(shape)] = ", ".join(f"{name} {plan[name]}".replace("_", " ") for name in names)
    return plans


def _cuda_plan() -> list[str] | str:
    """Which walk of docs/cuda.md each GPU takes, by dtype and H."""
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return [_walks_of(gpu) for gpu in gpus] or "no GPU"


def _walks_of(gpu: torch.device) -> str:
    """The walks of one long sequence on a GPU, the largest H of each, among multiples of 8."""
    if not functional._is_fused_device(gpu):
        return f"{gpu} PyTorch's own path"
    facts: Any = torch.cuda.get_device_properties(gpu)  # its stub lacks an attribute

    def walk(H: int, element_size: int) -> Any:
        return _extension.C.cuda_plan(
            512, 1, 512, H, element_size=element_size,
            major=facts.major, multiprocessors=facts.multi_processor_count,
            shared_bytes=facts.shared_memory_per_block_optin,
        )["walk"]  # fmt: skip

    dtypes = []
    for dtype, size in (("float64", 8), ("float32", 4), ("16 bits", 2)):
        ranges = groupby(range(8, 4097, 8), lambda H, size=size: walk(H, size))  # type: ignore[misc]
        *limited, (rest, _) = [(name, max(group)) for name, group in ranges]
        shown = [f"{name} walk to H = {last}" for name, last in limited]
        walks = ", ".join([*shown, f"{rest} walk{' above' if shown else ''}"])
        dtypes.append(f"{dtype}: {walks}")
    return f"{gpu} {'; '.join(dtypes)}"


def _environment() -> dict[str, str]:
    return {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}


_PROBES: dict[str, Callable[[], Any]] = {
    "fastrnn": lambda: fastrnn.__version__,
    "python": _python,
    "os": platform.platform,
    "cpu": _cpu,
    "cpus": _cpus,
    "torch": lambda: str(torch.__version__),
    "torch_build": _torch_build,
    "torch_cuda": lambda: torch.version.cuda,
    "gpus": _gpus,
    "threads": _threads,
    "extension": _extension_state,
    "build": lambda: _extension.C.build_info(),
    "cpu_capability": _cpu_capability,
    "cpu_plan": _cpu_plan,
    "cuda_plan": _cuda_plan,
    "environment": _environment,
}


def main(argv: list[str] | None = None) -> int:
    """Print the report.

    Parameters
    ----------
    argv : list of str, optional
        Arguments, in place of the command line's.

    Returns
    -------
    int
        0, or 1 if the extension did not load.
    """
    parser = argparse.ArgumentParser(prog="python -m fastrnn.info", description="Bug report facts.")
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    args = parser.parse_args(argv)
    report = collect()
    print(json.dumps(report, indent=2, default=str) if args.json else as_text(report))
    return 0 if _extension.load_error is None else 1


if __name__ == "__main__":
    sys.exit(main())
