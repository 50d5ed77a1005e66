# SPDX-License-Identifier: Apache-2.0
"""The grid, forward and backward, against torch.nn.RNN and against the reference.

Always: of any two of size, option and dtype, every pair. The rest of the cross is `full`.
"""

from dataclasses import astuple
from functools import lru_cache
from itertools import product

import pytest
import torch
from accuracy import (
    OperatorCall,
    assert_as_accurate_as_nn_rnn,
    backward_errors,
    exact_run,
    float32_drift,
    layer_plans,
    steps_of,
    threads,
)
from cross import name_of, pairwise, rest_is_full

import fastrnn
from fastrnn import _C, reference, testing

# Besides the grid: a walk by one thread, whose products are made beside it.
GRID = [*testing.grid(), testing.Case(300, 1, 40, 100, hx=True)]
DTYPES = [F64 := torch.float64, torch.float32, torch.bfloat16, torch.float16]
# ATen's product in each step is for the kernels for any processor (test_capabilities.py runs this
# test with them) and for AMX.
EACH_STEP = {"panels", "as_is"} | ({"aten"} if _C.cpu_capability() == "default" else set())
WAYS = {
    "input": {"in_step", "panels", "as_is", "aten"},
    "state": EACH_STEP,
    "delta": EACH_STEP,
    "weight_grads": {"panels", "aten"},
    "input_grad": {"panels", "aten"},
    "sharing": {"by_rows", "by_slabs", "beside"},
    "converts": {False, True},
    "row_blocks": {1, 2},
    "column_blocks": {1, 2},
}


def always():
    """(case, dtype): the size is one value, each option another, the dtype the last."""
    rows = {
        ((case.T, case.B, case.I, case.H, case.lengths), *astuple(case)[4:-1], dtype): (case, dtype)
        for case, dtype in product(GRID, DTYPES)
    }
    return [rows[row] for row in pairwise(rows)]


ALWAYS = always()
every_case = pytest.mark.parametrize(
    "case", rest_is_full(GRID, [case for case in GRID if case.H == 7 or (case, F64) in ALWAYS])
)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
#: Along with their dtypes: the dtypes of one case follow one another.
most_cases = pytest.mark.parametrize("case, dtype", rest_is_full(product(GRID, DTYPES), ALWAYS))


@lru_cache(maxsize=1)
def exact(case, dtype):
    return exact_run(case, dtype)


@most_cases
def test_results_and_gradients_are_as_accurate_as_nn_rnns(case, dtype):
    ours = testing.run(case.module(fastrnn.RNN, dtype), case, dtype)
    assert_as_accurate_as_nn_rnn(ours, case, dtype, exact(case, dtype))


@every_case
def test_forward_is_the_references(case):
    call = OperatorCall(case, torch.float64)
    output, h_n, layer_outputs = call.forward()
    y, h, outputs = reference.rnn(*call.exact_arguments(h_n), **call.named)
    for ours, theirs in [(output, y), (h_n, h), *zip(layer_outputs, outputs, strict=True)]:
        error = testing.relative_error(ours.reshape(theirs.shape), theirs)
        assert error < testing.FLOAT64_DIFFERENCE


@most_cases
def test_backward_is_the_references_at_the_same_states(case, dtype):
    call = OperatorCall(case, dtype)
    # Each gradient, and each between two layers, is rounded once.
    allowed = {
        torch.float64: testing.FLOAT64_DIFFERENCE,
        torch.float32: float32_drift(call.sizes),
    }.get(dtype, torch.finfo(dtype).eps)
    for name, error in backward_errors(call).items():
        assert error < allowed, name


@every_dtype
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("H", [3, 70])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e-40])
def test_what_is_no_ordinary_number_stays_in_its_sequence(value, H, nonlinearity, dtype):
    case = testing.Case(3, 5, 4, H, nonlinearity=nonlinearity)
    x = case.arguments(dtype)[0][0]
    plain = case.module(fastrnn.RNN, dtype)(x)[0]
    x[1, 2] = value
    ours = case.module(fastrnn.RNN, dtype)(x)[0]
    # In float64: which product PyTorch takes for 16 bits, and what that makes of infinity, depends
    # on the processor.
    theirs = case.module(torch.nn.RNN, dtype).double()(x.double())[0]
    assert torch.equal(ours.isfinite(), theirs.isfinite())
    assert torch.equal(ours.isnan(), theirs.isnan())
    others = [0, 1, 3, 4]
    assert torch.equal(ours[:, others], plain[:, others])


@pytest.mark.parametrize("case, dtype", ALWAYS, ids=name_of)
def test_nothing_uninitialised_is_read(case, dtype):
    call = OperatorCall(case, dtype)
    clean = call.forward()
    with testing.poisoned_memory():
        poisoned = call.forward()
    for a, b in zip([*clean[:2], *clean[2]], [*poisoned[:2], *poisoned[2]], strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def two_threads():
    with threads(2):
        yield


def plans_of(packed, dtypes=DTYPES):
    """(steps, plan) of each layer of what always runs."""
    return [
        (steps_of(case), plan)
        for case, dtype in ALWAYS
        if bool(case.lengths) == packed and dtype in dtypes
        for plan in layer_plans(case, dtype)
    ]


@pytest.mark.parametrize("name", WAYS)
def test_the_grid_takes_every_way_of_the_plan(name, two_threads):
    assert {plan[name] for _, plan in plans_of(packed=False)} >= WAYS[name]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_the_grid_runs_backward_in_one_chunk_in_two_and_with_a_middle_one(packed, dtype):
    chunks = {min(3, -(-T // plan["chunk_steps"])) for T, plan in plans_of(packed, [dtype])}
    assert chunks == {1, 2, 3}


def test_the_grid_has_middle_chunks_with_gradients_by_the_kernel_and_by_aten():
    several = [plan for T, plan in plans_of(packed=False) if 2 * plan["chunk_steps"] < T]
    assert {plan["weight_grads"] for plan in several} == {"panels", "aten"}


def test_the_grid_converts_sixteen_bits_in_parts():
    assert any(plan["convert_steps"] < T for T, plan in plans_of(False, [torch.float16]))
