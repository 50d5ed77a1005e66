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
    "case, dtype, count", crossed(CASES, [torch.float64, torch.float32], [2, 3, 1, 8])
)
def test_results_and_gradients_of_large_layers_are_right(case, dtype, count):
    with threads(count):
        assert all(
            plan["own_products"] and plan["own_gradients"] for plan in layer_plans(case, dtype)
        )
        ours = testing.run(case.module(fastrnn.RNN, dtype), case, dtype)
    assert_as_accurate_as_nn_rnn(ours, case, dtype)


# Where they are converted: gradients in float32 where there are many rows, else by blocks, of
# several rows and columns; input in the step whatever its size, but for one sequence.
CONVERTED = [
    Case(80, 41, 300, 290, hx=True),
    Case(30, 19, 20, 300, batch_first=True, num_layers=2),
    Case(33, 35, 17, 170, bidirectional=True, hx=True),
    Case(140, 1, 200, 150, hx=True),
    Case(50, 32, 20, 300, num_layers=2),  # the lower layer in float32, the upper one by blocks
    Case(40, 30, 600, 130, num_layers=2),  # the other way round
    Case(0, 0, 150, 140, lengths=(*range(5, 66, 2), *[47] * 40), bidirectional=True),
]


@pytest.mark.parametrize(
    "case, dtype, count", crossed(CONVERTED, [torch.bfloat16, torch.float16], [2, 1, 3])
)
def test_large_layers_of_sixteen_bits_are_right(case, dtype, count):
    with threads(count):
        ours = testing.run(case.module(fastrnn.RNN, dtype), case, dtype)
    assert_as_accurate_as_nn_rnn(ours, case, dtype)


def test_converted_layers_have_gradients_in_float32_beside_many_rows():
    many, few = (layer_plans(case, torch.float16)[0] for case in CONVERTED[:2])
    assert many["own_gradients"] and not few["own_gradients"]
    assert many["fuse_input"] and few["fuse_input"]


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
    "case, dtype, count", crossed(INPUTS, [torch.float32, torch.bfloat16], [2, 1, 3])
)
def test_the_inputs_product_is_right(case, dtype, count):
    plan = layer_plans(case, torch.float32)[0]
    assert plan["own_products"] and not plan["fuse_input"] and not plan["own_input_product"]
    with threads(count):
        ours = testing.run(case.module(fastrnn.RNN, dtype), case, dtype)
    assert_as_accurate_as_nn_rnn(ours, case, dtype)


@by_our_kernels
def test_products_of_few_rows_and_gradients_of_sixteen_bits_are_left_to_aten():
    few = _C.cpu_plan(10, 6, 300, 300, 1, torch.float32)
    assert few["own_gradients"] and not few["own_products"] and not few["own_input_gradient"]
    assert not _C.cpu_plan(100, 50, 300, 300, 1, torch.float16)["own_products"]
    bfloat16 = _C.cpu_plan(100, 50, 300, 300, 1, torch.bfloat16)
    assert bfloat16["own_gradients"] == bfloat16["converts"]
