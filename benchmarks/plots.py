# SPDX-License-Identifier: Apache-2.0
"""`python benchmarks/plots.py`: the figures in docs/figures/, from the newest complete results.

Nothing is measured here: the numbers are those of `run.py peers` and `run.py scaling`. The same
JSON and the same matplotlib give the same bytes.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib
from cases import COMMON, VARIED, BenchmarkCase, from_spec, scaled
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator
from report import ROOT, newest
from table import duration, extras, label, shape, split

FIGURES = ROOT / "docs" / "figures"
STYLE = {
    "svg.hashsalt": "fastrnn",
    "font.size": 8.0,
    "axes.titlesize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
}
#: Colour and marker of each peer, the same in all figures; from a palette for the colour-blind.
LOOKS = {
    "fastrnn": ("#D55E00", "o"),
    "nn_rnn": ("#0072B2", "s"),
    "jax_scan": ("#009E73", "^"),
    "onednn": ("#555555", "D"),
}
FEW_TICKS = 5
NAMES = {"T": "steps T", "B": "batch B", "H": "features H (= I)", "num_layers": "layers"}


def speedups(report: dict[str, Any]) -> Figure:
    """Bars for each case: nn.RNN's and the fastest peer's time, divided by fastrnn's."""
    cases = report["cases"]
    height = 0.6 + 0.31 * len(cases)
    figure = Figure(figsize=(11, max(height, 2.5)))
    axes = figure.subplots(1, 2, sharey=True)
    for axis, mode in zip(axes, ("inference", "training"), strict=True):
        for offset, key, colour, name in (
            (-0.2, "nn_rnn", LOOKS["nn_rnn"][0], "nn.RNN / fastrnn"),
            (0.2, "peer", LOOKS["onednn"][0], "fastest peer / fastrnn"),
        ):
            modes = [(i, case["modes"][mode]) for i, case in enumerate(cases)]
            modes = [(i, found) for i, found in modes if key in found["ratio"]]
            places = [i + offset for i, _ in modes]
            ratios = [found["ratio"][key][0] for _, found in modes]
            # From 1, to the left where fastrnn loses.
            widths = [ratio - 1 for ratio in ratios]
            axis.barh(places, widths, height=0.36, left=1, color=colour, label=name)
            for place, ratio, (_, found) in zip(places, ratios, modes, strict=True):
                best = label(split(found["fastest"][key])[0])
                who = f"  {best}" if key == "peer" else ""
                axis.annotate(f"{short(ratio)}{who}", (max(ratio, 1), place), (3, 0),
                              textcoords="offset points", va="center", fontsize=6)  # fmt: skip
        axis.set_xscale("log")
        plain_ticks(axis.xaxis)
        low, high = axis.get_xlim()
        # Room for what is written after the bars.
        axis.set_xlim(low, high * 2.2)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.grid(visible=False, axis="y")
        axis.set_title(f"{mode}: time divided by fastrnn's")
        axis.tick_params(axis="y", length=0)
    axes[0].set_yticks(range(len(cases)), [case_label(from_spec(case["spec"])) for case in cases])
    axes[0].set_ylim(len(cases) - 0.4, -0.6)
    handles, names = axes[0].get_legend_handles_labels()
    below(figure, report, handles, names)
    return figure


def scalings(report: dict[str, Any]) -> Figure:
    """The time of a call against each of T, B, H, layers and threads, one row for each mode."""
    most = max(report["threads"])
    varied = [*VARIED, "threads"]
    figure = Figure(figsize=(13, 5.6))
    axes = figure.subplots(2, len(varied), sharey="row")
    peers = [peer for peer in LOOKS if peer in report["settings"]["peers"]]
    for row, mode in zip(axes, ("inference", "training"), strict=True):
        for axis, name in zip(row, varied, strict=True):
            for peer in peers:
                points = points_of(report, name, mode, peer, most)
                if points:
                    colour, marker = LOOKS[peer]
                    axis.plot(*zip(*points, strict=True), color=colour, marker=marker,
                              markersize=3.5, linewidth=1.2, label=label(peer))  # fmt: skip
            axis.set_xscale("log", base=2 if name != "T" else 10)
            axis.set_yscale("log")
            plain_ticks(axis.xaxis, x_values(report, name) if name != "T" else None)
            axis.yaxis.set_major_formatter(FuncFormatter(lambda us, _: duration(us)))
            axis.yaxis.set_minor_formatter(NullFormatter())
        row[0].set_ylabel(mode)
    for axis, name in zip(axes[1], varied, strict=True):
        axis.set_xlabel(NAMES.get(name, name))
    T, B, H = (COMMON[name] for name in ("T", "B", "H"))
    axes[0][0].set_title(
        f"time of a call; else T = {T}, B = {B}, I = H = {H}, one layer, "
        f"{most} {'thread' if most == 1 else 'threads'}",
        loc="left",
    )
    handles, names = axes[0][0].get_legend_handles_labels()
    below(figure, report, handles, names)
    return figure


def points_of(
    report: dict[str, Any], varied: str, mode: str, peer: str, most: int
) -> list[tuple[int, float]]:
    """What is varied and the median time in microseconds, of one peer."""
    if varied == "threads":
        # The common shape, in any of the lists.
        modes = dict(series(report, "T")).get(COMMON["T"], {})
        found = modes.get(mode, {}).get("us", {}).items()
        return [(int(split(who)[1]), us) for who, us in found if split(who)[0] == peer]
    points = [(value, modes[mode]["us"]) for value, modes in series(report, varied)]
    who = f"{peer}@{most}"
    return [(value, us[who]) for value, us in points if who in us]


def series(report: dict[str, Any], varied: str) -> list[tuple[int, dict[str, Any]]]:
    """The values of what is varied, ascending, each with its case's modes."""
    by_name = {case["spec"]["name"]: case["modes"] for case in report["cases"]}
    wanted = [(value, scaled(varied, value).name) for value in VARIED[varied]]
    return [(value, by_name[name]) for value, name in wanted if name in by_name]


def x_values(report: dict[str, Any], varied: str) -> list[int]:
    """What the axis is labelled with: each value, or every second one where there are many."""
    values: list[int] = report["threads"] if varied == "threads" else VARIED[varied]
    return values if len(values) <= FEW_TICKS else values[::2]


def short(ratio: float) -> str:
    """Two digits, or all before the point."""
    return f"{ratio:.2f}" if ratio < 1 else f"{ratio:.1f}" if ratio < 10 else f"{ratio:.0f}"


def plain_ticks(axis: Any, values: list[int] | None = None) -> None:
    """Write 1, 10, 100 and not powers; at these values if there are any."""
    if values:
        axis.set_ticks(values)
        axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def below(figure: Figure, report: dict[str, Any], handles: list[Any], names: list[str]) -> None:
    """The legend above the panels; below them the machine and the versions."""
    inch = 1 / figure.get_figheight()
    figure.legend(handles, names, loc="upper right", ncols=len(names))
    versions = ", ".join(f"{name} {v}" for name, v in report["versions"].items() if v)
    figure.text(0.01, 0.08 * inch, f"{report['machine']['cpu']}; {report['date'][:10]}; {versions}",
                fontsize=6, color="0.4")  # fmt: skip
    figure.tight_layout(rect=(0, 0.2 * inch, 1, 1 - 0.25 * inch))


def case_label(case: BenchmarkCase) -> str:
    """The shape of a case and what is special in it."""
    return f"{extras(case)}  {shape(case)}".strip()


def save(figure: Figure, path: Path) -> None:
    """Write the figure, without the date."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None})


def main(argv: list[str] | None = None) -> int:
    """Draw what there are results for.

    Parameters
    ----------
    argv : list of str, optional
        Arguments, in place of the command line's.

    Returns
    -------
    int
        0.
    """
    parser = argparse.ArgumentParser(description="Draw the figures from committed results.")
    parser.add_argument("--output", type=Path, default=FIGURES, metavar="DIR")
    args = parser.parse_args(argv)
    with matplotlib.rc_context(STYLE):
        for study, draw, name in (
            ("peers", speedups, "speedups.svg"),
            ("scaling", scalings, "scaling.svg"),
        ):
            report = newest(study)
            if report is None:
                print(f"no complete results of {study}", file=sys.stderr)
            else:
                save(draw(report), args.output / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
