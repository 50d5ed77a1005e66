# SPDX-License-Identifier: Apache-2.0
"""`python benchmarks/table.py`: write the tables of the newest complete results into the pages.

The README gets the cases of `HEADLINE`, docs/performance.md all of them and the other studies.
`--check` writes nothing and exits with 1 if a page has other tables. Losses stay in.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from cases import BenchmarkCase, dtype_name, from_spec
from floor import floor
from report import ROOT, load, newest, source

Report = dict[str, Any]

#: The README's cases: usual ones, that of the least gain, and the one that takes the most memory.
HEADLINE = ("one-step", "small", "medium-128", "packed", "row-layers", "large-1024")
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


def main(argv: list[str] | None = None) -> int:
    """Write the tables, or check them.

    Parameters
    ----------
    argv : list of str, optional
        Arguments, in place of the command line's.

    Returns
    -------
    int
        0, or 1 if `--check` finds other tables.
    """
    parser = argparse.ArgumentParser(description="Write the tables of benchmarks into the pages.")
    parser.add_argument("--check", action="store_true", help="only tell whether they are current")
    parser.add_argument("--json", type=Path, help="results of this file alone, complete or not")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", metavar="PATH")
    page = ROOT / "docs" / "performance.md"
    parser.add_argument("--performance", type=Path, default=page, metavar="PATH")
    args = parser.parse_args(argv)
    wanted = {
        (args.readme, "benchmark"): ("bench", partial(render, names=HEADLINE)),
        (args.performance, "nn-rnn"): ("bench", render),
        (args.performance, "benchmark"): ("peers", render),
    }
    named = load(args.json) if args.json else None
    status = 0
    for (path, place), (study, made) in wanted.items():
        if named and named["study"] != study:
            continue
        report = named or newest(study)
        old = path.read_text(encoding="utf-8")
        new = updated(old, place, made(report) if report else None)
        if args.check and new != old:
            print(f"{path.name} has not the newest results at {place!r}: run without --check")
            status = 1
        elif new != old:
            path.write_text(new, encoding="utf-8")
    return status


def updated(text: str, place: str, table: str | None) -> str:
    """A page's text with this table in its place, or with none.

    Raises
    ------
    ValueError
        If there is not one place for it.
    """
    begin, end = f"<!-- {place}:begin -->", f"<!-- {place}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"the table's place is one line {begin}, one line {end}")
    before, rest = text.split(begin)
    _, after = rest.split(end)
    content = f"\n\n{table}\n\n" if table else "\n"
    return f"{before}{begin}{content}{end}{after}"


def render(report: Report, names: Iterable[str] | None = None) -> str:
    """The tables of a report in Markdown; of these cases alone, if there are any."""
    renderers: dict[str, Callable[[Report], str]] = {
        "bench": of_bench, "peers": of_peers, "scaling": of_peers, "busy": of_busy,
        "limits": of_limits,
    }  # fmt: skip
    if names is not None:
        cases = [case for case in report["cases"] if case["spec"]["name"] in names]
        report = {**report, "cases": cases}
    return renderers[report["study"]](report)


def markdown(columns: list[str], rows: Iterable[list[str]], texts: str = "--") -> str:
    """A table; `texts`: a letter for each column, ``"-"`` for text and ``":"`` for numbers."""
    marks = {"-": "---", ":": "--:"}
    lines = [columns, *rows]
    rule = "|".join(marks[mark] for mark in texts.ljust(len(columns), ":"))
    head, *rest = [f"| {' | '.join(cells)} |" for cells in lines]
    return "\n".join([head, f"|{rule}|", *rest])


def shape(case: BenchmarkCase) -> str:
    """The sizes of a case."""
    return f"({case.T}, {case.B}, {case.I}, {case.H})"


def extras(case: BenchmarkCase) -> str:
    """What differs from one forward layer of tanh in float32."""
    words = [dtype_name(case)] if dtype_name(case) != "float32" else []
    words += [case.nonlinearity] if case.nonlinearity != "tanh" else []
    words += [f"{case.num_layers} layers"] if case.num_layers > 1 else []
    words += [name for name in ("bidirectional", "batch_first") if getattr(case, name)]
    lengths = case.lengths
    words += [f"packed, lengths {min(lengths)} to {max(lengths)}"] if lengths else []
    return ", ".join(words)


def duration(microseconds: float) -> str:
    """Three digits and a unit."""
    rounded = float(f"{microseconds:.3g}")
    units = ((1e0, "µs"), (1e3, "ms"), (1e6, "s"))
    factor, unit = max((f, u) for f, u in units if rounded >= f or f == 1)
    return f"{rounded / factor:g} {unit}"


def label(peer: str) -> str:
    """What a peer is called."""
    return LABELS.get(peer, peer)


def split(who: str) -> tuple[str, str]:
    """Peer and number of threads of a key such as ``fastrnn@2``."""
    peer, threads = who.split("@")
    return peer, threads


def of_bench(report: Report) -> str:
    """fastrnn and nn.RNN: caption, and a row for each case with times, speed-ups and memory."""
    versions, (count,) = report["versions"], report["threads"]
    threads = "1 thread" if count == 1 else f"{count} threads"
    caption = (
        f"{report['machine']['cpu']}, {report['machine']['capability']['fastrnn']}, {threads}; "
        f"fastrnn {versions['fastrnn']}, torch {versions['torch']}, Python {versions['python']}; "
        f"{source(report)}. Median time of a call; training is forward and "
        "backward; memory is fastrnn's peak in training divided by nn.RNN's."
    )
    columns = ["(T, B, I, H)", "", "nn.RNN inference", "fastrnn", "speed-up"]
    columns += ["nn.RNN training", "fastrnn", "speed-up", "memory"]
    return f"{caption}\n\n{markdown(columns, (bench_row(c, count) for c in report['cases']))}"


def bench_row(entry: Report, threads: int) -> list[str]:
    """One case; nothing but the gate's verdict where results are wrong."""
    case = from_spec(entry["spec"])
    cells = [shape(case), extras(case)]
    ours, theirs = f"fastrnn@{threads}", f"nn_rnn@{threads}"
    if any({ours, theirs} - mode["us"].keys() for mode in entry["modes"].values()):
        wrong = any("wrong" in mode for mode in entry["modes"].values())
        return [*cells, "wrong results" if wrong else "not run", *[""] * 6]
    for mode in ("inference", "training"):
        found = entry["modes"][mode]
        cells += [duration(found["us"][who]) for who in (theirs, ours)]
        cells.append(f"{found['ratio']['nn_rnn'][0]:.2f}")
    peaks = entry["modes"]["training"]["peak_bytes"]
    return [*cells, f"{peaks[ours] / peaks[theirs]:.2f}"]


def of_peers(report: Report) -> str:
    """A caption, for each mode a table, what was not run; busy cores and limits, if known."""
    limits, busy = (newest(study, like=report) for study in ("limits", "busy"))
    parts = [peers_caption(report) + (f" {FLOOR}" if limits else "")]
    modes = dict.fromkeys(mode for case in report["cases"] for mode in case["modes"])
    for mode in modes:
        cases = [case for case in report["cases"] if mode in case["modes"]]
        parts += [f"### {mode.capitalize()}", summary(cases, mode)]
        parts += [of_floor(cases, mode, limits) if limits else "", of_mode(cases, mode, limits)]
    parts += [not_run(report), of_busy(busy) if busy else "", of_limits(limits) if limits else ""]
    return "\n\n".join(filter(None, parts))


def peers_caption(report: Report) -> str:
    """Where and with what the numbers were measured, and what the columns are."""
    machine = report["machine"]
    versions = ", ".join(f"{name} {v}" for name, v in report["versions"].items() if v)
    threads = " or ".join(map(str, report["threads"]))
    threads += " thread" if report["threads"] == [1] else " threads, whichever is faster (@)"
    return (
        f"{machine['cpu']}, {machine['capability']['fastrnn']}; {versions}; "
        f"{source(report)}. Median time of a call with {threads}. × nn.RNN and × best: "
        "how many times as long nn.RNN and the fastest peer take as fastrnn."
    )


def summary(cases: list[Report], mode: str) -> str:
    """Means over the cases, and how many are lost."""
    found = [case["modes"][mode]["ratio"] for case in cases]
    ours, ratios = ([r[name][0] for r in found if name in r] for name in ("nn_rnn", "peer"))
    if not ratios or not ours:
        return ""
    lost = sum(ratio < 1 for ratio in ratios)
    return (
        f"Geometric means: {geometric_mean(ours):.2f} against nn.RNN, "
        f"{geometric_mean(ratios):.2f} against the fastest peer of each case, "
        f"which is faster in {lost} of {len(ratios)}."
    )


def of_floor(cases: list[Report], mode: str, limits: Report) -> str:
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


def to_floor(entry: Report, mode: str, limits: Report) -> tuple[float | None, float | None]:
    """The floor of a case in microseconds, and fastrnn's time divided by it, as far as known."""
    bound, found = floor(from_spec(entry["spec"]), mode, limits), entry["modes"][mode]
    ours = found["fastest"].get("fastrnn")
    return bound, found["us"][ours] / bound if bound and ours else None


def of_mode(cases: list[Report], mode: str, limits: Report | None = None) -> str:
    """The table of a mode: the peers that ran at least once, a row for each case."""
    found = [case["modes"][mode] for case in cases]
    ran = [who for each in found for who in [*each["us"], *each.get("wrong", {})]]
    peers = list(dict.fromkeys(split(who)[0] for who in ran))
    columns = ["(T, B, I, H)", "", *map(label, peers), *(["floor", "× floor"] if limits else [])]
    columns += ["× nn.RNN", "× best", "best peer"]
    rows = [mode_row(case, mode, peers, limits) for case in cases]
    return markdown(columns, rows, "--".ljust(len(columns) - 1, ":") + "-")


def mode_row(entry: Report, mode: str, peers: list[str], limits: Report | None) -> list[str]:
    """One case in one mode."""
    case, found = from_spec(entry["spec"]), entry["modes"][mode]
    cells = [shape(case), extras(case), *(cell(found, peer) for peer in peers)]
    if limits:
        bound, ratio = to_floor(entry, mode, limits)
        cells += [duration(bound) if bound else "–", f"{ratio:.2f}" if ratio else "–"]
    ratios = found["ratio"]
    cells += [f"{ratios[name][0]:.2f}" if name in ratios else "–" for name in ("nn_rnn", "peer")]
    best = found["fastest"].get("peer") if "peer" in ratios else None
    return [*cells, label(split(best)[0]) if best else "–"]


def cell(mode: Report, peer: str) -> str:
    """The better time of a peer; ``wrong`` if its results were, with any number of threads."""
    if any(split(who)[0] == peer for who in mode.get("wrong", {})):
        return "wrong"
    times = {who: us for who, us in mode["us"].items() if split(who)[0] == peer}
    if not times:
        return "–"
    best = min(times, key=times.__getitem__)
    return f"{duration(times[best])} @{split(best)[1]}"


def not_run(report: Report) -> str:
    """What is missing in the tables, and why."""
    lines = [f"- {label(name)}: {reason}" for name, reason in report["not_installed"].items()]
    reasons: dict[tuple[str, str], list[str]] = {}
    for entry in report["cases"]:
        for mode, found in entry["modes"].items():
            missing = [*found.get("not_run", {}).items()]
            missing += [(who, "WRONG RESULTS") for who in found.get("wrong", {})]
            for who, reason in missing:
                where = reasons.setdefault((who.split("@")[0], reason), [])
                where.append(f"{entry['spec']['name']} {mode}")
    for (peer, reason), where in reasons.items():
        distinct = list(dict.fromkeys(where))
        shown = ", ".join(distinct) if len(distinct) <= 3 else f"{len(distinct)} measurements"
        lines.append(f"- {label(peer)}: {reason} ({shown})")
    return "\n".join(["Not run:", "", *lines]) if lines else ""


def of_busy(report: Report) -> str:
    """Where threads come late: a heading, where the numbers are from, a row for case and mode."""
    settings = report["settings"]
    counts = [str(count) for count in settings["busy"]]
    columns = [f"{peer}@{n}" for peer in settings["peers"] for n in report["threads"]]
    rows = []
    for entry in report["cases"]:
        case = from_spec(entry["spec"])
        for mode, found in entry["modes"].items():
            times = [[t[who] for t in found["us"].values() if who in t] for who in columns]
            cells = [", ".join(map(duration, each)) for each in times]
            rows.append([shape(case), extras(case), mode, *cells])
    names = [f"{'nn.RNN' if who.startswith('nn_rnn') else 'fastrnn'} @{split(who)[1]}"
             for who in columns]  # fmt: skip
    caption = (
        f"{report['machine']['cpu']}; {source(report)}. Mean time of a call with so many "
        f"threads (@), beside {', '.join(counts[:-1])} and {counts[-1]} processes that never rest, "
        f"and last of calls {round(1000 * settings['pause'])} ms apart."
    )
    table = markdown(["(T, B, I, H)", "", "", *names], rows, "---")
    return f"### On busy cores\n\n{caption}\n\n{table}"


def of_limits(report: Report) -> str:
    """A heading, where the numbers are from, and a row for each limit."""
    threads = [f"{count} thread{'s' if count > 1 else ''}" for count in report["threads"]]
    rows = [[*row, *[""] * (1 + len(threads) - len(row))] for row in limit_rows(report["limits"])]
    caption = f"{report['machine']['cpu']}; {source(report)}. The best of many repeats."
    table = markdown(["", *threads], rows, "-")
    return f"### Limits of the machine\n\n{caption}\n\n{table}"


def limit_rows(limits: Report) -> list[list[str]]:
    """The name of each limit, and what it is with one thread and with all."""
    rows = []
    for dtype, rates in limits["gflops"].items():
        if rates:
            rows.append([f"multiply-adds, {dtype}", *(f"{rate:.0f} GFLOP/s" for rate in rates)])
    sizes = {cache["level"]: f", {cache['bytes'] // 1024} KB" for cache in limits["caches"]}
    for level, rates in limits["read_gb_s"].items():
        name = f"reading {level}{sizes.get(level, '')}"
        rows.append([name, *(f"{rate:.0f} GB/s" for rate in rates)])
    for dtype, time in limits["tanh_ns"].items():
        rows.append([f"tanh of one number beside products, {dtype}", f"{time:.2f} ns"])
    for dtype, ways in limits["step_ns"].items():
        rows += [[f"shortest step {way}, {dtype}", f"{t:.1f} ns"] for way, t in ways.items()]
    if limits["hand_over_ns"] is not None:
        rows.append(["hand-over between threads", "", f"{limits['hand_over_ns']:.0f} ns"])
    return rows


if __name__ == "__main__":
    sys.exit(main())
