# SPDX-License-Identifier: Apache-2.0
"""`python benchmarks/scaling.py`: the time of a call against T, B, H, the layers and the threads.

One of them is varied at a time, from one common shape. Measured as in compare.py, gate included;
I = H. The threads are varied with `--threads`: by default every power of two that the machine has.
"""

import sys
from typing import Any

import compare
import torch
from cases import BenchmarkCase

#: The common shape, and what it is varied to; the shape itself is in each list.
BASE = {"T": 100, "B": 32, "H": 128, "num_layers": 1}
VALUES = {
    "T": [1, 3, 10, 30, 100, 300, 1000],
    "B": [1, 2, 4, 8, 16, 32, 64, 128, 256],
    "H": [8, 16, 32, 64, 128, 256, 512, 1024],
    "num_layers": [1, 2, 4, 8],
}
PEERS = ["fastrnn", "nn_rnn", "jax_scan", "onednn"]


def case_of(varied: str, value: int) -> BenchmarkCase:
    """The common shape with one of its numbers changed."""
    sizes = {**BASE, varied: value}
    name = "base" if sizes == BASE else f"{varied}-{value}"
    return BenchmarkCase(**sizes, I=sizes["H"], name=name, reason=f"against {varied}")


def cases() -> list[BenchmarkCase]:
    """Every shape of the study, the common one once."""
    made = [case_of(varied, value) for varied in VALUES for value in VALUES[varied]]
    return list({case.name: case for case in made}.values())


def main(argv: list[str] | None = None) -> int:
    """Measure and write.

    Parameters
    ----------
    argv : list of str, optional
        Arguments, in place of the command line's; those of compare.py.

    Returns
    -------
    int
        As of compare.py.
    """
    cores = torch.get_num_threads()
    powers = {2**i for i in range(cores.bit_length()) if 2**i <= cores}
    return compare.study("scaling", cases(), argv, PEERS, sorted({*powers, cores}))


def series(report: dict[str, Any], varied: str) -> list[tuple[int, dict[str, Any]]]:
    """The values of what is varied, ascending, each with its case's modes."""
    by_name = {case["spec"]["name"]: case["modes"] for case in report["cases"]}
    wanted = [(value, case_of(varied, value).name) for value in VALUES[varied]]
    return [(value, by_name[name]) for value, name in wanted if name in by_name]


if __name__ == "__main__":
    sys.exit(main())
