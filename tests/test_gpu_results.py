# SPDX-License-Identifier: Apache-2.0
"""On a GPU: every case of the grid, and sizes around its tiles, in every precision; bits; walks.

Contract: a float64 run of torch.nn.RNN on the CPU is right. In float64 ours agrees with it; below
that ours is at most 1.5 times as far from it as nn.RNN on the same GPU is, with TF32 and without.
The other files of what only a GPU has take their helpers from here.
"""

import itertools
import math
from functools import lru_cache

import pytest
import test_operators
import torch
from accuracy import OperatorCall, backward_errors, float32_drift
from cross import rest_is_full
from devices import needs_gpu
from pairs import tensor
from test_capabilities import run_python

import fastrnn
from fastrnn import testing
from fastrnn.functional import takes_fused_path
from fastrnn.testing import Case

pytestmark = needs_gpu

DEVICE = torch.device("cuda")
#: dtype, and whether nn.RNN, and so ours, may round float32 to TF32 in products.
PRECISIONS = {
    "float64": (torch.float64, False),
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
}
every_precision = pytest.mark.parametrize("precision", PRECISIONS)
CLASSES = (fastrnn.RNN, torch.nn.RNN)


def on_device(module):
    """Move `module` to the GPU; called as before, it takes from the CPU and gives back to it."""

    def carry(module, given):
        input, hx = (t if t is None else t.to(DEVICE) for t in given)
        if isinstance(module, fastrnn.RNN):  # else nothing of ours would be tested
            assert takes_fused_path(tensor(input), list(module.parameters()), hx)
        return input, hx

    def bring_back(module, given, results):
        assert all(tensor(t).device.type == DEVICE.type for t in results)
        return tuple(t.cpu() for t in results)

    module.register_forward_pre_hook(carry)
    module.register_forward_hook(bring_back)
    return module.to(DEVICE)


def tf32_allowed(allowed):
    """cuDNN's settings as they are, but for TF32."""
    cudnn = torch.backends.cudnn
    names = ("enabled", "benchmark", "deterministic")
    return cudnn.flags(**{name: getattr(cudnn, name) for name in names}, allow_tf32=allowed)


# Equality


def sizes():
    """Every H around the tiles, with every B; T, I and the options take turns."""
    hidden = (16, 17, 31, 64, 65, 128, 129, 200, 256, 257, 320, 384, 385, 512)
    batches = (1, 7, 8, 9, 16, 130, 300)
    forms = itertools.cycle([
        {"hx": True},
        {"nonlinearity": "relu", "num_layers": 2, "bidirectional": True},
        {"num_layers": 2, "hx": True, "batch_first": True, "bias": False},
        {"bidirectional": True, "hx": True},
    ])  # fmt: skip
    turns = zip(itertools.product(hidden, batches), itertools.cycle((1, 2, 3, 5, 100)),
                itertools.cycle((1, 3, 100)), forms)  # fmt: skip
    # Errors of a few numbers are chance: 64 of the input's at least.
    cases = [Case(T, B, I if T * B * I >= 64 else 100, H, **f) for (H, B), T, I, f in turns]
    lengths = itertools.cycle([(5,) * 7, (4,), tuple(range(1, 40)), (1,) * 130, (100, 2, 1)])
    for H, I in itertools.product(hidden, (16, 23, 30)):
        form = {**next(forms), "batch_first": False, "lengths": next(lengths)}
        cases.append(Case(0, 0, I, H, **form))
    # Weights that no single block, and no few, can hold.
    return [*cases, Case(3, 9, 5, 1030, hx=True), Case(3, 16, 5, 2050, nonlinearity="relu")]


GRID = test_operators.GRID
SIZES = sizes()
FEW = GRID[::11] + SIZES[::9]


def run(cls, case, precision):
    """Results and gradients of a run on the GPU, in float64 on the CPU."""
    dtype, tf32 = PRECISIONS[precision]
    with tf32_allowed(tf32):
        results = testing.run(on_device(case.module(cls, dtype)), case, dtype)
    return {name: t.cpu() for name, t in results.items()}


@lru_cache(maxsize=1)  # float32 and TF32 of one case follow one another
def exact(case, dtype):
    """A float64 run on the CPU, on the numbers that `dtype` can hold."""
    return testing.run(case.module(torch.nn.RNN, dtype).double(), case, dtype)


def assert_accurate(ours, case, precision):
    dtype, tf32 = PRECISIONS[precision]
    right = exact(case, dtype)
    theirs = right if precision == "float64" else run(torch.nn.RNN, case, precision)
    if tf32 and testing.relative_error(theirs["output"], right["output"]) > 2**-16:
        dtype = torch.float16  # cuDNN did round to TF32, which has the mantissa of float16
    if case.nonlinearity == "relu" and precision != "float64":
        ours, theirs = ({n: some[n] for n in ("output", "h_n")} for some in (ours, theirs))
    testing.assert_as_accurate(ours, theirs, right, dtype)


CASES = list(itertools.product(GRID + SIZES, PRECISIONS))
#: The precisions take turns, but on the sizes that the CPU has every dtype of.
ALWAYS = [
    *zip(SIZES, itertools.cycle(PRECISIONS)),
    *((case, str(dtype)[6:]) for case, dtype in test_operators.ALWAYS),
]


@pytest.mark.parametrize("case, precision", rest_is_full(CASES, ALWAYS))
def test_results_and_gradients_are_as_accurate_as_nn_rnns(case, precision):
    assert_accurate(run(fastrnn.RNN, case, precision), case, precision)


#: In float32 and 16 bits a state may round to the other side of relu's kink, in either library,
#: and changes a gradient by all of it: those gradients are compared at given states.
KINKED = [row for row in CASES if row[0].nonlinearity == "relu" and row[1] != "float64"]


@pytest.mark.parametrize(
    "case, precision", rest_is_full(KINKED, [row for row in ALWAYS if row in KINKED])
)
def test_backward_of_relu_is_the_references_at_the_same_states(case, precision):
    dtype, tf32 = PRECISIONS[precision]
    call = OperatorCall(case, dtype, DEVICE)
    # Every step's gradient may be rounded.
    low = float32_drift(call.sizes) if dtype.itemsize == 4 else 4 * torch.finfo(dtype).eps
    with tf32_allowed(tf32):
        errors = backward_errors(call)
    for name, error in errors.items():
        assert error < (2**-9 if tf32 else low), name


@pytest.mark.parametrize("H", [64, 320, 512])
def test_the_newer_setting_may_forbid_tf32_too(H):
    case = Case(9, 16, 33, H, hx=True)
    newer = torch.backends.cudnn.rnn
    # PyTorch's own testing module, which other tests import, forbids to set it.
    with tf32_allowed(True), torch.backends.__allow_nonbracketed_mutation():
        before = newer.fp32_precision
        newer.fp32_precision = "ieee"
        try:
            ours = testing.run(
                on_device(case.module(fastrnn.RNN, torch.float32)), case, torch.float32
            )
        finally:
            newer.fp32_precision = before  # else the older setting cannot even be read
    for name, right in exact(case, torch.float32).items():
        assert testing.relative_error(ours[name].cpu(), right) < 4e-6, name


@every_precision
@pytest.mark.parametrize("H", [64, 512])
def test_settings_of_matrix_products_change_no_bit(H, precision, monkeypatch):
    case = Case(9, 16, 33, H, hx=True)
    first = run(fastrnn.RNN, case, precision)
    matmul = torch.backends.cuda.matmul
    reduced = [f"allow_{name}_reduced_precision_reduction" for name in ("fp16", "bf16")]
    for name in ("allow_tf32", "allow_fp16_accumulation", *reduced):
        monkeypatch.setattr(matmul, name, not getattr(matmul, name))
    assert_same_bits(first, run(fastrnn.RNN, case, precision))


@pytest.mark.parametrize("B", [131, 393])  # T * B is 64 n + 1 and 64 n + 3
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_sums_over_many_rows_leave_out_none(B, precision):
    """cuBLAS 13.1 leaves out up to three of 16 bits: 1 % of the gradient here."""
    dtype, _ = PRECISIONS[precision]
    case = Case(43, B, 112, 112)
    ours, right = run(fastrnn.RNN, case, precision), exact(case, dtype)
    for name in ("grad_weight_ih_l0", "grad_weight_hh_l0"):
        assert testing.relative_error(ours[name], right[name]) < 4 * torch.finfo(dtype).eps / 4, (
            name
        )


@every_precision
def test_thousands_of_steps_stay_as_accurate_as_nn_rnns(precision):
    case = Case(5000, 4, 64, 64, hx=True)
    assert_accurate(run(fastrnn.RNN, case, precision), case, precision)


# NaN and infinities


def spoil(module):
    """`module`, given NaN and infinities in a few rows of input and hx."""

    def put(module, given):
        x, hx = (t.clone() for t in given)
        x[0, 0, 1], x[1, 2, 0], x[2, 1, 2], x[2, 3, 0] = math.inf, math.nan, -math.inf, math.inf
        hx[0, 4, 2], hx[1, 5, 1], hx[0, 6, 0] = math.nan, math.inf, -math.inf
        return x, hx

    module.register_forward_pre_hook(put)
    return module


#: Results in which rows of the batch stay apart. Sums over all rows may meet 0 * Inf at a kink.
EACH_ROWS = ("output", "h_n", "grad_input0", "grad_hx")


@every_precision
@pytest.mark.parametrize("H", [17, 64, 200, 512])
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_nan_and_infinity_travel_as_in_nn_rnn_on_the_cpu(nonlinearity, H, precision):
    dtype, tf32 = PRECISIONS[precision]
    case = Case(4, 9, 5, H, nonlinearity=nonlinearity, bidirectional=True, hx=True)
    ours, theirs = spoil(case.module(fastrnn.RNN, dtype)), case.module(torch.nn.RNN, dtype).double()
    with tf32_allowed(tf32):
        found = testing.run(on_device(ours), case, dtype)
    right = testing.run(spoil(theirs), case, dtype)
    kept = [n for n in right if precision == "float64" or n in EACH_ROWS]
    for name, wanted in ((name, right[name]) for name in kept):
        value = found[name].cpu()
        assert torch.equal(value.isnan(), wanted.isnan()), name
        assert torch.equal(value.isposinf(), wanted.isposinf()), name
        assert torch.equal(value.isneginf(), wanted.isneginf()), name
    finite = right["output"].isfinite()
    error = testing.relative_error(found["output"].cpu()[finite], right["output"][finite])
    assert error < (2**-9 if tf32 else 1e-12 if dtype.itemsize == 8 else
                    1e-6 if dtype.itemsize == 4 else 4 * torch.finfo(dtype).eps)  # fmt: skip


# Bits


in_turns = pytest.mark.parametrize(
    "case, precision",
    rest_is_full(itertools.product(FEW, PRECISIONS), zip(FEW, itertools.cycle(PRECISIONS))),
)


def assert_same_bits(first, second):
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@in_turns
def test_same_inputs_give_the_same_bits(case, precision):
    first = run(fastrnn.RNN, case, precision)
    for _ in range(2):
        assert_same_bits(first, run(fastrnn.RNN, case, precision))


def poison_freed_memory():
    """Leave NaN of every dtype in the allocator's cache, in blocks of many sizes."""
    sizes = [2**n for n in range(9, 26) for _ in range(4)]
    blocks = [torch.full((size,), 255, dtype=torch.uint8, device=DEVICE) for size in sizes]
    del blocks


@in_turns
def test_what_memory_held_before_changes_no_bit(case, precision):
    first = run(fastrnn.RNN, case, precision)
    poison_freed_memory()
    assert_same_bits(first, run(fastrnn.RNN, case, precision))


@in_turns
def test_deterministic_algorithms_give_the_same_bits(case, precision, monkeypatch):
    """PyTorch fills what it allocates with NaN then; cuBLAS has to be told its workspace."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    first = run(fastrnn.RNN, case, precision)
    with testing.poisoned_memory():
        second, third = (run(fastrnn.RNN, case, precision) for _ in range(2))
    assert_same_bits(second, third)
    assert_same_bits(first, second)


# Walks: every case's slower ways


WALK_CASES = GRID[::5] + SIZES[::12]
#: Parts of them, each for one process.
WALK_RUNS = [list(itertools.product(WALK_CASES[i::5], PRECISIONS)) for i in range(5)]

SAVE_RESULTS = """
import sys
import torch
import test_gpu_results as suite
torch.save([suite.run(suite.fastrnn.RNN, *each) for each in suite.WALK_RUNS[int(sys.argv[2])]],
           sys.argv[1])
"""


@pytest.mark.parametrize(
    "walk, part",
    rest_is_full(
        itertools.product(["steps", "block", "group"], range(len(WALK_RUNS))),
        [(walk, 0) for walk in ("steps", "block", "group")],
    ),
)
def test_results_are_as_accurate_with_the_walk_that_is_asked_for(walk, part, tmp_path):
    """So two walks are within both errors of one another."""
    file = tmp_path / "results.pt"
    process = run_python(SAVE_RESULTS, str(file), str(part), FASTRNN_CUDA_WALK=walk)
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-4000:]
    failures = []
    for each, ours in zip(WALK_RUNS[part], torch.load(file), strict=True):
        try:
            assert_accurate(ours, *each)
        except AssertionError as error:
            failures.append(f"{each[0]} {each[1]}: {error}")
    assert not failures, "\n".join(failures)
