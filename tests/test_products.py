# SPDX-License-Identifier: Apache-2.0
"""Products over many rows by the kernels: of the input, and the gradients of large layers."""

import pytest
import torch
from accuracy import assert_as_accurate_as_nn_rnn, layer_plans, threads
from cross import crossed

import fastrnn
from fastrnn import _C, testing
from fastrnn.testing import Case

by_our_kernels = pytest.mark.skipif(
    _C.cpu_capability() == "default", reason="the kernels for any processor leave them to ATen"
)

# Fewer features than a vector, and more columns than a block has; rows in one pass, in several and
# with a rest; sizes with tails; input and gradients whose rows are not adjacent; one sequence and
# two, of one chunk and of several; runs of one or two rows, more than are collected.
CASES = [
    Case(90, 61, 520, 273, hx=True, nonlinearity="relu"),
    Case(40, 151, 3, 260, bias=False),
    Case(25, 44, 330, 100, batch_first=True),
    Case(33, 219, 19, 200, num_layers=2, bidirectional=True, batch_first=True, hx=True),
    Case(300, 9, 1, 129, num_layers=3),
    Case(0, 0, 70, 250, lengths=(*range(5, 66, 2), *[47] * 103), hx=True),
    Case(0, 0, 400, 140, lengths=(300, *[7] * 40), bidirectional=True),
    Case(130, 1, 290, 300, hx=True),
    Case(700, 1, 17, 135, bidirectional=True, hx=True),
    Case(1030, 2, 260, 131, batch_first=True, num_layers=2),
    Case(0, 0, 260, 150, lengths=(600, 599, 2), hx=True),
]


@by_our_kernels
@pytest.mark.parametrize(
    "case, dtype, count", crossed(CASES, [torch.float64, torch.float32], [2, 3], rest=[1, 8])
)
def test_results_and_gradients_of_large_layers_are_right(case, dtype, count):
    with threads(count):
        assert all(plan["weight_grads"] == "panels" for plan in layer_plans(case, dtype))
        ours = testing.run(case.module(fastrnn.RNN, dtype), case, dtype)
    assert_as_accurate_as_nn_rnn(ours, case, dtype)


# Where they are converted: products and gradients in float32, a few steps at a time.
CONVERTED = [
    Case(80, 41, 300, 290, hx=True),
    Case(30, 19, 20, 300, batch_first=True, num_layers=2),
    Case(33, 35, 17, 170, bidirectional=True, hx=True),
    Case(140, 1, 200, 150, hx=True),
    Case(50, 32, 20, 300, num_layers=2),
    Case(40, 30, 600, 130, num_layers=2),
    Case(0, 0, 150, 140, lengths=(*range(5, 66, 2), *[47] * 40), bidirectional=True),
]


@pytest.mark.parametrize(
    "case, dtype, count", crossed(CONVERTED, [torch.bfloat16, torch.float16], [2, 3], rest=[1])
)
def test_large_layers_of_sixteen_bits_are_right(case, dtype, count):
    with threads(count):
        ours = testing.run(case.module(fastrnn.RNN, dtype), case, dtype)
    assert_as_accurate_as_nn_rnn(ours, case, dtype)


def test_converted_layers_have_their_gradients_and_products_from_the_kernels():
    for case in CONVERTED:
        for plan in layer_plans(case, torch.float16):
            assert plan["weight_grads"] == plan["input_grad"] == "panels"
            assert plan["input"] in ("in_step", "panels") and plan["state"] == "panels"


# Not fused into the step: the input has a product of its own, batch-first input by sequences or by
# steps, of which there are more or fewer than threads.
INPUTS = [
    Case(150, 2, 200, 64),
    Case(150, 2, 200, 64, batch_first=True),
    Case(20, 40, 700, 400),
    Case(20, 40, 700, 400, batch_first=True, bidirectional=True),
    Case(70, 9, 500, 400, batch_first=True, num_layers=2),
    Case(2, 90, 700, 400, batch_first=True),
]


@by_our_kernels
@pytest.mark.parametrize(
    "case, dtype, count", crossed(INPUTS, [torch.float32, torch.bfloat16], [2, 3], rest=[1])
)
def test_the_inputs_product_is_right(case, dtype, count):
    plan = layer_plans(case, torch.float32)[0]
    assert plan["input"] == "panels"
    with threads(count):
        ours = testing.run(case.module(fastrnn.RNN, dtype), case, dtype)
    assert_as_accurate_as_nn_rnn(ours, case, dtype)


@by_our_kernels
def test_products_of_few_rows_and_gradients_of_sixteen_bits_are_left_to_aten():
    few = _C.cpu_plan(10, 6, 300, 600, 1, torch.float32)
    assert few["weight_grads"] == "panels" and few["input"] == few["input_grad"] == "aten"
    bfloat16 = _C.cpu_plan(40, 50, 300, 300, 1, torch.bfloat16)
    assert (bfloat16["weight_grads"] == "panels") == bfloat16["converts"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("H", [512, 523, 528])
def test_gradients_of_layers_that_read_a_large_weight_as_it_is_are_right(H, dtype):
    """In place, in what the layer above has written; columns in whole panels and not."""
    case = Case(19, 40, 6, H, num_layers=2)
    plan = _C.cpu_plan(19, 40, H, H, dtype=dtype)
    aligned = H * dtype.itemsize % 64 == 0
    ours = ("panels", "as_is" if aligned else "panels")
    assert (plan["state"], plan["delta"]) in [ours, ("aten", "aten")]
    ours = testing.run(case.module(fastrnn.RNN, dtype), case, dtype)
    assert_as_accurate_as_nn_rnn(ours, case, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_packed_sequences_read_a_large_weight_as_it_is(dtype):
    """Also in the steps that only one or two of them have."""
    case = Case(0, 0, 6, 528, hx=True, lengths=tuple(range(60, 30, -2)))
    assert layer_plans(case, dtype)[0]["delta"] == "as_is"
    ours = testing.run(case.module(fastrnn.RNN, dtype), case, dtype)
    assert_as_accurate_as_nn_rnn(ours, case, dtype)
