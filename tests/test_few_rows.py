# SPDX-License-Identifier: Apache-2.0
"""Few rows of large layers: products that read the weights as they are."""

import pytest
import torch
from accuracy import assert_as_accurate_as_nn_rnn, layer_plans, threads
from cross import crossed

import fastrnn
from fastrnn import _C, testing
from fastrnn.testing import Case

INPUT = [  # the input's product is ours: columns in whole vectors and not, rows in fours and not
    Case(17, 1, 140, 32, hx=True),
    Case(9, 2, 150, 37, bidirectional=True, batch_first=True),
    Case(23, 1, 185, 5, nonlinearity="relu", unbatched=True),
    Case(0, 0, 200, 40, lengths=(12, 9)),
    Case(3, 7, 700, 520),
]
STEP = [  # and that of each step
    Case(3, 4, 700, 520, hx=True),
    Case(2, 5, 700, 528, bidirectional=True, nonlinearity="relu"),
    Case(4, 11, 10, 800, num_layers=2, bias=False),
    Case(0, 0, 700, 520, lengths=(9, 8, 8, 7, 5, 2)),
]
MORE = Case(3, 40, 700, 520, hx=True)  # packed in forward, or ATen's product in each step
LONG = [  # a single step has no product with W_hh
    Case(1, 4, 65536, 20),  # sums of many terms
    Case(1, 4, 2051, 20),  # whole parts of a sum, and three terms more
]


DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize(
    "case, dtype, count", crossed([*INPUT, *STEP, MORE, *LONG], DTYPES, [2, 1], rest=[3])
)
def test_results_and_gradients_of_few_rows_are_right(case, dtype, count):
    with threads(count):
        plan = layer_plans(case, dtype)[0]
        if dtype.itemsize > 2:  # else it depends on the processor's instructions
            as_is = [*INPUT, STEP[0], STEP[1], STEP[3], LONG[0]]
            assert (plan["input"] == "as_is") == (case in as_is)
            if case in STEP:
                assert plan["state"] == plan["delta"] == "as_is"
            if case == MORE:  # PyTorch's product in each step: not the kernels for any processor
                assert plan["state"] == ("aten" if _C.cpu_capability() == "default" else "panels")
        ours = testing.run(case.module(fastrnn.RNN, dtype), case, dtype)
    assert_as_accurate_as_nn_rnn(ours, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B", range(1, 14))
def test_tiles_of_every_height_are_right(B, dtype):
    # Packed weights, in panels of two vectors too and K odd, and weights as they are.
    for case in (Case(17, B, 12, 155, hx=True), Case(2, B, 700, 523)):
        if dtype.itemsize > 2:  # else it depends on the processor's instructions
            assert (layer_plans(case, dtype)[0]["state"] == "panels") == (case.H == 155 and B > 0)
        ours = testing.run(case.module(fastrnn.RNN, dtype), case, dtype)
        assert_as_accurate_as_nn_rnn(ours, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T, B, delta", [(20, 1, "as_is"), (70, 2, "panels")])
def test_rows_of_a_weight_that_lie_across_cache_lines_are_read_right(T, B, delta, dtype):
    case = Case(T, B, 12, 299, hx=True)
    if dtype.itemsize > 2:  # bfloat16 is read in pairs, from packed weights
        assert layer_plans(case, dtype)[0]["delta"] == delta
    ours = testing.run(case.module(fastrnn.RNN, dtype), case, dtype)
    assert_as_accurate_as_nn_rnn(ours, case, dtype)


@pytest.mark.parametrize("case", [*INPUT, *STEP], ids=str)
def test_the_bits_of_few_rows_do_not_depend_on_threads(case):
    inputs, hx = case.arguments(torch.float32)
    if case.lengths:
        inputs = [torch.nn.utils.rnn.pack_sequence(inputs, enforce_sorted=False)]
    module = case.module(fastrnn.RNN, torch.float32)
    results = []
    for count in (1, 2, 5):
        with threads(count), torch.inference_mode():
            results.append(module(inputs[0], hx)[1])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("T, B", [(3, 5), (4, 3), (2, 7)])
def test_the_bits_of_backward_do_not_depend_on_where_threads_cut_the_columns(T, B):
    # Tiles of every height; cuts in the middle of what one thread takes side by side.
    case = Case(T, B, 4, 496)
    module = case.module(fastrnn.RNN, torch.float32)
    results = []
    for count in (1, 2, 5):
        with threads(count):
            plan = layer_plans(case, torch.float32)[0]
            assert plan["column_blocks"] == count and plan["delta"] == "as_is"
            results.append(testing.run(module, case, torch.float32)["grad_bias_ih_l0"])
    assert all(torch.equal(results[0], result) for result in results)


@pytest.mark.parametrize("T, B", [(3, 4), (3, 2), (20, 4)])
@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0"])
def test_a_weight_whose_rows_are_one_row_is_read_right(name, T, B):
    gradients = []
    torch.manual_seed(0)
    row = torch.randn(1, 20 if name == "weight_hh_l0" else 5, dtype=torch.float64) / 5
    x = torch.randn(T, B, 5, dtype=torch.float64)
    for cls in (fastrnn.RNN, torch.nn.RNN):
        torch.manual_seed(0)
        module = cls(5, 20, dtype=torch.float64)
        leaf = row.clone().requires_grad_()
        output, _ = torch.func.functional_call(module, {name: leaf.expand(20, -1)}, x)
        output.square().sum().backward()
        gradients.append([leaf.grad, *(p.grad for n, p in module.named_parameters() if n != name)])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
