# SPDX-License-Identifier: Apache-2.0
"""The CUDA engine without a GPU: fastrnn.RNN on CPU tensors, its operators run by the engine's own
C++ and by its kernels on the emulator (cuda_engine.cpp)."""

import functools
import itertools
from contextlib import nullcontext
from pathlib import Path

import cuda_host
import pytest
import torch
from accuracy import ExactProducts, assert_as_accurate_as_nn_rnn
from cross import in_turn
from torch.nn.utils.rnn import pack_sequence

import fastrnn
from fastrnn import testing

pytestmark = pytest.mark.skipif(not cuda_host.available(), reason="needs Linux and g++")

CSRC = cuda_host.ROOT / "csrc"
NEED_CUDA = ("engine.cpp", "cublas.cpp")  # cuda_engine.cpp has twins of what they hold
SOURCES = [
    *sorted((CSRC / "cuda" / "kernels").glob("*.cu")),
    *(p for p in sorted((CSRC / "cuda").glob("*.cpp")) if p.name not in NEED_CUDA),
    *(CSRC / name for name in ("check.cpp", "layer.cpp", "operators.cpp")),
    Path(__file__).with_name("cuda_engine.cpp"),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@pytest.fixture(scope="session")
def library():
    flags, link = cuda_host.torch_flags()
    return cuda_host.build(*SOURCES, flags=("-O1", *flags), link=link)


@pytest.fixture
def engine(library):
    """In its scope fastrnn's CPU operators are those of the CUDA engine."""
    library.operators = []

    def run(name, *arguments):
        library.operators.append(name)
        return getattr(torch.ops.fastrnn_cuda_host, name)(*arguments)

    override = torch.library.Library("fastrnn", "IMPL")
    for name in ("rnn_forward", "rnn_backward"):
        override.impl(name, functools.partial(run, name), "CPU", allow_override=True)
    yield library
    override._destroy()


EMPTY = [
    testing.Case(3, 0, 2, 4, bidirectional=True, hx=True),
    testing.Case(3, 0, 2, 4, 2, batch_first=True),
]


def cases():
    """Those of the grid that are not large, and sizes around those at which the kernels change."""
    work = [(case, sum(case.lengths or [case.T * case.B]) * case.H**2) for case in testing.grid()]
    result = [case for case, multiplications in work if multiplications < 4e6]
    for H in (16, 31, 33, 64, 65, 128, 129, 192, 193, 223, 256, 257, 330, 385):
        for B, I, bi in ((1, 2, False), (9, 7, True), (7, 3, False)):
            result.append(testing.Case(5, B, I, H, bidirectional=bi, hx=bi, batch_first=bi))
    result.append(testing.Case(0, 0, 2, 255, bidirectional=True, lengths=(6, 3, 3, 1, 1)))
    return result + EMPTY


#: By the group walk, with the multiprocessors of the GPU: several launches, tiles of rows, and
#: chunks of units.
GROUPS = [
    (testing.Case(4, 3, 2, 40, bidirectional=True, hx=True), 4),
    (testing.Case(0, 0, 3, 24, 2, bidirectional=True, hx=True, lengths=(5, 3, 2, 2, 1)), 4),
    (testing.Case(0, 0, 3, 72, lengths=(2, 9, 30, 1, 7, 7), hx=True), 5),
    (testing.Case(5, 41, 5, 64, hx=True, bias=False), 4),
    (testing.Case(4, 41, 5, 64), 16),
    (testing.Case(4, 30, 5, 64, nonlinearity="relu"), 4),
    (testing.Case(300, 3, 5, 32, batch_first=True), 4),
    (testing.Case(0, 0, 3, 40, lengths=tuple(1 + i % 9 for i in range(70)), bidirectional=True), 4),
    (testing.Case(3, 9, 5, 520, hx=True), 33),
    (testing.Case(3, 20, 5, 520), 34),
    (testing.Case(2, 9, 5, 1032, hx=True), 65),
]
LOWER = [torch.float32, torch.bfloat16, torch.float16]
in_groups = pytest.mark.parametrize("case, multiprocessors", GROUPS, ids=str)


@pytest.fixture
def groups(engine, monkeypatch):
    """The group walk wherever it can run, on a GPU of so many multiprocessors."""
    monkeypatch.setenv("FASTRNN_CUDA_WALK", "group")
    yield lambda count: engine.call("fastrnn_host_set_multiprocessors", count)
    engine.call("fastrnn_host_set_multiprocessors", 4)


def run_and_compare(case, dtype):
    ours = testing.run(case.module(fastrnn.RNN, dtype), case, dtype)
    assert_as_accurate_as_nn_rnn(ours, case, dtype)


@pytest.mark.parametrize("case, dtype", in_turn(cases()[::2], DTYPES))
def test_results_and_gradients_are_as_accurate_as_nn_rnns(engine, case, dtype):
    run_and_compare(case, dtype)


# Not in float32, where all that could differ are the products of this machine's BLAS.
@pytest.mark.parametrize("case, dtype", in_turn(cases()[1::4], [torch.float64, torch.bfloat16]))
def test_so_are_they_without_the_kernels_that_walk_through_all_steps(
    engine, monkeypatch, case, dtype
):
    monkeypatch.setenv("FASTRNN_CUDA_WALK", "steps")
    run_and_compare(case, dtype)


@pytest.mark.parametrize("dtype", LOWER, ids=str)
@in_groups
def test_so_are_they_where_blocks_share_a_layer(groups, case, multiprocessors, dtype):
    groups(multiprocessors)
    run_and_compare(case, dtype)


@in_groups
def test_groups_that_fit_together_are_one_launch_for_each_chunk(
    engine, groups, case, multiprocessors
):
    groups(multiprocessors)
    module, (inputs, hx) = case.module(fastrnn.RNN, torch.bfloat16), case.arguments(torch.bfloat16)
    packed = pack_sequence(inputs, enforce_sorted=False) if case.lengths else inputs[0]
    T, B = (max(case.lengths), len(case.lengths)) if case.lengths else (case.T, case.B)
    directions = 2 if case.bidirectional else 1

    def divide_up(a, b):
        return (a + b - 1) // b

    at_a_time = multiprocessors // (divide_up(case.H, 32 if case.H <= 1024 else 16) * directions)
    rows = next(r for r in (8, 16, 32) if r == 32 or divide_up(B, r) <= at_a_time)
    numbers = B * case.H * directions  # of a step, each four bytes
    chunk = min(T, max(1, max(32 << 10, T * numbers) // (4 * numbers)))
    launches = divide_up(divide_up(B, rows), at_a_time) * divide_up(T, chunk) * case.num_layers
    before = engine.launches()
    module(packed, hx)
    assert engine.launches() - before == launches + (1 if case.lengths else 0)


SMALL = [
    testing.Case(4, 3, 2, 40, bidirectional=True, hx=True),
    testing.Case(0, 0, 3, 20, 2, bidirectional=True, hx=True, lengths=(5, 3, 2, 2, 1)),
    testing.Case(0, 0, 3, 70, lengths=(2, 9, 30, 1, 7, 7)),
]
WEIGHTS_IN_SHARED_MEMORY = [
    (testing.Case(3, 5, 2, 200, hx=True), torch.float32),
    (testing.Case(3, 2, 2, 330, hx=True), torch.float16),
]


@pytest.mark.parametrize("walk", ["steps", "block"])
@pytest.mark.parametrize(
    "case, dtype",
    [*itertools.product(SMALL, [torch.float32, torch.float16]), *WEIGHTS_IN_SHARED_MEMORY],
    ids=str,
)
def test_no_order_of_threads_changes_a_bit(engine, monkeypatch, case, dtype, walk):
    monkeypatch.setenv("FASTRNN_CUDA_WALK", walk)
    assert_same_bits_in_every_order(engine, case, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case, multiprocessors", GROUPS[:5], ids=str)
def test_no_order_of_blocks_that_share_a_layer_does(engine, groups, case, multiprocessors, dtype):
    groups(multiprocessors)
    assert_same_bits_in_every_order(engine, case, dtype)


def assert_same_bits_in_every_order(engine, case, dtype):
    results = []
    for order in cuda_host.ORDERS:
        engine.set_order(*order)
        results.append(testing.run(case.module(fastrnn.RNN, dtype), case, dtype))
    engine.set_order("ascending")
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


def nan_of_ones(dtype):
    """A NaN all of whose bits are set: for such a number blocks wait that share a layer."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    return torch.tensor(-1, dtype=integer).view(dtype)


def assert_spoilt_alike(case, dtype, weight=None):
    """With NaN and infinity in input and hx; with `weight` as one of those of w_hh."""
    states = {}
    for cls in (fastrnn.RNN, torch.nn.RNN):
        module = case.module(cls, dtype)
        (first, *rest), hx = case.arguments(dtype)
        first = first.clone()
        if weight is None:
            first.view(-1)[0], first.view(-1)[-1] = nan_of_ones(dtype), float("inf")
            if hx is not None:
                hx[0, -1, 0] = nan_of_ones(dtype)
        else:
            module.weight_hh_l0.data[3, 5] = weight
        x = pack_sequence([first, *rest], enforce_sorted=False) if case.lengths else first
        with ExactProducts() if cls is torch.nn.RNN else nullcontext():
            output, h_n = module(x, hx)
        states[cls] = output.data if case.lengths else output, h_n
    for ours, theirs in zip(*states.values(), strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.isposinf(), theirs.isposinf())
        assert torch.equal(ours.isneginf(), theirs.isneginf())


@every_dtype
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_nan_and_infinity_travel_as_in_nn_rnn(engine, case, dtype):
    assert_spoilt_alike(case, dtype)


@pytest.mark.parametrize("dtype", LOWER, ids=str)
@pytest.mark.parametrize("case, multiprocessors", GROUPS[:6], ids=str)
def test_so_do_they_where_blocks_share_a_layer(groups, case, multiprocessors, dtype):
    groups(multiprocessors)
    assert_spoilt_alike(case, dtype)


@pytest.mark.parametrize("weight", [float("inf"), -float("inf"), float("nan")])
def test_weights_that_are_not_finite_do_what_they_do_in_nn_rnn(groups, weight):
    groups(4)
    for nonlinearity in ("tanh", "relu"):
        case = testing.Case(4, 3, 2, 40, hx=True, nonlinearity=nonlinearity)
        assert_spoilt_alike(case, torch.float32, weight)


@in_groups
def test_the_gradient_of_the_last_state_alone(groups, case, multiprocessors):
    groups(multiprocessors)
    gradients = []
    for cls in (fastrnn.RNN, torch.nn.RNN):
        module, (inputs, hx) = case.module(cls, torch.float32), case.arguments(torch.float32)
        packed = pack_sequence(inputs, enforce_sorted=False) if case.lengths else inputs[0]
        _, h_n = module(packed, hx)
        gradients.append(torch.autograd.grad(h_n.sum(), list(module.parameters())))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("walk", ["steps", "block", "group"])
@pytest.mark.parametrize("I", [2, 5])
@pytest.mark.parametrize("shape", ["expanded", "sliced"])
def test_tensors_are_read_as_they_lie(engine, monkeypatch, shape, I, walk):
    monkeypatch.setenv("FASTRNN_CUDA_WALK", walk)
    results = []
    for cls in (fastrnn.RNN, torch.nn.RNN):
        torch.manual_seed(0)
        module = cls(I, 20)
        if shape == "expanded":
            x = torch.randn(I).expand(4, 3, I)
        else:
            x = torch.randn(4, 3, 2 * I)[..., ::2]
        hx = torch.randn(1, 1, 20).expand(1, 3, 20).requires_grad_()
        output, _ = module(x.requires_grad_(), hx)
        gradient = torch.randn(20, 4, 3).permute(1, 2, 0)
        if shape == "expanded":
            gradient = torch.ones([]).expand(4, 3, 20)
        results.append(
            [output, *torch.autograd.grad(output, [x, hx, *module.parameters()], gradient)]
        )
    torch.testing.assert_close(*results)


LAYOUTS = {
    "as it is": lambda t: t,
    "transposed": lambda t: t.t().contiguous().t(),
    "columns of a wider one": lambda t: torch.cat([t, t], 1)[:, : t.size(1)],
    "rows of a longer one, transposed": lambda t: torch.cat([t, t]).t().contiguous().t()[: len(t)],
    "every other column": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "one row, many times": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("K", [129, 5633, 5639])
def test_products_that_are_cut_in_two_are_whole(library, K):
    """Over numbers of rows of which cuBLAS may leave out the last ones."""
    a, b = torch.randn(K, 3).half(), torch.randn(K, 5).half()
    out = torch.full([3, 5], 7.0)
    torch.ops.fastrnn_cuda_host.product_out(out, a.t(), b, True)
    torch.testing.assert_close(out, 7 + a.float().t() @ b.float(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("m, k, n", [(3, 4, 5), (1, 4, 5), (3, 1, 5), (3, 4, 1), (1, 1, 1)])
@pytest.mark.parametrize("of_a, of_b", [*itertools.product(LAYOUTS, repeat=2)])
def test_matrices_of_any_strides_are_multiplied(library, of_a, of_b, m, k, n):
    a, b = LAYOUTS[of_a](torch.randn(m, k)), LAYOUTS[of_b](torch.randn(k, n))
    out = torch.full([m, 2 * n], 7.0)
    torch.ops.fastrnn_cuda_host.product_out(out[:, :n], a, b, False)
    torch.testing.assert_close(out, torch.cat([a @ b, torch.full([m, n], 7.0)], 1))
    torch.ops.fastrnn_cuda_host.product_out(out[:, n:], a, b, True)
    torch.testing.assert_close(out, torch.cat([a @ b, a @ b + 7], 1))


@pytest.mark.parametrize("m, k, n", [(3, 0, 5), (0, 4, 5), (3, 4, 0), (0, 0, 0)])
def test_a_sum_of_nothing_is_zero(library, m, k, n):
    out = torch.full([m, n], 7.0)
    a, b = torch.randn(m, k), torch.randn(k, n)
    torch.ops.fastrnn_cuda_host.product_out(out, a, b, True)
    assert (out == 7).all()
    torch.ops.fastrnn_cuda_host.product_out(out, a, b, False)
    assert (out == 0).all()


def test_the_engine_is_what_ran(engine):
    case = testing.Case(3, 2, 3, 20)
    testing.run(case.module(fastrnn.RNN, torch.float32), case, torch.float32)
    assert engine.operators == ["rnn_forward", "rnn_backward"]


@pytest.mark.parametrize("I, lengths, more", [(2, None, 0), (2, (5, 4), 1), (7, (5, 4), 1)])
def test_a_layer_is_one_launch_and_batch_sizes_travel_once(engine, I, lengths, more):
    case = testing.Case(3, 2, I, 20, 3, lengths=lengths, bidirectional=True)
    module, (x, _) = case.module(fastrnn.RNN, torch.float32), case.arguments(torch.float32)
    before = engine.launches()
    with torch.no_grad():
        module(pack_sequence(x) if lengths else x[0])
    assert engine.launches() - before == case.num_layers + more


def launches_of_backward(engine, case, frozen=""):
    module, (x, _) = case.module(fastrnn.RNN, torch.float32), case.arguments(torch.float32)
    for name, weight in module.named_parameters():
        weight.requires_grad_(not frozen or frozen not in name)
    output, _ = module(pack_sequence(x) if case.lengths else x[0])
    before = engine.launches()
    (output.data if case.lengths else output).sum().backward()
    return engine.launches() - before


# In packed data, the states before each step are gathered in a launch for each direction.
@pytest.mark.parametrize("lengths, gathered, more", [(None, 0, 0), ((5, 4), 2, 1)])
def test_in_backward_too(engine, lengths, gathered, more):
    case = testing.Case(3, 2, 7, 20, 3, lengths=lengths, bidirectional=True)
    assert launches_of_backward(engine, case) == case.num_layers * (1 + gathered) + more
    assert launches_of_backward(engine, case, "weight_hh") == case.num_layers + more


def test_without_these_kernels_batch_sizes_travel_for_the_gradient_of_w_hh_only(
    engine, monkeypatch
):
    monkeypatch.setenv("FASTRNN_CUDA_WALK", "steps")
    case = testing.Case(0, 0, 7, 20, 3, lengths=(5, 4), bidirectional=True)
    assert launches_of_backward(engine, case) == 3 * 2 * (5 + 1) + 1
    assert launches_of_backward(engine, case, "weight_hh") == 3 * 2 * 5
