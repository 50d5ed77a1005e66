# SPDX-License-Identifier: Apache-2.0
"""Layers of a stack that run side by side, where one alone leaves threads idle."""

import pytest
import torch
from accuracy import assert_as_accurate_as_nn_rnn, mean_sizes
from test_teams import outputs, run_with_thread_limit, threads

import fastrnn
from fastrnn import _C, testing
from fastrnn.testing import Case

# x in the step and before, all layers in a thread each and fewer threads than layers, a last part
# that is short, weights packed and not.
CASES = [
    Case(131, 1, 3, 128, num_layers=2),
    Case(131, 1, 128, 128, num_layers=5, hx=True),
    Case(67, 2, 40, 150, num_layers=3, nonlinearity="relu", batch_first=True),
    Case(301, 1, 7, 90, num_layers=4, bias=False, unbatched=True),
    Case(0, 0, 3, 128, num_layers=3, lengths=(83, 91, 2), hx=True),
    Case(0, 0, 50, 100, num_layers=2, lengths=(1, 250)),
]


def plan_of(case, dtype):
    T, B = mean_sizes(case)
    return _C.cpu_plan(T, B, case.I, case.H, dtype=dtype, hx=case.hx, num_layers=case.num_layers)


def test_layers_run_side_by_side_where_one_leaves_threads_idle():
    with threads(1):
        plan = plan_of(Case(100, 1, 128, 128, num_layers=4), torch.float32)
        assert (plan["layer_threads"], plan["layer_steps"]) == (1, 100)
    with threads(2):
        plan = plan_of(Case(100, 1, 128, 128, num_layers=4), torch.float32)
        assert (plan["layer_threads"], plan["layer_steps"]) == (2, 50)
        for other in (
            Case(100, 1, 128, 128),  # no stack
            Case(100, 1, 64, 64, num_layers=4),  # too little work
            Case(100, 32, 128, 128, num_layers=4),  # rows for all threads
            Case(100, 1, 512, 512, num_layers=4),  # columns for all threads
        ):
            assert plan_of(other, torch.float32)["layer_threads"] == 1
        assert plan_of(Case(100, 1, 128, 128, num_layers=4), torch.float16)["layer_threads"] == 1
        both = _C.cpu_plan(100, 1, 128, 128, directions=2, num_layers=4)
        assert both["layer_threads"] == 1
    with threads(16):
        assert plan_of(Case(1000, 1, 128, 128, num_layers=3), torch.float32)["layer_threads"] == 3


@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_and_gradients_of_layers_side_by_side_are_right(case, dtype, count):
    with threads(count):
        plan = plan_of(case, dtype)
        assert plan["layer_threads"] > 1 or plan["converts"]
        ours = testing.run(case.module(fastrnn.RNN, dtype), case, dtype)
    assert_as_accurate_as_nn_rnn(ours, case, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gradients_of_layers_whose_second_chunk_has_products_by_aten_are_right(dtype):
    """In place, in what the layer above has written."""
    case = Case(19, 40, 6, 516, num_layers=2)
    assert _C.cpu_plan(19, 40, 516, 516, dtype=dtype)["packs_once"]
    ours = testing.run(case.module(fastrnn.RNN, dtype), case, dtype)
    assert_as_accurate_as_nn_rnn(ours, case, dtype)


def test_an_input_whose_columns_are_apart_is_read_right():
    case = CASES[1]
    module = case.module(fastrnn.RNN, torch.float64)
    x, hx = torch.randn(128, 1, 131).double().transpose(0, 2), torch.zeros(5, 1, 128).double()
    with threads(2), torch.inference_mode():
        assert plan_of(case, torch.float64)["layer_threads"] == 2
        torch.testing.assert_close(module(x, hx), module(x.contiguous(), hx))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_every_call_gives_the_same_bits(mode):
    """Whichever thread takes a part, and whether or not the results are kept for backward."""
    case = CASES[1]
    module = case.module(fastrnn.RNN, torch.float32)
    with threads(2):
        first = outputs(module, case)
        for _ in range(50):
            with mode():
                results = outputs(module, case)
            assert all(map(torch.equal, first, results))
            assert all(
                result.is_inference() == (mode is torch.inference_mode) for result in results
            )


LIMITED = """
import torch, fastrnn
from fastrnn import _C
torch.set_num_threads(4)
assert _C.cpu_plan(300, 1, 3, 128, num_layers=4)["layer_threads"] == 4
module = fastrnn.RNN(3, 128, 4)
x = torch.randn(300, 1, 3)
with torch.inference_mode():
    together = module(x)
    torch.set_num_threads(1)
    alone = module(x)
for ours, right in zip(together, alone):
    torch.testing.assert_close(ours, right)
print("right")
"""


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_threads_that_never_come_are_not_missed(limit):
    process = run_with_thread_limit(LIMITED, limit)
    assert process.stdout == "right\n", process.stderr
