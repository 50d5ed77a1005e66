# SPDX-License-Identifier: Apache-2.0
"""fastrnn.testing, by which all results are judged: it passes what is right and finds the rest."""

import subprocess
import sys

import pytest
import torch
from accuracy import ExactProducts

from fastrnn import testing

EXACT = {"output": torch.linspace(1, 2, 5000, dtype=torch.float64), "h_n": torch.ones(3)}


def off_by(relative, name="output"):
    """EXACT, but for one result that is this much larger."""
    return {**EXACT, name: EXACT[name] * (1 + relative)}


def test_an_error_up_to_that_of_the_other_times_the_ratio_passes():
    theirs, ours = off_by(1e-3), off_by(0.99e-3 * testing.ERROR_RATIO)
    testing.assert_as_accurate(ours, theirs, EXACT, torch.float32)


def test_a_larger_error_fails_and_is_named():
    theirs, ours = off_by(1e-3), off_by(1.01e-3 * testing.ERROR_RATIO)
    with pytest.raises(AssertionError, match=r"output: error 1\.5"):
        testing.assert_as_accurate(ours, theirs, EXACT, torch.float32)


def test_errors_of_a_few_units_of_rounding_pass_and_no_more():
    floor = testing.FLOOR_ULPS * torch.finfo(torch.float16).eps
    testing.assert_as_accurate(off_by(0.99 * floor), EXACT, EXACT, torch.float16)
    with pytest.raises(AssertionError):
        testing.assert_as_accurate(off_by(1.01 * floor), EXACT, EXACT, torch.float16)


def test_in_float64_the_two_are_compared_with_each_other():
    allowed = testing.FLOAT64_DIFFERENCE
    testing.assert_as_accurate(off_by(0.9 * allowed), EXACT, {**EXACT}, torch.float64)
    with pytest.raises(AssertionError):
        testing.assert_as_accurate(off_by(1.1 * allowed), EXACT, off_by(1.0), torch.float64)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_fails(value):
    ours = {**EXACT, "h_n": torch.tensor([1.0, value, 1.0])}
    with pytest.raises(AssertionError):
        testing.assert_as_accurate(ours, EXACT, EXACT, torch.float32)


def test_other_shapes_fail():
    ours = {**EXACT, "output": EXACT["output"].view(2, -1)}
    with pytest.raises(AssertionError, match="shapes differ"):
        testing.assert_as_accurate(ours, EXACT, EXACT, torch.float32)


def test_it_fails_also_where_python_ignores_assertions():
    code = """if True:
        import torch
        from fastrnn import testing
        one = {"output": torch.ones(3, dtype=torch.float64)}
        testing.assert_as_accurate({"output": 2 * one["output"]}, one, one, torch.float32)
    """
    process = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True)
    assert "AssertionError: small results: error" in process.stderr


@pytest.mark.parametrize("warn_only", [False, True])
def test_poisoned_memory_shows_what_is_not_written_and_leaves_the_settings_as_they_were(warn_only):
    torch.use_deterministic_algorithms(warn_only, warn_only=warn_only)
    try:
        with testing.poisoned_memory():
            assert torch.empty(5).isnan().all()
        assert torch.are_deterministic_algorithms_enabled() == warn_only
        assert torch.is_deterministic_algorithms_warn_only_enabled() == warn_only
    finally:
        torch.use_deterministic_algorithms(False)


def test_exact_products_add_up_in_float64():
    a, b = torch.tensor([[2.0**24, 1.0, -(2.0**24)]]), torch.ones(3, 1)
    with ExactProducts():
        found = [a @ b, torch.addmm(torch.ones(1), a, b)]
    assert [(t.dtype, t.item()) for t in found] == [(torch.float32, 1), (torch.float32, 2)]


def test_products_that_are_not_made_exact_are_refused():
    with ExactProducts(), pytest.raises(AssertionError, match="bmm is not made in float64"):
        torch.bmm(torch.ones(1, 1, 1), torch.ones(1, 1, 1))
