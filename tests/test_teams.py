# SPDX-License-Identifier: Apache-2.0
"""Threads that share the columns of each step: a team, where there are too few rows to split.

More threads than this machine has cores make members of a team late, again and again. Last, other
processes do, whatever it is that threads share.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accuracy import assert_as_accurate_as_nn_rnn, layer_plans, outputs, threads
from cross import crossed
from run import busy_processes

import fastrnn
from fastrnn import _C, testing
from fastrnn.testing import Case

# Weights packed and not, one row and several, x in the step and before, tails, several panels for
# few threads and fewer panels than threads, backward in one chunk and in four.
CASES = [
    Case(40, 1, 3, 224),
    Case(30, 1, 2, 230, hx=True),
    Case(25, 1, 40, 261, nonlinearity="relu"),
    Case(12, 2, 5, 301, bidirectional=True, hx=True),
    Case(20, 3, 3, 230, num_layers=2, batch_first=True),
    Case(9, 5, 7, 330, bidirectional=True, num_layers=2, nonlinearity="relu"),
    Case(4, 2, 3, 500),
    Case(300, 1, 3, 256),
    Case(40, 2, 3, 384, hx=True),
    Case(0, 0, 3, 250, lengths=(19, 3, 11), hx=True),
    Case(0, 0, 9, 270, lengths=(2, 14, 9, 1), bidirectional=True),
]


def team_of(case, dtype):
    return layer_plans(case, dtype)[0]["column_blocks"]


def test_a_batch_too_small_to_split_is_shared_by_columns():
    with threads(1):
        assert team_of(Case(100, 1, 3, 512), torch.float32) == 1
    with threads(2):
        assert team_of(Case(100, 1, 3, 512), torch.float32) == 2
        # Two directions are two walks already.
        assert team_of(Case(100, 1, 3, 512, bidirectional=True), torch.float32) == 1
        # A hand-over would cost more than half of the step.
        assert team_of(Case(100, 1, 3, 64), torch.float32) == 1
        # Not worth a second thread.
        assert team_of(Case(2, 1, 3, 512), torch.float32) == 1
        # Enough rows for each thread: no hand-over at all.
        assert team_of(Case(100, 64, 3, 512), torch.float32) == 1
    with threads(4):
        assert team_of(Case(100, 1, 3, 512, bidirectional=True), torch.float32) == 2
        assert team_of(Case(100, 1, 3, 250), torch.float32) == 3  # 64 columns each


@pytest.mark.parametrize(
    "case, dtype, count",
    crossed(CASES, [torch.float32, torch.bfloat16], [2, 8], rest=[3]),
)
def test_results_and_gradients_of_a_team_are_right(case, dtype, count):
    with threads(count):
        if count == 8:
            assert team_of(case, dtype) > 1
        ours = testing.run(case.module(fastrnn.RNN, dtype), case, dtype)
    assert_as_accurate_as_nn_rnn(ours, case, dtype)


OWN_PRODUCTS = [
    case for case in CASES if case.num_layers == 1 and layer_plans(case)[0]["input"] == "in_step"
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", OWN_PRODUCTS, ids=str)
def test_a_team_computes_the_same_bits_as_one_thread(case, dtype):
    """Whoever computes a column, its sum has the same order. (PyTorch's products may differ.)"""
    module = case.module(fastrnn.RNN, dtype)
    with threads(1):
        alone = outputs(module, case, dtype)
    for count in (2, 3, 5, 8):
        for _ in range(20):
            with threads(count):
                together = outputs(module, case, dtype)
            assert all(map(torch.equal, alone, together))


# How two threads share each: columns, rows, directions, layers of one sequence, a walk and what is
# made of it, and large products with rows, of whole tiles or with one row more.
SHARED = [
    (Case(1500, 1, 2, 256), 10, lambda plan: plan["column_blocks"] == 2),
    (Case(100, 32, 64, 64), 100, lambda plan: plan["row_blocks"] == 2),
    (Case(100, 9, 30, 130, bidirectional=True), 50, lambda plan: plan["threads"] == 2),
    (Case(100, 1, 128, 128, num_layers=4), 100, lambda plan: plan["threads"] == 2),
    (Case(1000, 1, 64, 64), 100, lambda plan: plan["threads"] == 2),
    (Case(20, 64, 520, 520), 10, lambda plan: plan["input"] != "in_step"),
    (Case(19, 19, 520, 520), 10, lambda plan: plan["input"] != "in_step"),
]


@pytest.mark.full  # it keeps all cores busy
@pytest.mark.parametrize(
    ("case", "times", "is_shared"), SHARED, ids=[str(case) for case, *_ in SHARED]
)
def test_busy_cores_change_no_bits(case, times, is_shared):
    """Threads lose their cores in the middle of a step, or come so late that one goes on alone."""
    module = case.module(fastrnn.RNN, torch.float32)
    with threads(2):
        assert is_shared(layer_plans(case)[0])
        quiet = testing.run(module, case, torch.float32)
        with busy_processes(os.cpu_count() or 1):
            for _ in range(times):
                busy = testing.run(module, case, torch.float32)
                assert all(torch.equal(quiet[name], busy[name]) for name in quiet)


def test_no_slab_is_computed_twice():
    """Without features the step adds to what stands in the output: twice would show."""
    module = fastrnn.RNN(1, 256)
    weights = [module.weight_ih_l0[:, :0], *list(module.parameters())[1:]]
    results = []
    for count in (1, 2, 3, 4):
        with threads(count):
            assert _C.cpu_plan(200, 1, 0, 256)["column_blocks"] == count
            for _ in range(20):
                results.append(fastrnn.functional.rnn(torch.empty(200, 1, 0), weights)[0])
    assert all(torch.equal(results[0], result) for result in results)


ALONE = """
import torch, fastrnn
from fastrnn import _C
torch.set_num_threads(4)
assert _C.cpu_plan(60, 1, 3, 256)["column_blocks"] == 4
torch.manual_seed(0)
module = fastrnn.RNN(3, 256)
x = torch.randn(60, 1, 3)
def run():
    module.zero_grad()
    results = module(x)
    sum(y.square().sum() for y in results).backward()
    return results, [p.grad for p in module.parameters()]


together, gradients = run()
torch.set_num_threads(1)
alone, expected = run()
assert all(map(torch.equal, alone, together))
for ours, right in zip(gradients, expected):
    torch.testing.assert_close(ours, right)
print("right")
"""


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_a_team_of_which_not_all_come_computes_the_rest(limit):
    process = run_with_thread_limit(ALONE, limit)
    assert process.stdout == "right\n", process.stderr


# Of two threads one never comes: products of an odd number of rows, the gradient of hx by rows, a
# stack with products between its layers, one layer with products beside its walks, 16 bits.
BITS = """
import hashlib, torch, fastrnn
from fastrnn import testing
from fastrnn.testing import Case

torch.set_num_threads(2)
for case, dtype in [
    (Case(43, 30, 520, 520), torch.float32),
    (Case(100, 32, 64, 64, hx=True), torch.float32),
    (Case(50, 1, 20, 180, num_layers=3), torch.float32),
    (Case(100, 1, 128, 128), torch.float32),
    (Case(10, 40, 300, 300, hx=True), torch.float16),
]:
    found = testing.run(case.module(fastrnn.RNN, dtype), case, dtype)
    for name in found:
        print(name, hashlib.sha256(found[name].contiguous().view(torch.uint8).numpy()).hexdigest())
"""


def test_bits_are_those_of_the_threads_that_were_asked_for():
    one, two = (run_with_thread_limit(BITS, limit) for limit in (1, 2))
    assert one.stdout == two.stdout, one.stderr
    assert one.stdout.count("\n") > 20, one.stderr


def run_with_thread_limit(code, limit):
    """The OpenMP runtime may give fewer threads than torch.get_num_threads() says."""
    paths = [str(Path(fastrnn.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "OMP_THREAD_LIMIT": str(limit),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
