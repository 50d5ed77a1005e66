# SPDX-License-Identifier: Apache-2.0
"""Derivatives of fastrnn.RNN: every order, every participant, every part of the results.

Contract: whatever torch.nn.RNN answers to the same question in float64, run beside it here,
or, where autograd itself is the judge, gradcheck and gradgradcheck.
"""

import itertools

import pytest
import torch
from pairs import LENGTHS, B, H, I, Setting, T, arguments, draw, of_both, pair, weighted
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.nn.utils.rnn import pack_sequence

from fastrnn.functional import rnn

SETTINGS = [
    Setting(*flags) for flags in itertools.product(("tanh", "relu"), (1, 2), *[(False, True)] * 3)
]
PACKABLE = [setting for setting in SETTINGS if setting.bias and not setting.batch_first]


class TestFiniteDifferences:
    """First and second derivatives against numerical ones; fast_mode for two layers of two only."""

    def check(self, call, inputs, setting):
        large = setting.num_layers * (1 + setting.bidirectional) == 4
        assert gradcheck(call, inputs, fast_mode=large)
        assert gradgradcheck(call, inputs, fast_mode=large)

    @pytest.mark.parametrize("has_hx", [False, True], ids=["zeros", "hx"])
    @pytest.mark.parametrize("setting", SETTINGS, ids=str)
    def test_of_a_padded_batch(self, setting, has_hx):
        x, hx = arguments(setting)
        weights = list(pair(setting)[0].parameters())

        def call(x, *rest):
            state, flat = (rest[0], rest[1:]) if has_hx else (None, rest)
            return rnn(x, list(flat), state, **setting._asdict())

        self.check(call, (x, *([hx] if has_hx else []), *weights), setting)

    @pytest.mark.parametrize("setting", SETTINGS[::4], ids=str)
    def test_of_an_unbatched_sequence(self, setting):
        module = pair(setting)[0]
        x, hx = draw(T, I, seed=1), draw(arguments(setting)[1].shape[0], H, seed=2)
        call = lambda x, hx, *flat: rnn(x, list(flat), hx, **setting._asdict())  # noqa: E731
        self.check(call, (x, hx, *module.parameters()), setting)

    @pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
    @pytest.mark.parametrize("setting", PACKABLE, ids=str)
    def test_of_a_packed_batch(self, setting, lengths):
        xs = [draw(n, I, seed=n) for n in lengths]
        hx = draw(setting.num_layers * (1 + setting.bidirectional), len(lengths), H, seed=9)

        def call(hx, *rest):
            packed = pack_sequence(rest[: len(xs)], enforce_sorted=False)
            output, h_n = rnn(packed, list(rest[len(xs) :]), hx, **setting._asdict())
            return output.data, h_n

        self.check(call, (hx, *xs, *pair(setting)[0].parameters()), setting)


KINDS = ("input", "hx", "weight_ih", "weight_hh", "bias_ih", "bias_hh")


class TestParticipants:
    """Gradients reach those who asked for them, and nobody else."""

    @pytest.mark.parametrize(
        "wanted",
        [s for n in range(1, 7) for s in itertools.combinations(KINDS, n)],
        ids="+".join,
    )
    @pytest.mark.parametrize("bidirectional", [True, False])
    def test_exactly_the_wanted_gradients_arrive(self, wanted, bidirectional):
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

        of_both(compute, Setting(bidirectional=bidirectional))

    @pytest.mark.parametrize(
        "bidirectional, index", [(True, i) for i in range(16)] + [(False, i) for i in range(8)]
    )
    def test_a_single_thawed_parameter_gets_its_gradient(self, bidirectional, index):
        def compute(module, x, hx):
            for i, parameter in enumerate(module.parameters()):
                parameter.requires_grad_(i == index)
            module(x.detach(), hx.detach())[0].square().sum().backward()
            return [p.grad for p in module.parameters()]

        of_both(compute, Setting(bidirectional=bidirectional))

    def test_nothing_requires_grad_when_all_is_frozen(self):
        module = pair()[0].requires_grad_(False)
        x, hx = arguments()
        output, h_n = module(x.detach(), hx.detach())
        assert not output.requires_grad and not h_n.requires_grad
        assert output.grad_fn is None and h_n.grad_fn is None

    def test_an_empty_batch_gives_zero_gradients_to_every_parameter(self):
        module = pair()[0]
        module(draw(T, 0, I))[0].sum().backward()
        assert all(p.grad.count_nonzero() == 0 for p in module.parameters())

    def test_a_tied_weight_gets_the_sum_of_its_uses(self):
        setting = Setting(num_layers=3, bidirectional=False)

        def compute(module, x, hx):
            module.weight_hh_l2 = module.weight_hh_l0
            module.weight_ih_l1 = module.weight_hh_l0
            (module(x, hx)[0] * draw(T, B, H, seed=3)).sum().backward()
            return [p.grad for p in module.parameters()]

        of_both(compute, setting)

    def test_one_tensor_as_input_and_as_hx_gets_the_sum(self):
        def compute(module, x, hx):
            shared = draw(2, B, H, seed=4)
            output, h_n = module(shared, shared)
            return grad(output.square().sum() + h_n.sum(), [shared, *module.parameters()])

        setting = Setting(bidirectional=False)
        of_both(compute, setting, sizes=(H, H))

    @pytest.mark.parametrize("setting", [Setting(), Setting(batch_first=True)], ids=str)
    def test_gradients_have_the_layout_of_what_they_belong_to(self, setting):
        module, (x, hx) = pair(setting)[0], arguments(setting)
        module(x, hx)[0].square().sum().backward()
        for leaf in (x, hx, *module.parameters()):
            assert leaf.grad.is_contiguous() and leaf.grad.stride() == leaf.stride()

    def test_gradients_of_different_parameters_share_no_memory(self):
        module, (x, hx) = pair()[0], arguments()
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
    def test_of_a_padded_batch(self, read, batch_first, bidirectional):
        def compute(module, x, hx):
            leaves = [x, hx, *module.parameters()]
            return grad(read(*module(x, hx)), leaves)

        of_both(compute, Setting(batch_first=batch_first, bidirectional=bidirectional))

    def test_of_a_packed_batch(self, read):
        def compute(module, x, hx):
            xs = [draw(n, I, seed=n) for n in LENGTHS["unsorted"]]
            state = draw(4, 3, H, seed=9)
            output, h_n = module(pack_sequence(xs, enforce_sorted=False), state)
            return grad(read(output.data, h_n), [*xs, state, *module.parameters()])

        of_both(compute)

    def test_of_a_second_derivative(self, read):
        def compute(module, x, hx):
            leaves = [x, hx, *module.parameters()]
            first = grad(read(*module(x, hx)), leaves, create_graph=True)
            return grad(sum(g.square().sum() for g in first), leaves, materialize_grads=True)

        of_both(compute, Setting("relu"))


class TestHigherOrders:
    @pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
    @pytest.mark.parametrize("batch_first", [False, True])
    def test_a_gradient_penalty_reaches_every_leaf(self, nonlinearity, batch_first):
        def compute(module, x, hx):
            loss = weighted(module(x, hx)[0])
            (slope,) = grad(loss, x, create_graph=True)
            (loss + (slope.norm(dim=-1) - 1).square().mean()).backward()
            return [leaf.grad for leaf in (x, hx, *module.parameters())]

        of_both(compute, Setting(nonlinearity, batch_first=batch_first))

    def test_a_gradient_penalty_of_packed_data(self):
        def compute(module, x, hx):
            xs = [draw(n, I, seed=n) for n in LENGTHS["unsorted"]]
            output, h_n = module(pack_sequence(xs, enforce_sorted=False))
            slopes = grad(weighted(output.data) + weighted(h_n), xs, create_graph=True)
            sum(s.square().sum() for s in slopes).backward()
            return [leaf.grad for leaf in (*xs, *module.parameters())]

        of_both(compute)

    def test_the_gradient_itself_is_differentiable_only_when_asked(self):
        module, (x, hx) = pair()[0], arguments()
        assert not grad(weighted(module(x, hx)[0]), x)[0].requires_grad
        assert grad(weighted(module(x, hx)[0]), x, create_graph=True)[0].requires_grad

    def test_a_hessian_vector_product_over_the_weights(self):
        def compute(module, x, hx):
            parameters = list(module.parameters())
            first = grad(weighted(module(x, hx)[0]), parameters, create_graph=True)
            vector = [draw(*p.shape, seed=i, requires_grad=False) for i, p in enumerate(parameters)]
            return grad(first, parameters, vector, materialize_grads=True)

        of_both(compute)

    @pytest.mark.parametrize("product", ["hvp", "vhp"])
    def test_the_hessian_products_of_torch_autograd_functional(self, product):
        def compute(module, x, hx):
            loss = lambda x, hx: weighted(module(x, hx)[0])  # noqa: E731
            vectors = (torch.ones_like(x), torch.ones_like(hx))
            return getattr(torch.autograd.functional, product)(loss, (x, hx), vectors)[1]

        of_both(compute)

    def test_a_third_derivative(self):
        def compute(module, x, hx):
            (one,) = grad(weighted(module(x, hx)[0]), x, create_graph=True)
            (two,) = grad(one.square().sum(), x, create_graph=True)
            return grad(two.square().sum(), [x, hx, *module.parameters()], materialize_grads=True)

        of_both(compute)

    @pytest.mark.parametrize("vectorize", [False, True])
    def test_jacobians_by_batched_cotangents(self, vectorize):
        def compute(module, x, hx):
            call = lambda x, hx: module(x, hx)[0]  # noqa: E731
            return torch.autograd.functional.jacobian(call, (x, hx), vectorize=vectorize)

        of_both(compute)
