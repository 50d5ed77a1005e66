# SPDX-License-Identifier: Apache-2.0
"""On a GPU: derivatives of every order, of every participant, whatever part of the results is read.

Contract: torch.nn.RNN on the CPU in float64, where it can all be had; cuDNN refuses a second
derivative and a backward in eval mode. Or autograd itself: gradcheck and gradgradcheck.
"""

import pytest
import torch
from pairs import LENGTHS, B, H, I, Setting, T, arguments, draw, pair
from test_gpu_results import DEVICE, agree, needs_gpu, weighted
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.checkpoint import checkpoint

from fastrnn.functional import rnn, takes_fused_path

pytestmark = needs_gpu

SETTINGS = [
    Setting("tanh", 1, False),
    Setting("relu", 1, True, batch_first=True),
    Setting("tanh", 2, True, False),
    Setting("relu", 2, False, batch_first=True),
    Setting("tanh", 2, True),
]
PACKABLE = [setting for setting in SETTINGS if not setting.batch_first]
#: steps, batch and (I, H): the smallest, and one with tails of tiles.
AGREEMENTS = {"small": (T, B, (I, H)), "larger": (5, 9, (6, 65))}
every_size = pytest.mark.parametrize("size", AGREEMENTS.values(), ids=AGREEMENTS)


def there(*leaves):
    """The same numbers as leaves on the GPU."""
    return [leaf.detach().clone().to(DEVICE).requires_grad_() for leaf in leaves]


def packed(device, lengths=LENGTHS["unsorted"]):
    """Sequences, leaves on `device`."""
    return [draw(n, I, seed=n).detach().clone().to(device).requires_grad_() for n in lengths]


class TestFiniteDifferences:
    """First and second derivatives against numerical ones, along one direction but for one case."""

    def check(self, call, inputs, whole=False):
        assert gradcheck(call, inputs, fast_mode=not whole)
        assert gradgradcheck(call, inputs, fast_mode=not whole)

    @pytest.mark.parametrize("has_hx", [False, True], ids=["zeros", "hx"])
    @pytest.mark.parametrize("setting", SETTINGS, ids=str)
    def test_of_a_padded_batch(self, setting, has_hx):
        x, hx, *weights = there(*arguments(setting), *pair(setting)[0].parameters())

        def call(x, *rest):
            state, flat = (rest[0], list(rest[1:])) if has_hx else (None, list(rest))
            assert takes_fused_path(x, flat, state)
            return rnn(x, flat, state, **setting._asdict())

        inputs = (x, *([hx] if has_hx else []), *weights)
        self.check(call, inputs, whole=setting == SETTINGS[0])

    @pytest.mark.parametrize("setting", SETTINGS[:3], ids=str)
    def test_of_an_unbatched_sequence(self, setting):
        rows = arguments(setting)[1].shape[0]
        call = lambda x, hx, *flat: rnn(x, list(flat), hx, **setting._asdict())  # noqa: E731
        inputs = draw(T, I, seed=1), draw(rows, H, seed=2), *pair(setting)[0].parameters()
        self.check(call, there(*inputs))

    @pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
    @pytest.mark.parametrize("setting", PACKABLE, ids=str)
    def test_of_a_packed_batch(self, setting, lengths):
        xs = packed(DEVICE, lengths)
        rows = setting.num_layers * (1 + setting.bidirectional)
        hx, *weights = there(draw(rows, len(xs), H, seed=9), *pair(setting)[0].parameters())

        def call(hx, *rest):
            given = pack_sequence(rest[: len(xs)], enforce_sorted=False)
            output, h_n = rnn(given, list(rest[len(xs) :]), hx, **setting._asdict())
            return output.data, h_n

        self.check(call, (hx, *xs, *weights))


class TestHigherOrders:
    @every_size
    @pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
    @pytest.mark.parametrize("batch_first", [False, True])
    def test_a_gradient_penalty_reaches_every_leaf(self, nonlinearity, batch_first, size):
        def compute(module, x, hx):
            loss = weighted(module(x, hx)[0])
            (slope,) = grad(loss, x, create_graph=True)
            (loss + (slope.norm(dim=-1) - 1).square().mean()).backward()
            return [leaf.grad for leaf in (x, hx, *module.parameters())]

        agree(compute, Setting(nonlinearity, batch_first=batch_first), *size)

    @pytest.mark.parametrize("setting", PACKABLE, ids=str)
    def test_a_gradient_penalty_of_packed_data(self, setting):
        def compute(module, x, hx):
            xs = packed(x.device)
            output, h_n = module(pack_sequence(xs, enforce_sorted=False))
            slopes = grad(weighted(output.data) + weighted(h_n), xs, create_graph=True)
            sum(s.square().sum() for s in slopes).backward()
            return [leaf.grad for leaf in (*xs, *module.parameters())]

        agree(compute, setting)

    def test_the_gradient_itself_is_differentiable_only_when_asked(self):
        module, (x, hx) = pair()[0].to(DEVICE), there(*arguments())
        assert not grad(weighted(module(x, hx)[0]), x)[0].requires_grad
        assert grad(weighted(module(x, hx)[0]), x, create_graph=True)[0].requires_grad

    @every_size
    def test_a_hessian_vector_product_over_the_weights(self, size):
        def compute(module, x, hx):
            leaves = list(module.parameters())
            first = grad(weighted(module(x, hx)[0]), leaves, create_graph=True)
            vector = [draw(*p.shape, seed=i).detach().to(p.device) for i, p in enumerate(leaves)]
            return grad(first, leaves, vector, materialize_grads=True)

        agree(compute, Setting(), *size)

    def test_a_third_derivative(self):
        def compute(module, x, hx):
            (one,) = grad(weighted(module(x, hx)[0]), x, create_graph=True)
            (two,) = grad(one.square().sum(), x, create_graph=True)
            return grad(two.square().sum(), [x, hx, *module.parameters()], materialize_grads=True)

        agree(compute)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_second_derivatives_in_lower_precision_are_near(self, dtype):
        found = []
        for kind, device in ((dtype, DEVICE), (torch.float64, "cpu")):
            module = pair(sizes=(6, 33))[0].to(dtype).to(device, kind)
            x, hx = (
                t.detach().to(dtype).to(device, kind).requires_grad_()
                for t in arguments(Setting(), 4, 9, (6, 33))
            )
            (slope,) = grad(weighted(module(x, hx)[0]), x, create_graph=True)
            found.append(grad(slope.square().sum(), [x, hx, *module.parameters()]))
        # A handful of roundings at every step, of which there are four in each of two layers.
        for ours, right in zip(*found, strict=True):
            error = (ours.cpu().double() - right).norm() / right.norm()
            assert error < 32 * torch.finfo(dtype).eps


class TestLifetime:
    def test_a_retained_graph_gives_the_same_bits_again(self):
        module, (x, hx) = pair(sizes=(6, 65))[0].to(DEVICE), arguments(Setting(), 5, 9, (6, 65))
        x, hx = there(x, hx)
        loss, leaves = weighted(module(x, hx)[0]), [x, hx, *module.parameters()]
        once, again = (grad(loss, leaves, retain_graph=True) for _ in range(2))
        assert all(map(torch.equal, once, again))

    def test_a_second_backward_is_refused(self):
        module, (x, hx) = pair()[0].to(DEVICE), there(*arguments())
        loss = module(x, hx)[0].sum()
        loss.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()

    @pytest.mark.parametrize("training", [False, True], ids=["in eval mode", "in training"])
    @pytest.mark.parametrize("cudnn", [False, True], ids=["without cuDNN", "with cuDNN"])
    def test_backward_works(self, training, cudnn, monkeypatch):
        monkeypatch.setattr(torch.backends.cudnn, "enabled", cudnn)

        def compute(module, x, hx):
            output, h_n = module.train(training)(x, hx)
            return grad(weighted(output) + weighted(h_n), [x, hx, *module.parameters()])

        agree(compute)

    @pytest.mark.parametrize("victim", ["input", "hx", "weight_ih_l0", "weight_hh_l1_reverse"])
    @pytest.mark.parametrize("form", ["padded", "packed"])
    def test_a_change_in_place_before_backward_is_reported(self, victim, form):
        module, (x, hx) = pair()[0].to(DEVICE), there(*arguments())
        named = {"input": x, "hx": hx, **dict(module.named_parameters())}
        given = PackedSequence(x.view(-1, I), torch.tensor([B] * T)) if form == "packed" else x
        h_n = module(given, hx)[1]
        with torch.no_grad():
            named[victim].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            h_n.sum().backward()

    def test_results_may_be_changed_in_place_before_backward(self):
        def compute(module, x, hx):
            output, h_n = module(x, hx)
            output.mul_(2).tanh_()
            h_n.zero_().add_(output[0, 0, 0])
            return grad(weighted(output) + weighted(h_n), [x, hx, *module.parameters()])

        agree(compute)

    @pytest.mark.parametrize("truncated", [False, True])
    def test_backpropagation_through_a_chain_of_calls(self, truncated):
        def compute(module, x, hx):
            state, losses = hx, []
            for _ in range(3):
                output, state = module(x, state.detach() if truncated else state)
                losses.append(weighted(output))
            sum(losses).backward()
            return [leaf.grad for leaf in (x, hx, *module.parameters())]

        agree(compute)

    def test_save_on_cpu_changes_nothing(self):
        def compute(module, x, hx):
            with torch.autograd.graph.save_on_cpu():
                output, h_n = module(x, hx)
            return grad(weighted(output) + weighted(h_n), [x, hx, *module.parameters()])

        agree(compute)

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_checkpoints_replay_the_call_and_its_dropout(self, use_reentrant):
        results = []
        for call in (lambda m, *given: m(*given), checkpoint):
            module, (x, hx) = pair(dropout=0.5)[0].to(DEVICE), there(*arguments())
            torch.manual_seed(7)
            options = {"use_reentrant": use_reentrant} if call is checkpoint else {}
            output, h_n = call(module, x, hx, **options)
            (weighted(output) + weighted(h_n)).backward()
            results.append([output, h_n, *(leaf.grad for leaf in (x, hx, *module.parameters()))])
        assert all(map(torch.equal, *results))


KINDS = ("input", "hx", "weight_ih", "weight_hh", "bias_ih", "bias_hh")
WANTED = [*((kind,) for kind in KINDS), ("input", "weight_hh"), ("hx", "bias_ih"), KINDS[2:], KINDS]


class TestParticipants:
    @pytest.mark.parametrize("wanted", WANTED, ids="+".join)
    def test_exactly_the_wanted_gradients_arrive(self, wanted):
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

        agree(compute)

    @pytest.mark.parametrize("index", range(0, 16, 3))
    def test_a_single_thawed_parameter_gets_its_gradient(self, index):
        def compute(module, x, hx):
            for i, parameter in enumerate(module.parameters()):
                parameter.requires_grad_(i == index)
            module(x.detach(), hx.detach())[0].square().sum().backward()
            return [p.grad for p in module.parameters()]

        agree(compute)

    def test_nothing_requires_grad_when_all_is_frozen(self):
        module = pair()[0].to(DEVICE).requires_grad_(False)
        results = module(*(t.detach() for t in there(*arguments())))
        assert all(r.grad_fn is None and not r.requires_grad for r in results)

    def test_a_tied_weight_gets_the_sum_of_its_uses(self):
        def compute(module, x, hx):
            module.weight_hh_l2 = module.weight_hh_l0
            module.weight_ih_l1 = module.weight_hh_l0
            weighted(module(x, hx)[0]).backward()
            return [p.grad for p in module.parameters()]

        agree(compute, Setting(num_layers=3, bidirectional=False))

    def test_gradients_have_the_layout_of_what_they_belong_to_and_share_no_memory(self):
        module, (x, hx) = pair()[0].to(DEVICE), there(*arguments())
        leaves = (x, hx, *module.parameters())
        module(x, hx)[0].square().sum().backward()
        assert all(leaf.grad.stride() == leaf.stride() for leaf in leaves)
        assert len({leaf.grad.untyped_storage().data_ptr() for leaf in leaves}) == len(leaves)


READS = {
    "h_n": lambda y, h: weighted(h),
    "h_n of the first layer": lambda y, h: h[0].square().sum(),
    "the first row of time": lambda y, h: y[0].square().sum(),
    "the last row of time": lambda y, h: y[-1].square().sum(),
    "the reverse direction": lambda y, h: weighted(y[..., H:]),
    "a plain sum": lambda y, h: y.sum(),
    "a plain sum of h_n": lambda y, h: h.sum(),
    "a mean over rows": lambda y, h: weighted(y.mean(0)),
    "a transpose": lambda y, h: weighted(y.transpose(0, -1)),
    "every second column": lambda y, h: weighted(y[..., ::2]) + weighted(h[..., ::2]),
    "both": lambda y, h: weighted(y) + weighted(h),
    "nothing but a constant": lambda y, h: (y * 0).sum() + (h * 0).sum(),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
class TestPartialReads:
    """Whatever part of the results the loss reads, every participant gets a dense gradient."""

    @pytest.mark.parametrize("batch_first", [False, True])
    def test_of_a_padded_batch(self, read, batch_first):
        def compute(module, x, hx):
            return grad(read(*module(x, hx)), [x, hx, *module.parameters()])

        agree(compute, Setting(batch_first=batch_first))

    def test_of_a_packed_batch(self, read):
        def compute(module, x, hx):
            xs = packed(x.device)
            output, h_n = module(pack_sequence(xs, enforce_sorted=False))
            return grad(read(output.data, h_n), [*xs, *module.parameters()])

        agree(compute)

    def test_of_a_second_derivative(self, read):
        def compute(module, x, hx):
            leaves = [x, hx, *module.parameters()]
            first = grad(read(*module(x, hx)), leaves, create_graph=True)
            return grad(sum(g.square().sum() for g in first), leaves, materialize_grads=True)

        agree(compute)


class TestHooks:
    def test_tensor_hooks_see_and_change_what_nn_rnn_lets_them(self):
        def compute(module, x, hx):
            seen = []
            output, h_n = module(x, hx)
            for i, leaf in enumerate((x, hx, output, h_n, *module.parameters())):
                leaf.register_hook(lambda g, i=i: (seen.append((i, g)), g * (i + 2))[1])
            (weighted(output) + weighted(h_n)).backward()
            seen.sort(key=lambda each: each[0])
            return [*(g for _, g in seen), *(t.grad for t in (x, hx, *module.parameters()))]

        agree(compute)

    @pytest.mark.parametrize("used", [0, 1])
    def test_full_backward_hooks_see_what_nn_rnns_see(self, used):
        def compute(module, x, hx):
            seen = []
            module.register_full_backward_hook(lambda m, gi, go: seen.extend([*gi, *go]))
            module.register_full_backward_pre_hook(lambda m, go: seen.extend(go))
            weighted(module(x, hx)[used]).backward()
            return seen

        agree(compute)

    def test_post_accumulate_hooks_may_step_within_backward(self):
        def compute(module, x, hx):
            def step(parameter):
                with torch.no_grad():
                    parameter.sub_(parameter.grad, alpha=0.1)
                parameter.grad = None

            for parameter in module.parameters():
                parameter.register_post_accumulate_grad_hook(step)
            module(x, hx)[0].square().sum().backward()
            return [p.detach() for p in module.parameters()]

        agree(compute)
