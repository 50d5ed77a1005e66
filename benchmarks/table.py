# SPDX-License-Identifier: Apache-2.0
"""`python benchmarks/table.py [JSON]`: write the tables of fastrnn against nn.RNN from results.

docs/performance.md gets every case, the README those of `HEADLINE`. The newest complete results in
benchmarks/results/ are taken if none are named. `--check` writes nothing and exits with 1 if a page
has another table. Losses stay in.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
#: The place of the whole table, on a page that has another one between `BEGIN` and `END`.
ALL_CASES = "<!-- nn-rnn:begin -->", "<!-- nn-rnn:end -->"
#: The README's cases: usual ones, that of the least gain, and the one that takes the most memory.
HEADLINE = ("one-step", "small", "medium-128", "packed", "row-layers", "large-1024")
COLUMNS = ["(T, B, I, H)", "", "nn.RNN inference", "fastrnn", "speed-up"]
COLUMNS += ["nn.RNN training", "fastrnn", "speed-up", "memory"]


def render(report: dict[str, Any], names: tuple[str, ...] | None = None) -> str:
    """The caption and the table of these cases, by default of all, in Markdown."""
    header = [f"| {' | '.join(COLUMNS)} |", f"|---|---|{'--:|' * (len(COLUMNS) - 2)}"]
    cases = [case for case in report["cases"] if names is None or case["spec"]["name"] in names]
    return "\n".join([caption(report), "", *header, *map(row, cases)])


def caption(report: dict[str, Any]) -> str:
    """Where and with what the numbers were measured, and what the columns are."""
    machine, versions = report["machine"], report["versions"]
    threads = "1 thread" if report["threads"] == 1 else f"{report['threads']} threads"
    return (
        f"{machine['cpu']}, {machine['capability']['fastrnn']}, {threads}; "
        f"fastrnn {versions['fastrnn']}, torch {versions['torch']}, Python {versions['python']}; "
        f"{source(report)}. Median time of a call; training is forward and "
        "backward; memory is fastrnn's peak in training divided by nn.RNN's."
    )


def source(report: dict[str, Any]) -> str:
    """Of which commit and day a report is."""
    commit = report["commit"]
    name = f"commit {commit['hash'][:10]}" if commit else "no commit"
    changes = " with changes" if commit and commit["dirty"] else ""
    return f"{name}{changes}; {report['date'][:10]}"


def row(entry: dict[str, Any]) -> str:
    """One line of the table; nothing but the gate's verdict where results are wrong."""
    spec = entry["spec"]
    cells = [shape(spec), extras(spec)]
    if entry["gate"] is not None:
        return f"| {' | '.join([*cells, 'wrong results', *[''] * 6])} |"
    for mode in ("inference", "training"):
        numbers = entry["modes"][mode]
        cells += [duration(numbers["nn_rnn_us"]), duration(numbers["fastrnn_us"])]
        cells.append(f"{numbers['speedup']:.2f}")
    training = entry["modes"]["training"]
    cells.append(f"{training['fastrnn_peak_bytes'] / training['nn_rnn_peak_bytes']:.2f}")
    return f"| {' | '.join(cells)} |"


def shape(spec: dict[str, Any]) -> str:
    """The sizes of a case."""
    return f"({spec['T']}, {spec['B']}, {spec['I']}, {spec['H']})"


def extras(spec: dict[str, Any]) -> str:
    """What differs from one forward layer of tanh in float32."""
    words = [spec["dtype"]] if spec["dtype"] != "float32" else []
    words += [spec["nonlinearity"]] if spec["nonlinearity"] != "tanh" else []
    words += [f"{spec['num_layers']} layers"] if spec["num_layers"] > 1 else []
    words += [name for name in ("bidirectional", "batch_first") if spec[name]]
    lengths = spec["lengths"]
    words += [f"packed, lengths {min(lengths)} to {max(lengths)}"] if lengths else []
    return ", ".join(words)


def duration(microseconds: float) -> str:
    """Three digits and a unit."""
    rounded = float(f"{microseconds:.3g}")
    units = ((1e0, "µs"), (1e3, "ms"), (1e6, "s"))
    factor, unit = max((f, u) for f, u in units if rounded >= f or f == 1)
    return f"{rounded / factor:g} {unit}"


def newest(study: str | None = None, like: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """The latest complete results of a CPU, by the date in them; None if there are none.

    Parameters
    ----------
    study : str, optional
        ``"peers"``, ``"scaling"``, ``"busy"`` or ``"limits"``: results of compare.py, scaling.py,
        busy.py or limits.py, in place of run.py's.
    like : dict, optional
        A report: of the same processor and numbers of cores and threads alone.
    """
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("*.json")]
    reports = [r for r in reports if r.get("device") == "cpu" and r.get("complete")]
    reports = [r for r in reports if r.get("study") == study]
    if like is not None:
        reports = [r for r in reports if conditions(r) == conditions(like)]
    return max(reports, key=lambda report: str(report["date"]), default=None)


def conditions(report: dict[str, Any]) -> tuple[Any, ...]:
    """What must be the same for times to be compared."""
    machine = report["machine"]
    return machine["cpu"], machine["cores"], report["threads"]


def updated(text: str, table: str | None, place: tuple[str, str] = (BEGIN, END)) -> str:
    """A page's text with this table in its place, or with none.

    Raises
    ------
    ValueError
        If there is not one place for it.
    """
    begin, end = place
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"the table's place is one line {begin}, one line {end}")
    before, rest = text.split(begin)
    _, after = rest.split(end)
    content = f"\n\n{table}\n\n" if table else "\n"
    return f"{before}{begin}{content}{end}{after}"


def main(argv: list[str] | None = None) -> int:
    """Write both tables, or check them.

    Parameters
    ----------
    argv : list of str, optional
        Arguments, in place of the command line's.

    Returns
    -------
    int
        0, or 1 if `--check` finds another table.
    """
    short = partial(render, names=HEADLINE)
    return max(
        write(_parser(), argv, "readme", None, short),
        write(_parser(), argv, "performance", None, render, ALL_CASES),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Write the tables of fastrnn against nn.RNN.")
    pages = {"readme": ROOT / "README.md", "performance": ROOT / "docs" / "performance.md"}
    for name, path in pages.items():
        parser.add_argument(f"--{name}", type=Path, default=path, metavar="PATH")
    return parser


def write(
    parser: argparse.ArgumentParser,
    argv: list[str] | None,
    page: str,
    study: str | None,
    render: Callable[[dict[str, Any]], str],
    place: tuple[str, str] = (BEGIN, END),
) -> int:
    """Write a table of results into the page that the argument `page` names, or check it."""
    parser.add_argument("json", nargs="?", type=Path, help="results (default: the newest)")
    parser.add_argument("--check", action="store_true", help="only tell whether it is up to date")
    args = parser.parse_args(argv)
    path: Path = getattr(args, page)
    report = json.loads(args.json.read_text(encoding="utf-8")) if args.json else newest(study)
    old = path.read_text(encoding="utf-8")
    new = updated(old, render(report) if report else None, place)
    if not args.check:
        path.write_text(new, encoding="utf-8")
    elif new != old:
        print(f"{path.name} has not the table of the newest results: run this without --check")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
