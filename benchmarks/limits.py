# SPDX-License-Identifier: Apache-2.0
"""`python benchmarks/limits.py`: measure what this machine can do at most, for floor.py.

Each limit is the best of many repeats in limits.cpp, which g++ compiles for the processor at hand,
with one thread and with all of them.
"""

import argparse
import ctypes
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import native
import report
import table
import torch

SOURCE = Path(__file__).with_suffix(".cpp")
#: Where the engine's vectors and its tanh are.
KERNELS = next((report.ROOT / "csrc" / "cpu").rglob("vectors.inl")).parent
OPTIONS = ["-O3", "-march=native", "-pthread", "-Wno-psabi", f"-I{KERNELS}"]
CPUS = Path("/sys/devices/system/cpu")
#: Seconds of repeats for each limit.
SECONDS, QUICK_SECONDS = 0.3, 0.0
#: Units that are faster than what is measured: with them the peak of a dtype is not known.
FASTER_UNITS = {"bfloat16": {"amx_bf16", "bf16"}, "float16": {"avx512_fp16", "asimdhp"}}


def main(argv: list[str] | None = None) -> int:
    """Measure, write, print the table.

    Parameters
    ----------
    argv : list of str, optional
        Arguments, in place of the command line's.

    Returns
    -------
    int
        0, or 2 if this machine lacks what is needed.
    """
    parser = argparse.ArgumentParser(description="Measure the limits of this machine.")
    parser.add_argument("--quick", action="store_true", help="fewer repeats, rougher numbers")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N")
    parser.add_argument("--output", type=Path, metavar="PATH", help="JSON file to write")
    args = parser.parse_args(argv)
    if shutil.which("g++") is None or not caches():
        print(f"this needs g++ and the sizes of caches in {CPUS}", file=sys.stderr)
        return 2
    settings = {"quick": args.quick, "seconds": QUICK_SECONDS if args.quick else SECONDS}
    found = report.describe("limits", sorted({1, args.threads}), settings)
    found["limits"] = measure(found["threads"], settings["seconds"])
    found["complete"] = not args.quick
    path = args.output or report.default_path(found, args.quick)
    report.write(path, found)
    print(table.render(found))
    print(f"written to {path.name}", file=sys.stderr)
    return 0


def measure(threads: list[int], seconds: float) -> dict[str, Any]:
    """Every limit; what several threads share with each number of threads.

    Parameters
    ----------
    threads : list of int
        One and, if there are more, all.
    seconds : float
        For each limit and number of threads; a few repeats are made even if they take longer.

    Returns
    -------
    dict
        ``gflops`` by dtype, None if not known, ``read_gb_s`` by level, ``tanh_ns`` of one number
        beside products, ``step_ns`` of the shortest step, ``hand_over_ns``, ``caches``.
    """
    call, levels = caller(seconds), caches()

    def rates(name: str, *arguments: int) -> list[float]:
        return [round(call(name, *arguments, count) / 1e9, 1) for count in threads]

    def nanoseconds(name: str, *arguments: int) -> float:
        return round(1e9 * call(name, *arguments), 3)

    gflops: dict[str, Any] = {d: rates(f"peak_{d}") for d in ("float32", "float64", "bfloat16")}
    if not gflops["bfloat16"][0]:
        del gflops["bfloat16"]  # computed in float32
    gflops |= {d: None for d, units in FASTER_UNITS.items() if units & processor_flags()}
    own = ("float32", "float64")
    return {
        "gflops": gflops,
        "read_gb_s": {
            level: rates("read", size) for level, size in working_sets(levels, threads[-1]).items()
        },
        "tanh_ns": {d: nanoseconds(f"tanh_{d}") for d in own},
        "step_ns": {
            d: {way: nanoseconds(f"step_{d}", way == "backward") for way in ("forward", "backward")}
            for d in own
        },
        "hand_over_ns": nanoseconds("hand_over") if threads[-1] > 1 else None,
        "caches": levels,
    }


def caller(seconds: float) -> Callable[..., float]:
    """What calls a function of limits.cpp by its name, with whole numbers."""
    included = (KERNELS / name for name in ("recurrence.h", "vectors.inl", "activations.inl"))
    key = "".join(path.read_text(encoding="utf-8") for path in included)
    path = native.library(SOURCE, *OPTIONS, key=key + " ".join(sorted(processor_flags())))
    functions = ctypes.CDLL(str(path))

    def call(name: str, *arguments: int) -> float:
        function = functions[f"limits_{name}"]
        function.restype = ctypes.c_double
        return float(function(*map(ctypes.c_int64, arguments), ctypes.c_double(seconds)))

    return call


def processor_flags() -> set[str]:
    """The names that Linux gives to what the processor can do."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    found = [line.split(":")[1] for line in lines if line.lower().startswith(("flags", "features"))]
    return set(found[0].split()) if found else set()


def caches() -> list[dict[str, Any]]:
    """The levels that hold data, nearest first: size of one cache, and how many there are."""
    found: dict[str, dict[str, int]] = {}
    for folder in CPUS.glob("cpu[0-9]*/cache/index[0-9]*"):
        kind, level, size, sharing = (
            (folder / name).read_text().strip()
            for name in ("type", "level", "size", "shared_cpu_list")
        )
        if kind != "Instruction":
            found.setdefault(f"L{level}", {})[sharing] = 1024 * int(size.removesuffix("K"))
    return [
        {"level": level, "bytes": max(of_level.values()), "instances": len(of_level)}
        for level, of_level in sorted(found.items())
    ]


def working_sets(levels: list[dict[str, Any]], threads: int) -> dict[str, int]:
    """Bytes for each thread to read: too many for the level before, but for each level's own."""
    sets, before, share = {}, 0, 0
    for level in levels:
        share = level["bytes"] * min(threads, level["instances"]) // threads
        size = share * 3 // 4
        sets[level["level"]] = min(max(size, 2 * before), 4 * before) if before else size
        before = level["bytes"]
    return {**sets, "DRAM": 4 * share}


if __name__ == "__main__":
    sys.exit(main())
