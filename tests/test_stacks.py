# SPDX-License-Identifier: Apache-2.0
"""What runs side by side where a step has no work for two threads: the layers of a stack, a layer's
walk and its products, and in backward the walk and the weights' gradients."""

import pytest
import torch
from accuracy import assert_as_accurate_as_nn_rnn, layer_plans, outputs, steps_of, threads
from cross import crossed
from test_teams import run_with_thread_limit

import fastrnn
from fastrnn import _C, testing
from fastrnn.testing import Case

# x in the step and before, all layers in a thread each and fewer threads than layers, a last part
# that is short; a first layer with many features; one layer.
CASES = [
    Case(131, 1, 3, 128, num_layers=2),
    Case(131, 1, 128, 128, num_layers=5, hx=True),
    Case(67, 2, 40, 150, num_layers=3, nonlinearity="relu", batch_first=True),
    Case(301, 1, 7, 90, num_layers=4, bias=False, unbatched=True),
    Case(0, 0, 3, 128, num_layers=3, lengths=(83, 91, 2), hx=True),
    Case(0, 0, 50, 100, num_layers=2, lengths=(1, 250)),
    Case(131, 1, 300, 128, num_layers=2, hx=True),
    Case(131, 1, 128, 128),
    Case(500, 1, 40, 72, hx=True, batch_first=True),
    Case(83, 2, 200, 160, nonlinearity="relu", hx=True),
    Case(0, 0, 100, 128, lengths=(1, 250), hx=True),
]

# One chunk of backward and several, parts that are short, one row and several, the input's product
# before and in the step, tails; sequences that end at different steps; layers.
WALKS = [
    Case(131, 1, 3, 128, hx=True),
    Case(1000, 1, 64, 64),
    Case(300, 3, 20, 100, nonlinearity="relu", batch_first=True, bias=False),
    Case(203, 2, 150, 70, hx=True, num_layers=2),
    Case(700, 1, 128, 128, num_layers=3),
    Case(0, 0, 90, 90, lengths=(150, 170, 3), num_layers=2),
    Case(100, 2, 40, 210, hx=True),
    Case(0, 0, 60, 90, lengths=(150, 3, 170), hx=True),
]


# The kernels for any processor leave products over many rows, and gradients of large layers, to
# ATen: of those nothing is made beside a walk.
def plan_of(case, dtype):
    return layer_plans(case, dtype)[0]


def test_layers_run_side_by_side_where_one_leaves_threads_idle():
    with threads(1):
        plan = plan_of(Case(100, 1, 128, 128, num_layers=4), torch.float32)
        assert (plan["layer_threads"], plan["layer_steps"]) == (1, 100)
    with threads(2):
        plan = plan_of(Case(100, 1, 128, 128, num_layers=4), torch.float32)
        assert (plan["layer_threads"], plan["first_steps"], plan["layer_steps"]) == (2, 6, 9)
        plan = plan_of(Case(100, 1, 128, 128), torch.float32)
        assert plan["layer_threads"] == (2 if plan["own_products"] else 1)
        for other in (
            Case(100, 1, 3, 128),  # one layer, and no product beside it
            Case(100, 1, 300, 128),  # one layer, its product too large for a single thread
            Case(100, 1, 64, 64, num_layers=4),  # too little work
            Case(100, 32, 128, 128, num_layers=4),  # rows for all threads
            Case(100, 1, 512, 512, num_layers=4),  # columns for all threads
        ):
            assert plan_of(other, torch.float32)["layer_threads"] == 1
        assert plan_of(Case(100, 1, 128, 128, num_layers=4), torch.float16)["layer_threads"] == 1
        both = _C.cpu_plan(100, 1, 128, 128, directions=2, num_layers=4)
        assert both["layer_threads"] == 1
    with threads(16):
        assert plan_of(Case(1000, 1, 3, 128, num_layers=3), torch.float32)["layer_threads"] == 5
        assert plan_of(Case(1000, 3, 3, 128, num_layers=3), torch.float32)["layer_threads"] == 3


@pytest.mark.parametrize(
    "case, dtype, count",
    crossed(CASES + WALKS, [torch.float64, torch.float32, torch.bfloat16], [2, 3, 8]),
)
def test_results_and_gradients_of_what_runs_side_by_side_are_right(case, dtype, count):
    with threads(count):
        plan = plan_of(case, dtype)
        if case in CASES and not plan["converts"] and (plan["own_products"] or case.num_layers > 1):
            assert plan["layer_threads"] > 1
        if case in WALKS and not plan["converts"] and plan["own_gradients"]:
            assert plan["gradient_steps"] < steps_of(case)
        ours = testing.run(case.module(fastrnn.RNN, dtype), case, dtype)
    assert_as_accurate_as_nn_rnn(ours, case, dtype)


def test_weights_gradients_are_made_beside_a_walk_by_one_thread():
    with threads(1):
        assert plan_of(Case(100, 1, 128, 128), torch.float32)["gradient_steps"] == 100
    with threads(2):
        assert plan_of(Case(100, 1, 128, 128), torch.float32)["gradient_steps"] == 17
        for other in (
            Case(100, 1, 32, 32),  # too little work
            Case(100, 32, 64, 64),  # rows for all threads
            Case(100, 1, 512, 512),  # columns for all threads
        ):
            assert plan_of(other, torch.float32)["gradient_steps"] == 100


def gradients_of(module, x, hx, wanted):
    """By name, of the sum of all outputs; x is called that too."""
    tensors = {"x": x.clone(), **dict(module.named_parameters())}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name in wanted).grad = None
    sum(y.sum() for y in module(tensors["x"], hx)).backward()
    return {name: tensors[name].grad for name in wanted}


@pytest.mark.parametrize("case", [WALKS[0], CASES[1]], ids=str)
def test_some_gradients_are_those_of_all(case):
    """Not all layers run side by side where some weights are not trained."""
    module = case.module(fastrnn.RNN, torch.float32)
    (x, *_), hx = case.arguments(torch.float32)
    names = ["x", *dict(module.named_parameters())]
    with threads(2):
        every = gradients_of(module, x, hx, names)
        last = case.num_layers - 1
        for wanted in (["x"], [f"weight_hh_l{last}"], ["x", f"weight_ih_l{last}"], *zip(names)):
            some = gradients_of(module, x, hx, wanted)
            for name in wanted:
                torch.testing.assert_close(some[name], every[name])
                if case.num_layers == 1 and "x" not in wanted:
                    assert torch.equal(some[name], every[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("H", [512, 523, 528])
def test_gradients_of_layers_that_read_a_large_weight_as_it_is_are_right(H, dtype):
    """In place, in what the layer above has written; columns in whole panels and not."""
    case = Case(19, 40, 6, H, num_layers=2)
    plan = _C.cpu_plan(19, 40, H, H, dtype=dtype)
    assert plan["pack_weights"] and not plan["backward_packs"]
    ours = testing.run(case.module(fastrnn.RNN, dtype), case, dtype)
    assert_as_accurate_as_nn_rnn(ours, case, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_packed_sequences_read_a_large_weight_as_it_is(dtype):
    """Also in the steps that only one or two of them have."""
    case = Case(0, 0, 6, 523, hx=True, lengths=tuple(range(60, 30, -2)))
    assert not layer_plans(case, dtype)[0]["backward_packs"]
    ours = testing.run(case.module(fastrnn.RNN, dtype), case, dtype)
    assert_as_accurate_as_nn_rnn(ours, case, dtype)


def test_an_input_whose_columns_are_apart_is_read_right():
    case = CASES[1]
    module = case.module(fastrnn.RNN, torch.float64)
    torch.manual_seed(0)
    x, hx = torch.randn(128, 1, 131).double().transpose(0, 2), torch.zeros(5, 1, 128).double()
    with threads(2), torch.inference_mode():
        assert plan_of(case, torch.float64)["layer_threads"] == 2
        torch.testing.assert_close(module(x, hx), module(x.contiguous(), hx))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("case", [CASES[1], CASES[8]], ids=str)
def test_every_call_gives_the_same_bits(case, mode):
    """Whichever thread takes a part, and whether or not the results are kept for backward."""
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
torch.manual_seed(0)
torch.set_num_threads(4)
assert _C.cpu_plan(300, 1, 3, 128, num_layers=4)["layer_threads"] == 4
plan = _C.cpu_plan(300, 1, 128, 128)
assert plan["layer_threads"] == (2 if plan["own_products"] else 1)
assert _C.cpu_plan(300, 1, 3, 128)["gradient_steps"] < 300
for I, layers in (3, 4), (128, 1):
    module = fastrnn.RNN(I, 128, layers)
    x = torch.randn(300, 1, I)

    def run():
        module.zero_grad()
        results = module(x)
        sum(y.square().sum() for y in results).backward()
        return results, [p.grad for p in module.parameters()]

    torch.set_num_threads(4)
    together, gradients = run()
    torch.set_num_threads(1)
    alone, expected = run()
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-4)  # sums over 300 steps
print("right")
"""


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_threads_that_never_come_are_not_missed(limit):
    process = run_with_thread_limit(LIMITED, limit)
    assert process.stdout == "right\n", process.stderr
