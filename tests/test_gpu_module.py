# SPDX-License-Identifier: Apache-2.0
"""On a GPU: what of the module is special there: moves, cuDNN's one buffer, autocast, dropout.

Each expectation is read off torch.nn.RNN when the test runs: on the CPU in float64, or on the same
GPU where what cuDNN does decides.
"""

import copy

import pytest
import torch
from devices import needs_gpu
from pairs import Setting, arguments, pair, same, tensor, weighted
from test_gpu_results import DEVICE, tf32_allowed
from torch.autograd import grad
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fastrnn
from fastrnn.functional import rnn

pytestmark = needs_gpu

SIZES = (6, 33)
FORMS = ("padded", "batch_first", "one sequence", "packed", "packed unsorted")
every_form = pytest.mark.parametrize("form", FORMS)
LOW = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def without_tf32():
    with tf32_allowed(False):
        yield


def given(form, dtype=torch.float64, device=None):
    """Setting, input and hx of a form; leaves on the GPU unless told otherwise."""
    setting = Setting(batch_first=form == "batch_first")
    x, hx = (t.detach() for t in arguments(setting, 5, 3, SIZES))
    if form == "one sequence":
        x, hx = x[:, 0], hx[:, 0]
    x, hx = (t.to(device or DEVICE, dtype).requires_grad_() for t in (x, hx))
    if form.startswith("packed"):
        lengths = (5, 3, 2) if form == "packed" else (3, 5, 2)
        x = pack_sequence([x[:n, i] for i, n in enumerate(lengths)], enforce_sorted=False)
        x = x if form == "packed unsorted" else PackedSequence(x.data, x.batch_sizes)
    return setting, x, hx


def both(setting=Setting(), dtype=torch.float64, dropout=0.0):  # noqa: B008 - immutable
    """Ours and nn.RNN, with the same weights, both on the GPU."""
    return [m.to(DEVICE, dtype) for m in pair(setting, dropout, SIZES)]


def exact(theirs, x, hx):
    """What nn.RNN gives on the CPU in float64 for these weights and arguments, rounded to theirs.

    Its float32 on a GPU is less exact than `near` asks: 6e-6 off on an H100, without TF32.
    """
    on_cpu = copy.deepcopy(theirs).cpu().double()
    return [t.to(x) for t in on_cpu(x.detach().cpu().double(), hx.detach().cpu().double())]


def near(ours, theirs, ulps=8):
    """Equal but for some roundings; shapes and dtypes too."""
    for a, b in zip(ours, theirs, strict=True):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        error = (a.double() - b.double()).norm()
        assert error <= ulps * torch.finfo(b.dtype).eps * b.double().norm()


# Moves, and memory shared with cuDNN


def test_a_module_moves_to_the_gpu_and_back():
    module, reference = pair(sizes=SIZES)
    x, hx = (t.detach() for t in arguments(Setting(), 5, 3, SIZES))
    for device in (DEVICE, "cpu", DEVICE):
        assert module.to(device) is module
        results = module(x.to(device), hx.to(device))
        assert all(r.device == x.to(device).device for r in results)
        same([r.cpu() for r in results], reference(x, hx))
    assert all(w is p for w, p in zip(module._flat_weights, module.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
def test_parameters_that_nn_rnn_keeps_in_one_buffer_may_be_shared(dtype):
    _, x, hx = given("padded", dtype)
    ours, theirs = both(dtype=dtype)
    for name, parameter in theirs.named_parameters():
        setattr(ours, name, parameter)
    for scale in (1, 0.5):  # an edit of theirs is seen by ours
        theirs.weight_hh_l0.detach().mul_(scale)
        near(ours(x, hx), exact(theirs, x, hx))


# Autocast


@pytest.mark.parametrize("region", [None, *LOW], ids=["default", "float16", "bfloat16"])
@every_form
def test_autocast_lowers_results_and_leaves_gradients_float32(form, region):
    """In a bfloat16 region nn.RNN computes in float16 on a GPU; the region's dtype is right too."""
    setting, x, hx = given(form, torch.float32)
    ours, theirs = both(setting, torch.float32)
    with torch.autocast(DEVICE.type, region):
        results, stock = ([tensor(t) for t in m(x, hx)] for m in (ours, theirs))
    dtype = results[0].dtype
    assert [r.dtype for r in results] == [dtype] * 2
    assert dtype == stock[0].dtype or dtype == region
    slopes = grad(weighted(results[0].double()) + weighted(results[1].double()), ours.parameters())
    assert all(s.dtype == torch.float32 for s in slopes)
    _, exact_x, exact_hx = given(form, device="cpu")
    exact = pair(setting, sizes=SIZES)[1]
    right = [tensor(t) for t in exact(exact_x, exact_hx)]
    right += grad(weighted(right[0]) + weighted(right[1]), exact.parameters())
    for a, b in zip([*results, *slopes], right, strict=True):
        assert (a.cpu().double() - b).norm() <= 16 * torch.finfo(dtype).eps * b.norm()


# Dropout


def mask(p, T=40, B=30, H=64):
    """What dropout makes of ones between two layers that pass on what they get."""
    module = fastrnn.RNN(1, H, 2, "relu", dropout=p, device=DEVICE).requires_grad_(False)
    for parameter in module.parameters():
        parameter.zero_()
    module.bias_ih_l0.fill_(1)
    module.weight_ih_l1.copy_(torch.eye(H))
    return module(torch.zeros(T, B, 1, device=DEVICE))[0]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.75])
def test_dropout_drops_as_many_as_asked_and_scales_the_rest(p):
    torch.manual_seed(3)
    found = mask(p)
    dropped = found == 0
    torch.testing.assert_close(found[~dropped], torch.full_like(found[~dropped], 1 / (1 - p)))
    # Six standard deviations of a mean of so many; rows of time, of the batch, and features alike.
    for dims in ((0, 1, 2), (1, 2), (0, 2), (0, 1)):
        mean = dropped.double().mean(dims)
        count = found.numel() // mean.numel()
        assert ((mean - p).abs() < 6 * (p * (1 - p) / count) ** 0.5).all()


@every_form
def test_dropout_is_torch_dropout_between_layers_drawn_from_the_seed(form):
    setting, x, hx = given(form)
    module, _ = both(setting, dropout=0.5)
    runs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        runs.append(tensor(module(x, hx)[0]))
    assert torch.equal(*runs[:2]) and not torch.equal(*runs[1:])
    if form == "padded":
        torch.manual_seed(5)
        flat = list(module.parameters())
        lower = rnn(x, flat[:8], hx[:2], bidirectional=True)[0]
        upper = rnn(torch.dropout(lower, 0.5, True), flat[8:], hx[2:], bidirectional=True)[0]
        assert torch.equal(runs[0], upper)


@pytest.mark.parametrize("p, training", [(1.0, True), (0.5, False)], ids=["p of 1", "eval mode"])
def test_dropout_of_all_or_in_eval_mode_gives_what_nn_rnn_gives_on_the_cpu(p, training):
    answers = []
    for module, device in zip(pair(dropout=p, sizes=SIZES), (DEVICE, "cpu"), strict=True):
        _, x, hx = given("padded", device=device)
        answers.append([t.cpu() for t in module.to(device).train(training)(x, hx)])
    same(*answers)


def test_eval_mode_draws_nothing():
    _, x, hx = given("padded")
    module, _ = both(dropout=0.5)
    torch.manual_seed(5)
    expected = torch.rand(3, device=DEVICE)
    torch.manual_seed(5)
    module.eval()(x, hx)
    assert torch.equal(torch.rand(3, device=DEVICE), expected)
