# SPDX-License-Identifier: Apache-2.0
"""The tables of gpu.py, from its JSON. Losses and red gates stay in.

A speed-up is nn.RNN's time divided by fastrnn's: eager by the wall clock, as a graph by the GPU's.
"""

import statistics
from collections import Counter
from typing import Any

from report import source

MODES = ("inference", "training")
#: Which figure stands for a way of calling.
FIGURES = {"eager": "speedup", "graph": "gpu_speedup"}
WIDTH = 8


def render(report: dict[str, Any]) -> str:
    """Everything that is printed at the end."""
    parts = [caption(report)]
    precisions = dict.fromkeys(case["spec"]["precision"] for case in report["cases"])
    for precision in precisions:
        of_precision = [c for c in report["cases"] if c["spec"]["precision"] == precision]
        for way in FIGURES:
            if any(way in case for case in of_precision):
                parts.append(block(f"{precision}, {way}", of_precision, way))
        wrong = [c for c in of_precision if is_red(c)]
        parts += [f"{c['name']}: {c['error'] or 'gate: ' + c['gate']}" for c in wrong]
    return "\n\n".join([*parts, closing(report)])


def caption(report: dict[str, Any]) -> str:
    """Where and with what the numbers were measured."""
    versions, gpu = report["versions"], report["machine"]["gpu"]
    return (
        f"{gpu['name'] if gpu else report['device']}; fastrnn {versions['fastrnn']}, "
        f"torch {versions['torch']}, CUDA {versions['cuda']}, cuDNN {versions['cudnn']}, "
        f"driver {versions['driver']}; {source(report)}. "
        "Speed-up over nn.RNN, training is forward and backward."
    )


def block(title: str, cases: list[dict[str, Any]], way: str) -> str:
    """One precision called in one way: the grid of both modes, what they amount to, the extras."""
    grid = [case for case in cases if case["part"] != "extra"]
    points = {(case["spec"]["H"], case["spec"]["B"]): case for case in grid}
    rows, columns = (sorted({point[place] for point in points}) for place in (0, 1))
    lines = []
    if points:
        width = WIDTH * len(columns)
        lines.append(f"{title:16}" + "".join(f"{mode:^{width}}  " for mode in MODES).rstrip())
        batches = "".join(f"{f'B {B}':>{WIDTH}}" for B in columns)
        lines.append(f"{'':14}{batches}  {batches}")
    for H in rows:
        cells = [
            "".join(f"{cell(points.get((H, B)), way, mode):>{WIDTH}}" for B in columns)
            for mode in MODES
        ]
        lines.append(f"{f'H {H}':<14}{'  '.join(cells)}")
    lines += [summary(grid, way, mode) for mode in MODES if points]
    lines += [line(case, way) for case in cases if case["part"] == "extra"]
    return "\n".join([*lines, *not_captured(cases, way)])


def not_captured(cases: list[dict[str, Any]], way: str) -> list[str]:
    """Which class could not be captured as a graph, why, and how often."""
    modes = [numbers for case in cases for numbers in case.get(way, {}).values()]
    errors = [item for numbers in modes for item in numbers.items() if item[0].endswith("_error")]
    return [
        f"{key.removesuffix('_error')} not captured, {count} times: {text}"
        for (key, text), count in Counter(errors).items()
    ]


def cell(case: dict[str, Any] | None, way: str, mode: str) -> str:
    """A speed-up, "red" where there must be none, "–" where there is none."""
    if case is not None and is_red(case) and speedup(case, way, mode) is None:
        return "red"
    value = speedup(case, way, mode) if case is not None else None
    return "–" if value is None else f"{value:.2f}"


def speedup(case: dict[str, Any], way: str, mode: str) -> float | None:
    """The speed-up of a case; None if its gate is red or it was not measured."""
    if case["gate"] is not None:
        return None
    value: list[float | None] = case.get(way, {}).get(mode, {}).get(FIGURES[way], [None])
    return value[0]


def summary(cases: list[dict[str, Any]], way: str, mode: str) -> str:
    """The geometric mean over the measured points, and which of them are losses."""
    named = {f"H{c['spec']['H']} B{c['spec']['B']}": speedup(c, way, mode) for c in cases}
    measured = {name: value for name, value in named.items() if value is not None}
    if not measured:
        return f"{mode}: nothing measured"
    mean = statistics.geometric_mean(measured.values())
    losses = [f"{name} ({value:.2f})" for name, value in measured.items() if value < 1]
    below = f"below 1.0x: {', '.join(losses)}" if losses else "none below 1.0x"
    return f"{mode}: geometric mean {mean:.2f}x over {len(measured)} points, {below}"


def line(case: dict[str, Any], way: str) -> str:
    """A case in one line."""
    return f"{case['name']} {way}: " + ", ".join(
        f"{mode} {cell(case, way, mode)}" for mode in MODES
    )


def is_red(case: dict[str, Any]) -> bool:
    """Whether the gate said no, or something raised."""
    return case["gate"] is not None or case["error"] is not None


def closing(report: dict[str, Any]) -> str:
    """How the steps went, and how much is missing."""
    lines = []
    for name, step in report["steps"].items():
        words = [f"{step[key]} {key}" for key in ("passed", "failed", "skipped") if key in step]
        words += [f"{step['seconds']:.0f} s"] if "seconds" in step else []
        lines.append(f"{name}: {step['status']}{' (' + ', '.join(words) + ')' if words else ''}")
        lines += [f"  failed: {test}" for test in step.get("failing", [])]
    wrong = sum(map(is_red, report["cases"]))
    lines.append(f"cases: {len(report['cases'])}, with a red gate or an error: {wrong}")
    missing = report["not_measured"]
    lines += [f"not measured: {len(missing)}, from {missing[0]} on"] if missing else []
    return "\n".join(lines)
