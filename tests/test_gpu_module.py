# SPDX-License-Identifier: Apache-2.0
"""On a GPU: fastrnn.RNN as a module: moves, state, layouts, autocast, dropout.

Each expectation is read off torch.nn.RNN when the test runs: on the CPU in float64, or on the same
GPU where what cuDNN does decides.
"""

import copy
import pickle

import pytest
import torch
from pairs import Setting, arguments, pair, same
from test_gpu_results import CLASSES, DEVICE, agree, needs_gpu, tensor, tf32_allowed, weighted
from torch.autograd import grad
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fastrnn
from fastrnn.functional import rnn, takes_fused_path

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


# The way


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW], ids=str)
@every_form
def test_the_fused_path_takes_it(form, dtype):
    setting, x, hx = given(form, dtype)
    weights = list(both(setting, dtype)[0].parameters())
    assert takes_fused_path(tensor(x), weights, hx)
    assert takes_fused_path(tensor(x), weights, None)
    with torch.inference_mode():
        assert takes_fused_path(tensor(x), weights, hx)


# Moves and copies


def test_a_module_moves_to_the_gpu_and_back():
    module, reference = pair(sizes=SIZES)
    x, hx = (t.detach() for t in arguments(Setting(), 5, 3, SIZES))
    for device in (DEVICE, "cpu", DEVICE):
        assert module.to(device) is module
        results = module(x.to(device), hx.to(device))
        assert all(r.device == x.to(device).device for r in results)
        same([r.cpu() for r in results], reference(x, hx))
    assert all(w is p for w, p in zip(module._flat_weights, module.parameters(), strict=True))


@pytest.mark.parametrize("move", ["half", "bfloat16", "float", "double"])
def test_a_module_of_another_dtype_gives_what_nn_rnn_gives(move):
    _, *arguments = given("padded")
    ours, theirs, x, hx = (getattr(each, move)() for each in (*both(), *arguments))
    results = ours(x, hx)
    near(results, exact(theirs, x, hx))
    assert [r.dtype for r in results] == [r.dtype for r in theirs(x, hx)]


@pytest.mark.parametrize("form", ["padded", "packed unsorted"])
def test_state_loads_strictly_both_ways(form):
    setting, x, hx = given(form)
    ours, theirs = (cls(*SIZES, **setting._asdict(), device=DEVICE).double() for cls in CLASSES)
    for source, target in ((theirs, ours), (ours, theirs)):
        source.reset_parameters()
        target.load_state_dict(source.state_dict(), strict=True)
        near([tensor(t) for t in ours(x, hx)], [tensor(t) for t in theirs(x, hx)])


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
def test_parameters_that_nn_rnn_keeps_in_one_buffer_may_be_shared(dtype):
    _, x, hx = given("padded", dtype)
    ours, theirs = both(dtype=dtype)
    for name, parameter in theirs.named_parameters():
        setattr(ours, name, parameter)
    for scale in (1, 0.5):  # an edit of theirs is seen by ours
        theirs.weight_hh_l0.detach().mul_(scale)
        near(ours(x, hx), exact(theirs, x, hx))


def test_flatten_parameters_changes_nothing():
    module, _ = both()
    _, x, hx = given("padded")
    before, parameters = module(x, hx), list(module.parameters())
    addresses = [p.data_ptr() for p in parameters]
    assert module.flatten_parameters() is None
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
    assert [p.data_ptr() for p in parameters] == addresses
    assert all(map(torch.equal, module(x, hx), before))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_stays_on_the_gpu_and_gives_the_same_bits(duplicate):
    _, x, hx = given("padded")
    module, _ = both()
    before = module(x, hx)
    clone = duplicate(module)
    assert all(p.device == x.device for p in clone.parameters())
    module.weight_hh_l0.detach().zero_()
    assert all(map(torch.equal, clone(x, hx), before))


# Results


@every_form
@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "under no_grad"])
def test_results_have_the_layout_of_nn_rnns_and_memory_of_their_own(form, recorded):
    setting, x, hx = given(form)
    described = []
    for module in both(setting):
        with torch.set_grad_enabled(recorded):
            output, h_n = (tensor(t) for t in module(x, hx))
        tensors = [output, h_n, tensor(x), hx, *module.parameters()]
        described.append([(t.shape, t.stride(), t.requires_grad) for t in (output, h_n)])
        if isinstance(module, fastrnn.RNN):
            storages = {t.untyped_storage().data_ptr() for t in tensors}
            assert len(storages) == len(tensors) and h_n.is_contiguous()
    assert described[0] == described[1]


def test_packed_results_carry_the_layout_of_the_input():
    setting, x, _ = given("packed unsorted")
    output, _ = both(setting)[0](x)
    assert output.batch_sizes.device.type == "cpu"
    for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        assert torch.equal(getattr(output, name), getattr(x, name))


@every_form
def test_inference_mode_gives_inference_tensors_of_the_same_bits(form):
    setting, x, hx = given(form)
    module, _ = both(setting)
    expected = module(x, hx)
    with torch.inference_mode():
        results = module(x, hx)
    for result, right in zip(results, expected, strict=True):
        assert tensor(result).is_inference()
        assert torch.equal(tensor(result), tensor(right))


# Strange memory: the same numbers, or a row or column of them again and again, elsewhere


VIEWS = {
    "transposed": lambda t: t.transpose(-1, 0).contiguous().transpose(-1, 0),
    "every second element": lambda t: torch.stack([t, 2 * t], -1)[..., 0],
    "at an odd address": lambda t: torch.cat([t[:1].flatten()[:1], t.flatten()])[1:].view(t.shape),
    "one row expanded": lambda t: t[:1].expand_as(t),
    "one column expanded": lambda t: t[..., :1].expand_as(t),
    "the batch expanded": lambda t: t[:, :1].expand_as(t) if t.dim() > 1 else t,
    "backwards": lambda t: t.flip(0),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
class TestStrangeMemory:
    @pytest.mark.parametrize("batch_first", [False, True])
    @pytest.mark.parametrize("who", ["input", "hx"])
    def test_as_input_or_hx(self, who, batch_first, view):
        def compute(module, x, hx):
            output, h_n = module(view(x), hx) if who == "input" else module(x, view(hx))
            slopes = grad(weighted(output) + h_n.sum(), [x, hx, *module.parameters()])
            return [output, h_n, *slopes]

        agree(compute, Setting(batch_first=batch_first), 5, 3, SIZES)

    def test_as_packed_data(self, view):
        def compute(module, x, hx):
            packed = PackedSequence(view(x.flatten(0, 1)), torch.tensor([3, 2, 1]))
            output, h_n = module(packed)
            return [output.data, h_n, *grad(weighted(output.data), [x, *module.parameters()])]

        agree(compute, Setting(), 3, 2, SIZES)

    @pytest.mark.parametrize("kind", ["weight_ih", "weight_hh", "bias_ih", "bias_hh"])
    def test_as_weights(self, kind, view):
        def compute(module, x, hx):
            leaves = dict(module.named_parameters())
            flat = {n: view(w) if n.startswith(kind) else w for n, w in leaves.items()}
            output, h_n = torch.func.functional_call(module, flat, (x, hx))
            slopes = grad(weighted(output) + weighted(h_n), [x, hx, *leaves.values()])
            return [output, h_n, *slopes]

        agree(compute, Setting(), 5, 3, SIZES)


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


def test_autocast_leaves_float64_alone():
    _, x, hx = given("padded")
    ours, theirs = both()
    with torch.autocast(DEVICE.type):
        near(ours(x, hx), theirs(x, hx))


def test_a_disabled_region_inside_computes_in_float32():
    _, x, hx = given("padded", torch.float32)
    module, _ = both(dtype=torch.float32)
    with torch.autocast(DEVICE.type), torch.autocast(DEVICE.type, enabled=False):
        inside = module(x, hx)
    assert all(map(torch.equal, inside, module(x, hx)))


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
