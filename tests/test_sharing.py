# SPDX-License-Identifier: Apache-2.0
"""How threads share backward, and the products around a walk: by rows, by slabs, beside it."""

import pytest
import torch
from accuracy import assert_as_accurate_as_nn_rnn, layer_plans, outputs, threads
from cross import crossed
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fastrnn
from fastrnn import _C, testing
from fastrnn.testing import Case

# One chunk and several, panels and gradients with tails, blocks of unequal size, one feature and
# many, two directions, whose chunks add to one gradient, and a stack whose first layer is wider.
BY_ROWS = [
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
    # So few rows that the input's gradient would be ATen's, were it not made by rows.
    Case(4, 16, 64, 192, hx=True),
    Case(0, 0, 60, 190, lengths=(8,) * 8, hx=True),
]

# One chunk of backward and several, parts that are short, one row and several, the input's product
# before, beside and in the step, batch-first input, tails, sequences that end at different steps.
BESIDE = [
    Case(131, 1, 3, 128, hx=True),
    Case(131, 1, 128, 128),
    Case(1000, 1, 64, 64),
    Case(500, 1, 40, 72, hx=True, batch_first=True),
    Case(300, 3, 20, 100, nonlinearity="relu", batch_first=True, bias=False),
    Case(203, 2, 150, 70, hx=True, num_layers=2),
    Case(131, 1, 300, 128, num_layers=2, hx=True),
    Case(700, 1, 128, 128, num_layers=3),
    Case(301, 1, 7, 90, num_layers=4, bias=False, unbatched=True),
    Case(100, 2, 40, 210, hx=True),
    Case(0, 0, 60, 90, lengths=(150, 3, 170), hx=True),
    Case(0, 0, 100, 128, lengths=(1, 250), hx=True, num_layers=2),
]


def sharing(case, dtype=torch.float32):
    return {plan["sharing"] for plan in layer_plans(case, dtype)}


def test_the_shape_decides_how_threads_share_backward():
    gradients = _C.cpu_plan(100, 1, 512, 512)["weight_grads"]  # ATen's by kernels for any processor
    with threads(2):
        assert sharing(Case(100, 32, 64, 64)) == {"by_rows"}
        assert sharing(Case(100, 64, 256, 256)) == {"by_slabs"}  # no gain by rows
        assert sharing(Case(100, 1, 512, 512)) == {"by_slabs"}  # a team walks
        assert sharing(Case(100, 1, 300, 128)) == {
            "beside" if gradients == "panels" else "by_slabs"
        }
        assert sharing(Case(100, 1, 32, 32)) == {"by_rows"}  # too little work for two threads
        assert sharing(Case(100, 32, 64, 64), torch.float16) == {"by_slabs"}  # what is converted
    with threads(1):
        assert sharing(Case(1000, 1, 64, 64)) == {"by_rows"}


def test_blocks_of_rows_are_not_too_small():
    def blocks(*shape):
        return _C.cpu_plan(*shape)["row_blocks"]

    with threads(2):
        assert blocks(100, 4, 64, 64) == 2
        assert blocks(100, 3, 64, 64) == 1  # a block has two rows or more
        assert blocks(20, 32, 2, 32) == 1  # too little work
    with threads(1):
        assert blocks(100, 64, 64, 128) == 1
    with threads(1000):
        assert blocks(100, 64, 64, 128) == 32


@pytest.mark.parametrize(
    "case, dtype, count",
    crossed(BY_ROWS, [torch.float32, torch.bfloat16, torch.float16], [2, 3]),
)
def test_results_and_gradients_by_rows_are_right(case, dtype, count):
    with threads(count):
        converts = layer_plans(case, dtype)[0]["converts"]
        assert sharing(case, dtype) == {"by_slabs" if converts else "by_rows"}
        ours = testing.run(case.module(fastrnn.RNN, dtype), case, dtype)
    assert_as_accurate_as_nn_rnn(ours, case, dtype)


@pytest.mark.parametrize(
    "case, dtype, count", crossed(BESIDE, [torch.float32, torch.bfloat16], [2, 3, 8])
)
def test_results_and_gradients_beside_a_walk_are_right(case, dtype, count):
    with threads(count):
        plan = layer_plans(case, dtype)[0]
        if not plan["converts"] and plan["weight_grads"] != "aten" and count < 8:
            assert plan["sharing"] == "beside"
        ours = testing.run(case.module(fastrnn.RNN, dtype), case, dtype)
    assert_as_accurate_as_nn_rnn(ours, case, dtype)


STACK = Case(60, 20, 30, 64, num_layers=2, bidirectional=True, hx=True)
PACKED = Case(0, 0, 30, 64, lengths=tuple(range(80, 40, -2)), num_layers=2, bidirectional=True)
SINGLE = Case(131, 1, 128, 128, num_layers=2, hx=True)


@pytest.mark.parametrize(
    "wanted",
    [
        ["input"],
        ["hx"],
        ["weight_ih_l0"],
        ["weight_hh_l1", "bias_hh_l1"],
        ["bias_ih_l1", "input"],
        ["weight_hh_l0", "hx"],
    ],
    ids=" and ".join,
)
@pytest.mark.parametrize("reads", [0, 1], ids=["output", "h_n"])
@pytest.mark.parametrize("case", [STACK, PACKED, SINGLE], ids=str)
def test_each_gradient_alone_is_the_same(case, reads, wanted):
    gradients = []
    for cls in (fastrnn.RNN, torch.nn.RNN):
        module = case.module(cls, torch.float64).requires_grad_(False)
        inputs, _ = case.arguments(torch.float64)
        states = case.num_layers * (1 + case.bidirectional)
        batch = len(inputs) if case.lengths else case.B
        hx = torch.full((states, batch, case.H), 0.1).double()
        x = pack_sequence(inputs, enforce_sorted=False) if case.lengths else inputs[0]
        numbers = x.data if case.lengths else x
        leaves = {"input": numbers, "hx": hx, **dict(module.named_parameters())}
        leaves = [leaves[name].requires_grad_() for name in wanted]
        with threads(2):
            result = module(x, hx)[reads]
            result = result.data if isinstance(result, PackedSequence) else result
            gradients.append(torch.autograd.grad(result.sin().sum(), leaves))
    for ours, theirs in zip(*gradients, strict=True):
        assert testing.relative_error(ours, theirs) < 1e-12


@pytest.mark.parametrize("case", [STACK, PACKED, SINGLE], ids=str)
def test_gradients_have_the_same_bits_again(case):
    module = case.module(fastrnn.RNN, torch.float32)
    with threads(2):
        first = testing.run(module, case, torch.float32)
        for _ in range(20):
            again = testing.run(module, case, torch.float32)
            assert all(torch.equal(first[name], again[name]) for name in first)


def test_an_input_whose_columns_are_apart_is_read_right():
    module = SINGLE.module(fastrnn.RNN, torch.float64)
    torch.manual_seed(0)
    x, hx = torch.randn(128, 1, 131).double().transpose(0, 2), torch.zeros(2, 1, 128).double()
    with threads(2), torch.inference_mode():
        torch.testing.assert_close(module(x, hx), module(x.contiguous(), hx))


def test_a_state_whose_columns_are_apart_is_read_right():
    module = Case(31, 33, 20, 64).module(fastrnn.RNN, torch.float64)
    x, hx = torch.randn(31, 33, 20).double(), torch.randn(64, 33, 1).double().transpose(0, 2)
    torch.testing.assert_close(module(x, hx), module(x, hx.contiguous()))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_every_call_gives_the_same_bits(mode):
    """Whichever thread makes a product, and whether or not the results are kept for backward."""
    module = SINGLE.module(fastrnn.RNN, torch.float32)
    with threads(2):
        first = outputs(module, SINGLE)
        for _ in range(50):
            with mode():
                results = outputs(module, SINGLE)
            assert all(map(torch.equal, first, results))
            assert all(
                result.is_inference() == (mode is torch.inference_mode) for result in results
            )
