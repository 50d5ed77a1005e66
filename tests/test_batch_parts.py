# SPDX-License-Identifier: Apache-2.0
"""Backward by parts of the batch: each thread goes through all of it with rows of its own."""

import pytest
import torch
from accuracy import assert_as_accurate_as_nn_rnn, layer_plans, threads
from cross import crossed
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fastrnn
from fastrnn import testing
from fastrnn.testing import Case

# One chunk and several, panels and gradients with tails, parts of unequal size, one feature and
# many, two directions, whose chunks add to one gradient, and a stack whose first layer is wider.
CASES = [
    Case(31, 33, 20, 64, hx=True),
    Case(80, 17, 1, 100, nonlinearity="relu"),
    Case(25, 16, 200, 128, batch_first=True, hx=True),
    Case(40, 11, 33, 90, bidirectional=True, hx=True),
    Case(70, 18, 5, 64, num_layers=3, batch_first=True, bias=False),
    Case(40, 14, 60, 70, num_layers=2, bidirectional=True, batch_first=True, hx=True),
    Case(1, 300, 100, 128, hx=True),
    # The last rows end before the first chunk does; one row goes on alone; all are of one length.
    Case(0, 0, 20, 100, lengths=tuple(range(3, 60, 3)), hx=True),
    Case(0, 0, 40, 64, lengths=(300, *[7] * 40), bidirectional=True, nonlinearity="relu"),
    Case(0, 0, 9, 110, lengths=(30,) * 13, num_layers=2),
    Case(0, 0, 33, 70, lengths=tuple(range(50, 20, -2)), num_layers=3, bidirectional=True, hx=True),
]


# So few rows that the input's gradient would be ATen's, were it not written by parts; and parts of
# so few that each alone would have ATen's product in its steps.
FEW_ROWS = [
    Case(4, 16, 64, 192, hx=True),
    Case(4, 16, 1, 192, batch_first=True),
    Case(8, 8, 64, 192, bidirectional=True),
    Case(0, 0, 64, 192, lengths=(4,) * 16),
    Case(0, 0, 60, 190, lengths=(8,) * 8, hx=True),
    Case(40, 8, 400, 100),
]


def parts_of(case, dtype):
    return min(plan["batch_parts"] for plan in layer_plans(case, dtype))


@pytest.mark.parametrize(
    "case, dtype, count",
    crossed(CASES, [torch.float64, torch.float32, torch.bfloat16, torch.float16], [2, 3]),
)
def test_results_and_gradients_by_parts_are_right(case, dtype, count):
    with threads(count):
        converts = any(plan["converts"] for plan in layer_plans(case, dtype))
        assert parts_of(case, dtype) == (1 if converts and case.lengths else count)
        ours = testing.run(case.module(fastrnn.RNN, dtype), case, dtype)
    assert_as_accurate_as_nn_rnn(ours, case, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", FEW_ROWS, ids=str)
def test_results_and_gradients_by_parts_of_few_rows_are_right(case, dtype):
    with threads(2):
        if all(plan["own_gradients"] for plan in layer_plans(case, dtype)):  # with kernels for AVX2
            assert parts_of(case, dtype) == 2
        ours = testing.run(case.module(fastrnn.RNN, dtype), case, dtype)
    assert_as_accurate_as_nn_rnn(ours, case, dtype)


def test_small_batches_small_layers_and_one_thread_have_no_parts():
    with threads(2):
        assert parts_of(Case(100, 4, 64, 64), torch.float32) == 2
        assert parts_of(Case(100, 3, 64, 64), torch.float32) == 1  # a part has two rows or more
        assert parts_of(Case(20, 32, 2, 32), torch.float32) == 1
        assert parts_of(Case(100, 64, 256, 256), torch.float32) == 1  # no gain
    with threads(1):
        assert parts_of(CASES[0], torch.float32) == 1
    with threads(1000):
        assert parts_of(Case(100, 64, 64, 128), torch.float32) == 32


CASE = Case(60, 20, 30, 64, num_layers=2, bidirectional=True, hx=True)
PACKED = Case(0, 0, 30, 64, lengths=tuple(range(80, 40, -2)), num_layers=2, bidirectional=True)


WANTED = [
    "input",
    "hx",
    "weight_ih_l0_reverse",
    "weight_hh_l1 bias_hh_l1",
    "bias_ih_l1 input",
    "weight_hh_l0 hx",
]


@pytest.mark.parametrize("case, reads, wanted", crossed([CASE, PACKED], [0, 1], WANTED))
def test_each_gradient_by_parts_alone_is_the_same(case, reads, wanted):
    gradients = []
    for cls in (fastrnn.RNN, torch.nn.RNN):
        module = case.module(cls, torch.float64).requires_grad_(False)
        inputs, _ = case.arguments(torch.float64)
        hx = torch.full((4, len(inputs) if case.lengths else case.B, case.H), 0.1).double()
        x = pack_sequence(inputs, enforce_sorted=False) if case.lengths else inputs[0]
        numbers = x.data if case.lengths else x
        leaves = {"input": numbers, "hx": hx, **dict(module.named_parameters())}
        leaves = [leaves[name].requires_grad_() for name in wanted.split()]
        with threads(2):
            assert parts_of(case, torch.float64) == 2
            result = module(x, hx)[reads]
            result = result.data if isinstance(result, PackedSequence) else result
            gradients.append(torch.autograd.grad(result.sin().sum(), leaves))
    for ours, theirs in zip(*gradients, strict=True):
        assert testing.relative_error(ours, theirs) < 1e-12


def test_gradients_by_parts_have_the_same_bits_again():
    module = CASE.module(fastrnn.RNN, torch.float32)
    with threads(2):
        first, again = (testing.run(module, CASE, torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
