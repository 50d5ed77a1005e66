# SPDX-License-Identifier: Apache-2.0
"""Derivatives of fastrnn.RNN: every order, every participant, every part of the results.

Contract: whatever torch.nn.RNN answers to the same question in float64, run beside it here,
or, where autograd itself is the judge, gradcheck and gradgradcheck.
"""

import itertools

import pytest
import torch
from cross import pairwise, rest_is_full
from pairs import (
    LENGTHS,
    B,
    H,
    I,
    Setting,
    T,
    arguments,
    draw,
    of_both,
    our_call,
    pair,
    sequences,
    weighted,
)
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.nn.utils.rnn import pack_sequence

from fastrnn.functional import rnn, takes_fused_path

SETTINGS = [
    Setting(*flags) for flags in itertools.product(("tanh", "relu"), (1, 2), *[(False, True)] * 3)
]
PADDED = list(itertools.product(SETTINGS, ["zeros", "hx"]))
PACKED = [
    (setting, order)
    for setting, order in itertools.product(SETTINGS, LENGTHS)
    if setting.bias and not setting.batch_first
]
#: steps, batch and sizes: the smallest, and those with tails of tiles.
SHAPES = {"small": {}, "larger": {"steps": 5, "batch": 9, "sizes": (6, 65)}}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def few(rows):
    """Of a setting and one thing more, enough for each pair of options; the rest is `full`."""
    always = pairwise((*setting, other) for setting, other in rows)
    return rest_is_full(rows, [(Setting(*row[:-1]), row[-1]) for row in always])


class TestFiniteDifferences:
    """First and second derivatives against numerical ones.

    fast_mode, along one direction, for two layers of two and, but for one case, on a GPU.
    """

    def check(self, call, inputs, setting):
        large = setting.num_layers * (1 + setting.bidirectional) == 4
        fast = large or (inputs[0].is_cuda and setting != SETTINGS[3])
        assert gradcheck(call, inputs, fast_mode=fast)
        assert gradgradcheck(call, inputs, fast_mode=fast)

    @pytest.mark.parametrize("setting, state", few(PADDED))
    def test_of_a_padded_batch(self, setting, state, device):
        module, x, hx = our_call(device, setting)

        def call(x, *rest):
            initial, flat = (rest[0], rest[1:]) if state == "hx" else (None, rest)
            assert takes_fused_path(x, flat, initial)
            return rnn(x, list(flat), initial, **setting._asdict())

        inputs = (x, *([hx] if state == "hx" else []), *module.parameters())
        self.check(call, inputs, setting)

    @pytest.mark.parametrize("setting", SETTINGS[::4], ids=str)
    def test_of_an_unbatched_sequence(self, setting, device):
        module, _, hx = our_call(device, setting)
        x, hx = draw(T, I, seed=1, device=device), draw(len(hx), H, seed=2, device=device)
        call = lambda x, hx, *flat: rnn(x, list(flat), hx, **setting._asdict())  # noqa: E731
        self.check(call, (x, hx, *module.parameters()), setting)

    @pytest.mark.parametrize("setting, order", few(PACKED))
    def test_of_a_packed_batch(self, setting, order, device):
        xs = sequences(LENGTHS[order], device)
        module, _, hx = our_call(device, setting, batch=len(xs))

        def call(hx, *rest):
            packed = pack_sequence(rest[: len(xs)], enforce_sorted=False)
            output, h_n = rnn(packed, list(rest[len(xs) :]), hx, **setting._asdict())
            return output.data, h_n

        self.check(call, (hx, *xs, *module.parameters()), setting)


KINDS = ("input", "hx", "weight_ih", "weight_hh", "bias_ih", "bias_hh")
CHOICES = [frozenset(s) for n in range(1, 7) for s in itertools.combinations(KINDS, n)]
#: Of any two kinds: none, either and both.
FEW_CHOICES = [
    chosen
    for bits in pairwise(itertools.product([False, True], repeat=len(KINDS)))
    if (chosen := frozenset(itertools.compress(KINDS, bits)))
] + [frozenset([kind]) for kind in KINDS]


class TestParticipants:
    """Gradients reach those who asked for them, and nobody else."""

    @pytest.mark.parametrize("wanted", rest_is_full(CHOICES, FEW_CHOICES, "+".join))
    @pytest.mark.parametrize("bidirectional", [True, False])
    def test_exactly_the_wanted_gradients_arrive(self, wanted, bidirectional, device):
        def compute(module, x, hx):
            named = {"input": x, "hx": hx, **dict(module.named_parameters())}
            for name, leaf in named.items():
                leaf.requires_grad_(any(name.startswith(kind) for kind in wanted))
            output, h_n = module(x, hx)
            assert output.requires_grad and h_n.requires_grad
            (output.square().sum() + h_n.sin().sum()).backward()
            for leaf in named.values():
                assert (leaf.grad is None) != leaf.requires_grad
            return [leaf.grad for leaf in named.values()]

        of_both(compute, Setting(bidirectional=bidirectional), device)

    @pytest.mark.parametrize(
        "bidirectional, index", [(True, i) for i in range(16)] + [(False, i) for i in range(8)]
    )
    def test_a_single_thawed_parameter_gets_its_gradient(self, bidirectional, index, device):
        def compute(module, x, hx):
            for i, parameter in enumerate(module.parameters()):
                parameter.requires_grad_(i == index)
            module(x.detach(), hx.detach())[0].square().sum().backward()
            return [p.grad for p in module.parameters()]

        of_both(compute, Setting(bidirectional=bidirectional), device)

    def test_nothing_requires_grad_when_all_is_frozen(self, device):
        module, x, hx = our_call(device)
        output, h_n = module.requires_grad_(False)(x.detach(), hx.detach())
        assert not output.requires_grad and not h_n.requires_grad
        assert output.grad_fn is None and h_n.grad_fn is None

    def test_an_empty_batch_gives_zero_gradients_to_every_parameter(self, device):
        module = pair()[0].to(device)
        module(draw(T, 0, I, device=device))[0].sum().backward()
        assert all(p.grad.count_nonzero() == 0 for p in module.parameters())

    def test_a_tied_weight_gets_the_sum_of_its_uses(self, device):
        setting = Setting(num_layers=3, bidirectional=False)

        def compute(module, x, hx):
            module.weight_hh_l2 = module.weight_hh_l0
            module.weight_ih_l1 = module.weight_hh_l0
            weighted(module(x, hx)[0]).backward()
            return [p.grad for p in module.parameters()]

        of_both(compute, setting, device)

    def test_one_tensor_as_input_and_as_hx_gets_the_sum(self, device):
        def compute(module, x, hx):
            shared = draw(2, B, H, seed=4, device=x.device)
            output, h_n = module(shared, shared)
            return grad(output.square().sum() + h_n.sum(), [shared, *module.parameters()])

        of_both(compute, Setting(bidirectional=False), device, sizes=(H, H))

    @pytest.mark.parametrize("setting", [Setting(), Setting(batch_first=True)], ids=str)
    def test_gradients_have_the_layout_of_what_they_belong_to(self, setting, device):
        module, x, hx = our_call(device, setting)
        module(x, hx)[0].square().sum().backward()
        for leaf in (x, hx, *module.parameters()):
            assert leaf.grad.is_contiguous() and leaf.grad.stride() == leaf.stride()

    def test_gradients_of_different_parameters_share_no_memory(self, device):
        module, x, hx = our_call(device)
        module(x, hx)[0].square().sum().backward()
        grads = [leaf.grad for leaf in (x, hx, *module.parameters())]
        assert len({g.untyped_storage().data_ptr() for g in grads}) == len(grads)


READS = {
    "h_n": lambda y, h: weighted(h),
    "h_n of the first layer": lambda y, h: h[0].square().sum(),
    "one row of h_n": lambda y, h: h[:, 1].square().sum(),
    "the first row of time": lambda y, h: y[0].square().sum(),
    "the last row of time": lambda y, h: y[-1].square().sum(),
    "the forward direction": lambda y, h: weighted(y[..., :H]),
    "the reverse direction": lambda y, h: weighted(y[..., H:]),
    "a plain sum": lambda y, h: y.sum(),
    "a plain sum of h_n": lambda y, h: h.sum(),
    "a mean over rows": lambda y, h: weighted(y.mean(0)),
    "a transpose": lambda y, h: weighted(y.transpose(0, -1)),
    "every second column": lambda y, h: weighted(y[..., ::2]) + weighted(h[..., ::2]),
    "a transpose of h_n": lambda y, h: weighted(h.transpose(0, 2)),
    "both": lambda y, h: weighted(y) + weighted(h),
    "nothing but a constant": lambda y, h: (y * 0).sum() + (h * 0).sum(),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
class TestPartialReads:
    """Whatever part of the results the loss reads, every participant gets a dense gradient."""

    @pytest.mark.parametrize("bidirectional", [False, True])
    @pytest.mark.parametrize("batch_first", [False, True])
    def test_of_a_padded_batch(self, read, batch_first, bidirectional, device):
        def compute(module, x, hx):
            leaves = [x, hx, *module.parameters()]
            return grad(read(*module(x, hx)), leaves)

        setting = Setting(batch_first=batch_first, bidirectional=bidirectional)
        of_both(compute, setting, device)

    def test_of_a_packed_batch(self, read, device):
        def compute(module, x, hx):
            xs = sequences(LENGTHS["unsorted"], x.device)
            state = draw(4, 3, H, seed=9, device=x.device)
            output, h_n = module(pack_sequence(xs, enforce_sorted=False), state)
            return grad(read(output.data, h_n), [*xs, state, *module.parameters()])

        of_both(compute, device=device)

    def test_of_a_second_derivative(self, read, device):
        def compute(module, x, hx):
            leaves = [x, hx, *module.parameters()]
            first = grad(read(*module(x, hx)), leaves, create_graph=True)
            return grad(sum(g.square().sum() for g in first), leaves, materialize_grads=True)

        of_both(compute, Setting("relu"), device)


class TestHigherOrders:
    @every_shape
    @pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
    @pytest.mark.parametrize("batch_first", [False, True])
    def test_a_gradient_penalty_reaches_every_leaf(self, nonlinearity, batch_first, shape, device):
        def compute(module, x, hx):
            loss = weighted(module(x, hx)[0])
            (slope,) = grad(loss, x, create_graph=True)
            (loss + (slope.norm(dim=-1) - 1).square().mean()).backward()
            return [leaf.grad for leaf in (x, hx, *module.parameters())]

        of_both(compute, Setting(nonlinearity, batch_first=batch_first), device, **shape)

    @pytest.mark.parametrize("bidirectional", [False, True])
    def test_a_gradient_penalty_of_packed_data(self, bidirectional, device):
        def compute(module, x, hx):
            xs = sequences(LENGTHS["unsorted"], x.device)
            output, h_n = module(pack_sequence(xs, enforce_sorted=False))
            slopes = grad(weighted(output.data) + weighted(h_n), xs, create_graph=True)
            sum(s.square().sum() for s in slopes).backward()
            return [leaf.grad for leaf in (*xs, *module.parameters())]

        of_both(compute, Setting(bidirectional=bidirectional), device)

    def test_the_gradient_itself_is_differentiable_only_when_asked(self, device):
        module, x, hx = our_call(device)
        assert not grad(weighted(module(x, hx)[0]), x)[0].requires_grad
        assert grad(weighted(module(x, hx)[0]), x, create_graph=True)[0].requires_grad

    @every_shape
    def test_a_hessian_vector_product_over_the_weights(self, shape, device):
        def compute(module, x, hx):
            leaves = list(module.parameters())
            first = grad(weighted(module(x, hx)[0]), leaves, create_graph=True)
            vector = [draw(*p.shape, seed=i).detach().to(p.device) for i, p in enumerate(leaves)]
            return grad(first, leaves, vector, materialize_grads=True)

        of_both(compute, device=device, **shape)

    @pytest.mark.parametrize("product", ["hvp", "vhp"])
    def test_the_hessian_products_of_torch_autograd_functional(self, product, device):
        def compute(module, x, hx):
            loss = lambda x, hx: weighted(module(x, hx)[0])  # noqa: E731
            vectors = (torch.ones_like(x), torch.ones_like(hx))
            return getattr(torch.autograd.functional, product)(loss, (x, hx), vectors)[1]

        of_both(compute, device=device)

    def test_a_third_derivative(self, device):
        def compute(module, x, hx):
            (one,) = grad(weighted(module(x, hx)[0]), x, create_graph=True)
            (two,) = grad(one.square().sum(), x, create_graph=True)
            return grad(two.square().sum(), [x, hx, *module.parameters()], materialize_grads=True)

        of_both(compute, device=device)

    @pytest.mark.parametrize("vectorize", [False, True])
    def test_jacobians_by_batched_cotangents(self, vectorize, device):
        def compute(module, x, hx):
            of_results = torch.autograd.functional.jacobian(module, (x, hx), vectorize=vectorize)
            return [jacobian for of_one in of_results for jacobian in of_one]

        of_both(compute, device=device)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_second_derivatives_in_lower_precision_are_near(self, dtype, device):
        found = []
        for kind, place in ((dtype, device), (torch.float64, "cpu")):
            module = pair(sizes=(6, 33))[0].to(dtype).to(place, kind)
            x, hx = (
                t.detach().to(dtype).to(place, kind).requires_grad_()
                for t in arguments(steps=4, batch=9, sizes=(6, 33))
            )
            (slope,) = grad(weighted(module(x, hx)[0]), x, create_graph=True)
            found.append(grad(slope.square().sum(), [x, hx, *module.parameters()]))
        # A handful of roundings at every step, of which there are four in each of two layers.
        for ours, right in zip(*found, strict=True):
            error = (ours.cpu().double() - right).norm() / right.norm()
            assert error < 32 * torch.finfo(dtype).eps
