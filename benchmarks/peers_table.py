# SPDX-License-Identifier: Apache-2.0
"""`python benchmarks/peers_table.py [JSON]`: write the results of compare.py into a page.

A cell is the median time with the better number of threads, and that number. Losses stay in.
`--check` writes nothing and exits with 1 if docs/performance.md has another table.
"""

import argparse
import sys
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import busy_table
import limits_table
import table
from floor import floor
from table import duration, extras, shape

#: What peers are called in tables and figures.
LABELS = {
    "nn_rnn": "nn.RNN",
    "nn_rnn_cell": "nn.RNNCell",
    "script_loop": "jit.script loop",
    "compiled_nn_rnn": "compile(nn.RNN)",
    "compiled_loop": "compiled loop",
    "jax_scan": "JAX scan",
    "onnx_runtime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "onednn": "oneDNN",
}

#: What the caption says of the columns.
FLOOR = "floor: a bound for this machine (see below). × floor: fastrnn's time divided by it."
#: Cases of this many sequences and features are bound by arithmetic.
MANY_SEQUENCES, MANY_FEATURES = 16, 128


def label(peer: str) -> str:
    """What a peer is called."""
    return LABELS.get(peer, peer)


def render(report: dict[str, Any]) -> str:
    """A caption, for each mode a table, what was not run; busy cores and limits, if known."""
    limits, busy = (table.newest(study, like=report) for study in ("limits", "busy"))
    parts = [caption(report) + (f" {FLOOR}" if limits else "")]
    modes = dict.fromkeys(mode for case in report["cases"] for mode in case["modes"])
    for mode in modes:
        cases = [case for case in report["cases"] if mode in case["modes"]]
        parts += [f"### {mode.capitalize()}", summary(cases, mode)]
        parts += [of_floor(cases, mode, limits) if limits else "", of_mode(cases, mode, limits)]
    parts += [not_run(report), busy_table.render(busy) if busy else ""]
    parts += [limits_table.render(limits) if limits else ""]
    return "\n\n".join(filter(None, parts))


def caption(report: dict[str, Any]) -> str:
    """Where and with what the numbers were measured, and what the columns are."""
    machine = report["machine"]
    versions = ", ".join(f"{name} {v}" for name, v in report["versions"].items() if v)
    threads = " or ".join(map(str, report["threads"]))
    threads += " thread" if report["threads"] == [1] else " threads, whichever is faster (@)"
    return (
        f"{machine['cpu']}, {machine['capability']['fastrnn']}; {versions}; "
        f"{table.source(report)}. Median time of a call with {threads}. × nn.RNN and × best: "
        "how many times as long nn.RNN and the fastest peer take as fastrnn."
    )


def summary(cases: list[dict[str, Any]], mode: str) -> str:
    """Means over the cases, and how many are lost."""
    bests = [case["modes"][mode]["best"] for case in cases]
    ratios = [best["peer"]["ratio"] for best in bests if "peer" in best]
    ours = [best["nn_rnn"]["ratio"] for best in bests if "nn_rnn" in best]
    if not ratios or not ours:
        return ""
    lost = sum(ratio < 1 for ratio in ratios)
    return (
        f"Geometric means: {geometric_mean(ours):.2f} against nn.RNN, "
        f"{geometric_mean(ratios):.2f} against the fastest peer of each case, "
        f"which is faster in {lost} of {len(ratios)}."
    )


def of_floor(cases: list[dict[str, Any]], mode: str, limits: dict[str, Any]) -> str:
    """The mean distance from the floor where arithmetic decides."""
    large = [case for case in cases if case["spec"]["B"] >= MANY_SEQUENCES]
    large = [case for case in large if case["spec"]["H"] >= MANY_FEATURES]
    ratios = [ratio for case in large if (ratio := to_floor(case, mode, limits)[1])]
    if not ratios:
        return ""
    return (
        f"Geometric mean of × floor: {geometric_mean(ratios):.2f}, over the {len(ratios)} cases "
        f"with B ≥ {MANY_SEQUENCES} and H ≥ {MANY_FEATURES}."
    )


def to_floor(
    case: dict[str, Any], mode: str, limits: dict[str, Any]
) -> tuple[float | None, float | None]:
    """The floor of a case in microseconds, and fastrnn's time divided by it, as far as known."""
    bound, best = floor(case["spec"], mode, limits), case["modes"][mode]["best"]
    return bound, best["fastrnn"]["us"] / bound if bound and "fastrnn" in best else None


def of_mode(cases: list[dict[str, Any]], mode: str, limits: dict[str, Any] | None = None) -> str:
    """The table of a mode: the peers that ran at least once, a row for each case."""
    results = [result for case in cases for result in case["modes"][mode]["results"]]
    peers = list(dict.fromkeys(r["peer"] for r in results if "us" in r or "wrong" in r))
    columns = ["(T, B, I, H)", "", *map(label, peers), *(["floor", "× floor"] if limits else [])]
    columns += ["× nn.RNN", "× best", "best peer"]
    lines = [f"| {' | '.join(columns)} |", f"|---|---|{'--:|' * (len(columns) - 3)}---|"]
    for case in cases:
        spec, found = case["spec"], case["modes"][mode]
        cells = [shape(spec), extras(spec)]
        cells += [cell([r for r in found["results"] if r["peer"] == peer]) for peer in peers]
        if limits:
            bound, ratio = to_floor(case, mode, limits)
            cells += [duration(bound) if bound else "–", f"{ratio:.2f}" if ratio else "–"]
        best = found["best"]
        cells += [f"{best[a]['ratio']:.2f}" if a in best else "–" for a in ("nn_rnn", "peer")]
        cells.append(label(best["peer"]["name"]) if "peer" in best else "–")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(results: list[dict[str, Any]]) -> str:
    """The better time of a peer; ``wrong`` if its results were, with any number of threads."""
    if any("wrong" in result for result in results):
        return "wrong"
    timed = [result for result in results if "us" in result]
    if not timed:
        return "–"
    best = min(timed, key=lambda result: float(result["us"]))
    return f"{duration(best['us'])} @{best['threads']}"


def not_run(report: dict[str, Any]) -> str:
    """What is missing in the tables, and why."""
    lines = [
        f"- {label(name)}: {reason}" for name, reason in report.get("not_installed", {}).items()
    ]
    reasons: dict[tuple[str, str], list[str]] = {}
    for case in report["cases"]:
        for mode, found in case["modes"].items():
            for result in found["results"]:
                reason = result.get("not_run") or ("wrong" in result and "WRONG RESULTS")
                if reason:
                    where = reasons.setdefault((result["peer"], reason), [])
                    where.append(f"{case['spec']['name']} {mode}")
    for (peer, reason), where in reasons.items():
        distinct = list(dict.fromkeys(where))
        shown = ", ".join(distinct) if len(distinct) <= 3 else f"{len(distinct)} measurements"
        lines.append(f"- {label(peer)}: {reason} ({shown})")
    return "\n".join(["Not run:", "", *lines]) if lines else ""


def main(argv: list[str] | None = None) -> int:
    """Write the tables, or check them."""
    parser = argparse.ArgumentParser(description="Write the tables of docs/performance.md.")
    page = table.ROOT / "docs" / "performance.md"
    parser.add_argument("--page", type=Path, default=page, metavar="PATH")
    return table.write(parser, argv, "page", "peers", render)


if __name__ == "__main__":
    sys.exit(main())
