# SPDX-License-Identifier: Apache-2.0
"""Every case of the grid, forward and backward, against torch.nn.RNN and against the reference."""

from functools import lru_cache

import pytest
import torch
from accuracy import (
    assert_as_accurate_as_nn_rnn,
    exact_run,
    layer_plans,
    steps_of,
    threads,
)
from torch.nn.utils.rnn import pack_sequence

import fastrnn
from fastrnn import _C, reference, testing

# Besides the grid: a walk by one thread, whose products are made beside it.
GRID = [*testing.grid(), testing.Case(300, 1, 40, 100, hx=True)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# ATen's product in each step is for the kernels for any processor (test_capabilities.py runs this
# test with them) and for AMX; products over many rows are by all other kernels.
ONE_WAY = (
    ["own_products", "multiplies_first"]
    if _C.cpu_capability() == "default"
    else ["step_products", "backward_step_products"]
)

every_case = pytest.mark.parametrize("case", GRID, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@lru_cache(maxsize=1)  # the dtypes of one case follow one another
def exact(case, dtype):
    return exact_run(case, dtype)


@every_dtype
@every_case
def test_results_and_gradients_are_as_accurate_as_nn_rnns(case, dtype):
    ours = testing.run(case.module(fastrnn.RNN, dtype), case, dtype)
    assert_as_accurate_as_nn_rnn(ours, case, dtype, exact(case, dtype))


class OperatorCall:
    """The arguments of rnn_forward and rnn_backward for a case, and of the reference."""

    def __init__(self, case, dtype):
        inputs, hx = case.arguments(dtype)
        self.batch_sizes = None
        if case.lengths:
            packed = pack_sequence(inputs, enforce_sorted=False)
            self.input, self.batch_sizes = packed.data, packed.batch_sizes
            self.sizes = packed.batch_sizes.tolist()
            hx = hx if hx is None else hx[:, packed.sorted_indices]
        else:
            x = inputs[0].unsqueeze(1) if case.unbatched else inputs[0]
            self.input = x.transpose(0, 1) if case.batch_first and not case.unbatched else x
            self.sizes = [self.input.size(1)] * self.input.size(0)
            hx = hx.unsqueeze(1) if case.unbatched and hx is not None else hx
        self.hx = hx
        self.weights = [w.detach() for w in case.module(fastrnn.RNN, dtype).parameters()]
        self.options = (case.nonlinearity, case.bias, case.num_layers, case.bidirectional)
        self.named = {n: getattr(case, n) for n in ("nonlinearity", "bias", "bidirectional")}

    def forward(self):
        return torch.ops.fastrnn.rnn_forward(
            self.input, self.hx, self.weights, self.batch_sizes, *self.options, True
        )

    def backward(self, grad_output, grad_h_n, layer_outputs):
        return torch.ops.fastrnn.rnn_backward(
            grad_output, grad_h_n, self.input, self.hx, self.weights, self.batch_sizes,
            layer_outputs, *self.options, [True] * (len(self.weights) + 2),
        )  # fmt: skip

    def exact_arguments(self, h_n):
        """The reference's: rows, hx and weights in float64."""
        rows = self.input.double().reshape(-1, self.input.size(-1))
        hx = torch.zeros_like(h_n) if self.hx is None else self.hx
        return rows, hx.double(), [w.double() for w in self.weights], self.sizes


@every_case
def test_forward_is_the_references(case):
    call = OperatorCall(case, torch.float64)
    output, h_n, layer_outputs = call.forward()
    y, h, outputs = reference.rnn(*call.exact_arguments(h_n), **call.named)
    for ours, theirs in [(output, y), (h_n, h), *zip(layer_outputs, outputs, strict=True)]:
        error = testing.relative_error(ours.reshape(theirs.shape), theirs)
        assert error < testing.FLOAT64_DIFFERENCE


@every_dtype
@every_case
def test_backward_is_the_references_at_the_same_states(case, dtype):
    call = OperatorCall(case, dtype)
    output, h_n, layer_outputs = call.forward()
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(dtype)
             for t in (output, h_n)]  # fmt: skip
    with testing.poisoned_memory():
        grad_input, grad_hx, grad_weights = call.backward(*grads, layer_outputs)
    exact = reference.rnn_backward(
        grads[0].double().reshape(-1, output.size(-1)), grads[1].double(),
        *call.exact_arguments(h_n),
        [y.double().reshape(-1, y.size(-1)) for y in layer_outputs], **call.named,
    )  # fmt: skip
    # Each gradient, and each between two layers, is rounded once; float32 sums drift a little more,
    # those over many rows with the square root of their number.
    drift = max(1.0, sum(call.sizes) / 1000) ** 0.5
    allowed = {torch.float64: testing.FLOAT64_DIFFERENCE, torch.float32: 1e-6 * drift}
    ours = named(grad_input.reshape(exact.input.shape), grad_hx, grad_weights)
    right = testing.grouped(named(*exact))
    for name, value in testing.grouped(ours).items():
        error = testing.relative_error(value.double(), right[name])
        assert error < allowed.get(dtype, torch.finfo(dtype).eps), name


def named(grad_input, grad_hx, grad_weights):
    return {"input": grad_input, "hx": grad_hx} | {str(i): w for i, w in enumerate(grad_weights)}


@every_dtype
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("H", [3, 70])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e-40])
def test_what_is_no_ordinary_number_stays_in_its_sequence(value, H, nonlinearity, dtype):
    case = testing.Case(3, 5, 4, H, nonlinearity=nonlinearity)
    x = case.arguments(dtype)[0][0]
    plain = case.module(fastrnn.RNN, dtype)(x)[0]
    x[1, 2] = value
    ours, theirs = (case.module(cls, dtype)(x)[0] for cls in (fastrnn.RNN, torch.nn.RNN))
    torch.testing.assert_close(ours.isfinite(), theirs.isfinite())
    torch.testing.assert_close(ours.isnan(), theirs.isnan())
    others = [0, 1, 3, 4]
    assert torch.equal(ours[:, others], plain[:, others])


@pytest.mark.parametrize("case", GRID[::7], ids=str)
def test_nothing_uninitialised_is_read(case):
    call = OperatorCall(case, torch.float32)
    clean = call.forward()
    with testing.poisoned_memory():
        poisoned = call.forward()
    for a, b in zip([*clean[:2], *clean[2]], [*poisoned[:2], *poisoned[2]], strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def two_threads():
    with threads(2):
        yield


def plans(case, dtype):
    """(steps, plan) of each layer."""
    return [(steps_of(case), plan) for plan in layer_plans(case, dtype)]


PADDED = [case for case in GRID if not case.lengths]


def test_the_grid_takes_every_yes_or_no_of_the_plan_both_ways(two_threads):
    taken = [plan for case in PADDED for dtype in DTYPES for _, plan in plans(case, dtype)]
    for name in [name for name, value in taken[0].items() if isinstance(value, bool)]:
        assert name in ONE_WAY or {plan[name] for plan in taken} == {False, True}, name


def test_the_grid_splits_a_batch_into_blocks_and_leaves_one_whole(two_threads):
    taken = [plan for case in PADDED for dtype in DTYPES for _, plan in plans(case, dtype)]
    assert {plan["row_blocks"] for plan in taken} == {1, 2}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_the_grid_runs_backward_in_one_chunk_in_two_and_with_a_middle_one(packed, dtype):
    cases = [case for case in GRID if bool(case.lengths) == packed]
    taken = [each for case in cases for each in plans(case, dtype)]
    chunks = {min(3, -(-T // plan["backward_steps"])) for T, plan in taken}
    assert chunks == {1, 2, 3}


@pytest.mark.parametrize("packed", [False, True])
def test_the_grid_has_middle_chunks_with_gradients_by_the_kernel_and_by_aten(packed):
    cases = [case for case in GRID if bool(case.lengths) == packed]
    # float32 has them by ATen too, with the kernels for any processor (test_capabilities.py).
    taken = [
        each
        for case in cases
        for dtype in (torch.float32, torch.float16)
        for each in plans(case, dtype)
    ]
    several = [plan for T, plan in taken if 2 * plan["backward_steps"] < T]
    assert {plan["own_gradients"] for plan in several} == {False, True}


def test_the_grid_converts_sixteen_bits_in_parts():
    taken = [each for case in PADDED for each in plans(case, torch.float16)]
    assert any(plan["convert_steps"] < T for T, plan in taken)
