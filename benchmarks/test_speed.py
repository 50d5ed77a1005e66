# SPDX-License-Identifier: Apache-2.0
"""`pytest benchmarks/test_speed.py --benchmark-only`: both classes, side by side.

For a look at one case (`-k`) or a comparison with a saved run; nothing here asserts a time. The
published numbers come from run.py, which times the classes in turns and gates their results.
"""

from typing import Any

import pytest
import torch
from cases import CASES, CLASSES, MODES, BenchmarkCase


@pytest.mark.parametrize("class_name", CLASSES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_speed(benchmark: Any, case: BenchmarkCase, mode: str, class_name: str) -> None:
    """Time one class on one case, in the group of what it is to be compared with."""
    benchmark.group = f"{case.name} {mode}"
    step = case.step(class_name, mode)
    with torch.inference_mode(mode == "inference"):
        benchmark(step)
