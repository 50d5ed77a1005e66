# SPDX-License-Identifier: Apache-2.0
"""The limits of a machine, as limits.py measures them, in Markdown."""

from typing import Any

import table


def render(report: dict[str, Any]) -> str:
    """A heading, where the numbers are from, and a row for each limit."""
    threads = [f"{count} thread{'s' if count > 1 else ''}" for count in report["threads"]]
    lines = [f"|  | {' | '.join(threads)} |", f"|---|{'--:|' * len(threads)}"]
    for name, cells in rows(report["limits"]):
        cells = cells + [""] * (len(threads) - len(cells))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    caption = f"{report['machine']['cpu']}; {table.source(report)}. The best of many repeats."
    return "\n".join(["### Limits of the machine", "", caption, "", *lines])


def rows(limits: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """The name of each limit, and what it is with one thread and with all."""
    made = []
    for dtype, rates in limits["gflops"].items():
        if rates:
            made.append((f"multiply-adds, {dtype}", [f"{rate:.0f} GFLOP/s" for rate in rates]))
    sizes = {cache["level"]: f", {cache['bytes'] // 1024} KB" for cache in limits["caches"]}
    for level, rates in limits["read_gb_s"].items():
        name = f"reading {level}{sizes.get(level, '')}"
        made.append((name, [f"{rate:.0f} GB/s" for rate in rates]))
    for dtype, time in limits["tanh_ns"].items():
        made.append((f"tanh of one number beside products, {dtype}", [f"{time:.2f} ns"]))
    for dtype, ways in limits["step_ns"].items():
        for way, time in ways.items():
            made.append((f"shortest step {way}, {dtype}", [f"{time:.1f} ns"]))
    if limits["hand_over_ns"] is not None:
        made.append(("hand-over between threads", ["", f"{limits['hand_over_ns']:.0f} ns"]))
    return made
