# SPDX-License-Identifier: Apache-2.0
"""What a call of fastrnn.RNN gives: hooks, dropout's draws, memory, layout, requires_grad.

Each expectation is read off torch.nn.RNN on the same device when the test runs.
"""

import ctypes
import mmap

import pytest
import torch
from pairs import tensor
from test_module import close, drawn, loss, pair, run, sequence
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from fastrnn.functional import takes_fused_path

FORMS = {
    "for a batch": {},
    "for a batch-first batch": {"batch_first": True},
    "for one sequence": {"batched": False},
    "for one sequence with batch first": {"batched": False, "batch_first": True},
    "for packed sequences": {"packed": True},
    "for a bidirectional batch": {"bidirectional": True},
    "for bidirectional packed sequences": {"packed": True, "bidirectional": True},
    "for bidirectional batch first": {"batch_first": True, "bidirectional": True},
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def pair_of_form(form, device="cpu", **options):
    """A pair and a function that makes new equal arguments (leaves) for it."""
    form = dict(form)
    packed, batched = form.pop("packed", False), form.pop("batched", True)
    modules = [module.to(device) for module in pair(**form, **options)]

    def arguments(T=5, B=2):
        generator = torch.Generator().manual_seed(1)

        def draw(*shape):
            return torch.randn(shape, dtype=torch.float64, generator=generator).to(device)

        states = modules[1].num_layers * (1 + modules[1].bidirectional)
        hx = (draw(states, B, 4) if batched else draw(states, 4)).requires_grad_()
        if packed:
            lengths = [max(T - 1, 1), *[T] * (B - 1)]
            return pack_sequence([draw(n, 3).requires_grad_() for n in lengths], False), hx
        shape = ((B, T) if form.get("batch_first") else (T, B)) if batched else (T,)
        return draw(*shape, 3).requires_grad_(), hx

    return modules, arguments


def test_hx_may_be_given_by_keyword():
    ours, theirs = pair()
    hx = drawn(torch.empty(1, 2, 4, dtype=torch.float64))
    close(ours(sequence(), hx=hx), theirs(sequence(), hx))
    close(ours(hx=hx, input=sequence()), theirs(sequence(), hx))


def seen_by_hooks(module, use):
    seen = []
    module.register_forward_hook(lambda m, inputs, results: seen.append([inputs, results]))
    module.register_full_backward_hook(lambda m, inputs, results: seen.append([inputs, results]))
    x = sequence().requires_grad_()
    hx = torch.ones(1, 2, 4, dtype=torch.float64, requires_grad=True)
    (use(module(x, hx)) ** 2).sum().backward()
    return seen


@pytest.mark.parametrize("used", [0, 1], ids=["when only output is used", "when only h_n is used"])
def test_forward_and_full_backward_hooks_see_what_they_see_on_nn_rnn(used):
    ours, theirs = (seen_by_hooks(module, lambda results: results[used]) for module in pair())
    assert len(theirs) == 2
    close(ours, theirs)


def test_batch_first_dropout_and_mode_may_change_later():
    results = []
    for module in pair(num_layers=2):
        module.batch_first, module.dropout, module.mode = True, 0.5, "RNN_RELU"
        torch.manual_seed(5)
        results.append(run(module, sequence()))
    close(*results)


@every_form
@pytest.mark.parametrize(
    "p, training",
    [(0.4, True), (1.0, True), (0.4, False)],
    ids=["in training", "with probability one", "in eval mode"],
)
def test_dropout_makes_the_draws_of_nn_rnn_and_no_others(form, p, training):
    modules, arguments = pair_of_form(form, num_layers=3, dropout=p)
    results, states = [], []
    for module in modules:
        torch.manual_seed(5)
        results.append(run(module.train(training), *arguments()))
        states.append(torch.get_rng_state())
    close(*results)
    assert torch.equal(*states)


@every_form
@pytest.mark.parametrize("T, B", [(1, 1), (5, 2)], ids=["one step of one sequence", "five steps"])
@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "under no_grad"])
def test_results_share_memory_with_nothing(form, T, B, recorded, device):
    (module, _), arguments = pair_of_form(form, device)
    x, hx = arguments(T, B)
    with torch.set_grad_enabled(recorded):
        output, h_n = module(x, hx)
    tensors = [tensor(output), h_n, tensor(x), hx, *module.parameters()]
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)


@every_form
@pytest.mark.parametrize("which", [0, 1], ids=["output edited", "h_n edited"])
def test_result_may_be_edited_in_place_before_backward(form, which, device):
    modules, arguments = pair_of_form(form, device, num_layers=2)
    gradients = []
    for module in modules:
        x, hx = arguments()
        results = module(x, hx)
        tensor(results[which]).mul_(3)
        value = loss(*results)
        tensor(results[which]).detach().zero_()
        gradients.append(torch.autograd.grad(value, [tensor(x), hx, *module.parameters()]))
    close(*gradients)


def at_page_end(values):
    """The same numbers, in memory behind which every access ends the process."""
    page, size = mmap.PAGESIZE, values.numel() * values.itemsize
    used = -(-size // page) * page
    memory = mmap.mmap(-1, used + page)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + used
    no_access = 0
    assert not ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), ctypes.c_size_t(page), no_access)
    flat = torch.frombuffer(memory, dtype=values.dtype, offset=used - size, count=values.numel())
    return flat.view(values.shape).copy_(values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T, B", [(2, 3), (3, 7)], ids=["weights as they are", "packed weights"])
def test_nothing_beyond_the_end_of_a_row_is_read_or_written(T, B, dtype):
    # Rows of up to two of the widest vectors, of 64 bytes. What is written beyond a row's end
    # spoils the other direction's output, or a later step's gradient.
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-4
    for H in range(1, 2 * 64 // dtype.itemsize + 1):
        generator = torch.Generator().manual_seed(H)
        shapes = (T, B, H), (2, B, H), (T, B, 2 * H), (2, B, H)
        drawn = [torch.randn(shape, dtype=dtype, generator=generator) for shape in shapes]
        outcomes = []
        ours, theirs = pair(H, H, dtype=dtype, bidirectional=True)
        for module, place in [(ours, at_page_end), (theirs, torch.clone)]:
            for parameter in module.parameters():
                parameter.data = place(parameter.data)
            x, hx, *gradients = map(place, drawn)
            leaves = [x.requires_grad_(), hx.requires_grad_(), *module.parameters()]
            results = module(x, hx)
            outcomes.append([*results, *torch.autograd.grad(results, leaves, gradients)])
        close(*outcomes, rtol=tolerance, atol=tolerance)


def gradients_after_editing(module, which):
    x = sequence().requires_grad_()
    hx = torch.ones(2, 2, 4, dtype=torch.float64, requires_grad=True)
    leaves = {"input": x, "hx": hx, **dict(module.named_parameters())}
    value = loss(*module(x, hx))
    leaves[which].detach().mul_(2)
    try:
        return torch.autograd.grad(value, list(leaves.values()))
    except RuntimeError as error:
        assert "inplace" in str(error)
        return "refused"


@pytest.mark.parametrize("which", ["input", "hx", "weight_ih_l1", "weight_hh_l0"])
def test_argument_edited_before_backward_is_refused_as_nn_rnn_refuses_it(which):
    ours, theirs = (gradients_after_editing(module, which) for module in pair(num_layers=2))
    assert ours == theirs == "refused"


def test_bias_edited_before_backward_is_refused_since_the_second_derivative_reads_it():
    ours, theirs = (gradients_after_editing(m, "bias_hh_l0") for m in pair(num_layers=2))
    assert ours == "refused"
    assert theirs != "refused"


@every_form
@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "under no_grad"])
def test_results_have_the_layout_of_nn_rnns_results(form, recorded, device):
    modules, arguments = pair_of_form(form, device, num_layers=2)
    with torch.set_grad_enabled(recorded):
        results = [[tensor(t) for t in module(*arguments())] for module in modules]
    ours, theirs = (
        [(t.shape, t.stride(), t.device, t.requires_grad) for t in result] for result in results
    )
    assert ours == theirs
    assert results[0][1].is_contiguous()


@every_form
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_results_without_gradients_have_the_same_bits(form, mode, device):
    (module, _), arguments = pair_of_form(form, device, num_layers=2)
    expected = module(*arguments())
    with mode():
        results = module(*arguments())
    for result, right in zip(map(tensor, results), map(tensor, expected), strict=True):
        assert not result.requires_grad
        assert result.is_inference() == (mode is torch.inference_mode)
        assert torch.equal(result, right)


def test_packed_results_carry_the_layout_of_the_input(device):
    (module, _), arguments = pair_of_form({"packed": True}, device)
    x, _ = arguments()
    output, _ = module(x)
    assert output.batch_sizes.device.type == "cpu"
    for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        assert torch.equal(getattr(output, name), getattr(x, name))


@every_form
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_fused_path_takes_it(form, dtype, device):
    (module, _), arguments = pair_of_form(form, device)
    weights = list(module.to(dtype).parameters())
    x, hx = (tensor(t).detach().to(dtype) for t in arguments())
    assert takes_fused_path(x, weights, hx) and takes_fused_path(x, weights, None)
    with torch.inference_mode():
        assert takes_fused_path(x, weights, hx)


@pytest.mark.parametrize(
    "learning",
    [[], ["input"], ["hx"], ["weight_ih_l0"], ["bias_hh_l1"], ["hx", "weight_hh_l1"]],
    ids=lambda names: " and ".join(names) or "nothing",
)
def test_only_what_asks_for_a_gradient_gets_one(learning):
    outcomes = []
    for module in pair(num_layers=2):
        leaves = {"input": sequence(), "hx": torch.ones(2, 2, 4, dtype=torch.float64)}
        leaves |= dict(module.requires_grad_(False).named_parameters())
        for name in learning:
            leaves[name].requires_grad_()
        results = module(leaves["input"], leaves["hx"])
        outcomes.append([result.requires_grad for result in results])
        if learning:
            loss(*results).backward()
        outcomes[-1] += [leaf.grad for leaf in leaves.values()]
    close(*outcomes)


@every_form
def test_meta_module_gives_the_meta_results_of_nn_rnn(form):
    modules, arguments = pair_of_form(form, num_layers=2)
    x, hx = arguments()
    if isinstance(x, PackedSequence):
        x = x._replace(data=x.data.detach().to("meta"))
        x = x._replace(sorted_indices=None, unsorted_indices=None)
    else:
        x = x.detach().to("meta")
    described = []
    for module in modules:
        output, h_n = module.to("meta")(x, hx.detach().to("meta"))
        described.append([(t.device, t.dtype, t.shape, t.stride()) for t in (tensor(output), h_n)])
    assert described[0] == described[1]


beta = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")


@beta
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
def test_sparse_hx_gives_what_nn_rnn_gives(layout):
    hx = torch.ones(1, 2, 4, dtype=torch.float64).to_sparse(layout=layout)
    ours, theirs = (module(sequence(), hx) for module in pair())
    close(ours, theirs)


@beta
@pytest.mark.parametrize(
    "name, layout",
    [("weight_ih_l1", torch.sparse_coo), ("weight_hh_l0", torch.sparse_csr)],
    ids=str,
)
def test_sparse_weight_gives_what_nn_rnn_gives(name, layout):
    results = []
    for module in pair(num_layers=2):
        weight = getattr(module, name).detach()
        delattr(module, name)
        setattr(module, name, weight.to_sparse(layout=layout))
        results.append(module(sequence()))
    close(*results)
