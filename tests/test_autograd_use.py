# SPDX-License-Identifier: Apache-2.0
"""What programs do around the derivatives of fastrnn.RNN: hooks, checkpoints, threads, edits.

Contract: torch.nn.RNN under the same use, in float64, run beside it here; and the same bits for the
same inputs.
"""

import threading
import weakref

import pytest
import torch
from pairs import (
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
    weighted,
)
from torch.autograd import grad
from torch.nn.utils.rnn import PackedSequence
from torch.utils.checkpoint import checkpoint


class TestLifetime:
    """What may happen between forward and backward, and after."""

    @pytest.mark.parametrize("shape", [{}, {"steps": 5, "batch": 9, "sizes": (6, 65)}], ids=str)
    def test_a_retained_graph_gives_the_same_bits_again(self, shape, device):
        module, x, hx = our_call(device, **shape)
        loss, leaves = weighted(module(x, hx)[0]), [x, hx, *module.parameters()]
        once = grad(loss, leaves, retain_graph=True)
        again = grad(loss, leaves, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))

    def test_a_second_backward_is_refused(self, device):
        module, x, hx = our_call(device)
        loss = module(x, hx)[0].sum()
        loss.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()

    def test_a_second_backward_says_what_nn_rnn_says(self):
        messages = []
        for module in pair():
            loss = module(*arguments())[0].sum()
            loss.backward()
            with pytest.raises(RuntimeError, match="backward through the graph a second time") as e:
                loss.backward()
            messages.append(str(e.value))
        assert messages[0] == messages[1]

    @pytest.mark.parametrize("victim", ["input", "hx", "weight_ih_l0", "weight_hh_l1_reverse"])
    @pytest.mark.parametrize("form", ["padded", "batch_first", "packed"])
    def test_a_change_in_place_before_backward_is_reported(self, victim, form, device):
        module, x, hx = our_call(device, Setting(batch_first=form == "batch_first"))
        named = {"input": x, "hx": hx, **dict(module.named_parameters())}
        if form == "packed":
            x = PackedSequence(x.view(-1, I), torch.tensor([B] * T))
        h_n = module(x, hx)[1]
        with torch.no_grad():
            named[victim].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            h_n.sum().backward()

    def test_batch_sizes_may_be_changed_in_place_before_backward(self, device):
        def compute(module, x, hx):
            sizes = torch.tensor([3, 1])
            output, _ = module(PackedSequence(x.flatten(0, 1)[:4], sizes))
            sizes.fill_(2)
            return grad(weighted(output.data), [x, *module.parameters()])

        of_both(compute, device=device)

    def test_results_may_be_changed_in_place_before_backward(self, device):
        def compute(module, x, hx):
            output, h_n = module(x, hx)
            output.mul_(2).tanh_()
            h_n.zero_().add_(output[0, 0, 0])
            return grad(weighted(output) + weighted(h_n), [x, hx, *module.parameters()])

        of_both(compute, device=device)

    @pytest.mark.parametrize("truncated", [False, True])
    def test_backpropagation_through_a_chain_of_calls(self, truncated, device):
        def compute(module, x, hx):
            state, losses = hx, []
            for _ in range(3):
                output, state = module(x, state.detach() if truncated else state)
                losses.append(weighted(output))
            sum(losses).backward()
            return [leaf.grad for leaf in (x, hx, *module.parameters())]

        of_both(compute, device=device)


def transposed(shape, device):
    leaf = draw(*shape[:-2], *reversed(shape[-2:]), device=device)
    return leaf, leaf.transpose(-1, -2) if len(shape) > 1 else leaf


def sliced(shape, device):
    leaf = draw(*(2 * n + 1 for n in shape), device=device)
    return leaf, leaf[(slice(1, None, 2),) * len(shape)]


def offset(shape, device):
    leaf = draw(shape.numel() + 1, device=device)
    return leaf, leaf[1:].view(shape)


def row_expanded(shape, device):
    leaf = draw(1, *shape[1:], device=device)
    return leaf, leaf.expand(shape)


def column_expanded(shape, device):
    leaf = draw(*shape[:-1], 1, device=device)
    return leaf, leaf.expand(shape)


def batch_expanded(shape, device):
    leaf = draw(shape[0], *[1] * (len(shape) > 1), *shape[2:], device=device)
    return leaf, leaf.expand(shape)


def flipped(shape, device):
    leaf = draw(*shape, device=device)
    return leaf, leaf.flip(0)


@pytest.mark.parametrize(
    "view", [transposed, sliced, offset, row_expanded, column_expanded, batch_expanded, flipped]
)
class TestStrangeMemory:
    """Views of every kind are taken as they are; the leaf behind the view gets its gradient."""

    @pytest.mark.parametrize("batch_first", [False, True])
    @pytest.mark.parametrize("who", ["input", "hx"])
    def test_as_input_or_hx(self, who, batch_first, view, device):
        def compute(module, x, hx):
            leaf, viewed = view((x if who == "input" else hx).shape, x.device)
            output, h_n = module(viewed, hx) if who == "input" else module(x, viewed)
            return [output, h_n, *grad(weighted(output) + h_n.sum(), [leaf, *module.parameters()])]

        of_both(compute, Setting(batch_first=batch_first), device)

    def test_as_packed_data(self, view, device):
        def compute(module, x, hx):
            leaf, viewed = view(torch.Size((6, I)), x.device)
            packed = PackedSequence(viewed, torch.tensor([3, 2, 1]))
            output, h_n = module(packed)
            return [output.data, h_n, *grad(weighted(output.data), [leaf, *module.parameters()])]

        of_both(compute, device=device)

    @pytest.mark.parametrize("sizes", [(I, H), (17, 16)], ids=["packed", "unpacked"])
    @pytest.mark.parametrize("kind", ["weight_ih", "weight_hh", "bias_ih", "bias_hh"])
    def test_as_weights(self, kind, sizes, view, device):
        def compute(module, x, hx):
            leaves, weights = [], {}
            for name, parameter in module.named_parameters():
                strange = name.startswith(kind)
                leaf, weights[name] = (
                    view(parameter.shape, x.device) if strange else (parameter, parameter)
                )
                leaves.append(leaf)
            output, h_n = torch.func.functional_call(module, weights, (x, hx))
            slopes = grad(weighted(output) + weighted(h_n), [x, hx, *leaves])
            return [output, h_n, *slopes]

        of_both(compute, device=device, sizes=sizes)


class TestHooks:
    def test_tensor_hooks_see_and_change_what_nn_rnn_lets_them(self, device):
        def compute(module, x, hx):
            seen = []
            output, h_n = module(x, hx)
            for i, tensor in enumerate((x, hx, output, h_n, *module.parameters())):
                tensor.register_hook(lambda g, i=i: (seen.append((i, g)), g * (i + 2))[1])
            (weighted(output) + weighted(h_n)).backward()
            seen.sort(key=lambda each: each[0])
            leaves = (x, hx, *module.parameters())
            return [*(g for _, g in seen), *(leaf.grad for leaf in leaves)]

        of_both(compute, device=device)

    @pytest.mark.parametrize("unused", ["output", "h_n"])
    def test_the_hook_of_an_unused_result_is_given_none(self, unused):
        """One node makes both results, as on a GPU; two nodes of nn.RNN on a CPU do not call it."""
        module, (x, hx) = pair()[0], arguments()
        results = dict(zip(("output", "h_n"), module(x, hx), strict=True))
        called = []
        results.pop(unused).register_hook(called.append)
        next(iter(results.values())).sum().backward()
        assert called == [None]

    @pytest.mark.parametrize("batch_first", [False, True])
    def test_results_can_retain_their_gradients(self, batch_first, device):
        def compute(module, x, hx):
            output, h_n = module(x, hx)
            output.retain_grad()
            h_n.retain_grad()
            (weighted(output) + module(output[..., :I], h_n)[0].sum()).backward()
            return [output.grad, h_n.grad, x.grad]

        of_both(compute, Setting(batch_first=batch_first), device)

    def test_post_accumulate_hooks_run_once_for_each_parameter(self, device):
        def compute(module, x, hx):
            stepped = []

            def step(parameter):
                stepped.append(parameter)
                with torch.no_grad():
                    parameter.sub_(parameter.grad, alpha=0.1)
                parameter.grad = None

            for parameter in module.parameters():
                parameter.register_post_accumulate_grad_hook(step)
            module(x, hx)[0].square().sum().backward()
            assert len(stepped) == len({*stepped}) == 16
            return [p.detach() for p in module.parameters()]

        of_both(compute, device=device)

    @pytest.mark.parametrize("used", [0, 1])
    def test_full_backward_hooks_see_what_nn_rnns_see(self, used, device):
        def compute(module, x, hx):
            seen = []
            module.register_full_backward_hook(lambda m, gi, go: seen.extend([*gi, *go]))
            module.register_full_backward_pre_hook(lambda m, go: seen.extend(go))
            weighted(module(x, hx)[used]).backward()
            return seen

        of_both(compute, device=device)


class TestSavedTensors:
    @pytest.mark.parametrize("use_reentrant", [False, True])
    @pytest.mark.parametrize("dropout", [0.0, 0.5])
    def test_checkpoints_replay_the_call(self, use_reentrant, dropout, device):
        results = []
        for call, options in (
            (lambda m, *args: m(*args), {}),
            (checkpoint, {"use_reentrant": use_reentrant}),
        ):
            module, x, hx = our_call(device, dropout=dropout)
            torch.manual_seed(7)
            output, h_n = call(module, x, hx, **options)
            (weighted(output) + weighted(h_n)).backward()
            results.append([output, h_n, x.grad, hx.grad, *(p.grad for p in module.parameters())])
        assert all(map(torch.equal, *results))

    @pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
    def test_hooks_may_replace_what_is_saved_by_copies(self, packed):
        def compute(module, x, hx):
            count = 0

            def pack(t):
                nonlocal count
                count += 1
                return t.detach().numpy().copy()

            leaves = [x, *module.parameters()]
            with torch.autograd.graph.saved_tensors_hooks(pack, torch.from_numpy):
                if packed:
                    given = PackedSequence(x.flatten(0, 1), torch.tensor([B] * T))
                    loss = weighted(module(given)[0].data)
                else:
                    loss = weighted(module(x)[0])
            assert count > 2
            return grad(loss, leaves)

        of_both(compute)

    def test_hooks_that_scale_what_is_saved_see_no_sizes(self):
        def compute(module, x, hx):
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 2, lambda t: t / 2):
                loss = weighted(module(PackedSequence(x.flatten(0, 1), torch.tensor([B] * T)))[1])
            return grad(loss, [x, *module.parameters()])

        of_both(compute)

    def test_save_on_cpu_changes_nothing(self, device):
        def compute(module, x, hx):
            with torch.autograd.graph.save_on_cpu():
                output, h_n = module(x, hx)
                loss = weighted(output) + weighted(h_n)
            leaves = [x, hx, *module.parameters()]
            first = grad(loss, leaves, create_graph=True)
            return [*first, *grad(first[0].square().sum(), leaves, materialize_grads=True)]

        of_both(compute, device=device)

    def test_dropping_the_results_frees_what_was_saved(self, device):
        module, x, hx = our_call(device)
        saved = []

        def keep(t):
            saved.append(weakref.ref(t))
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            output, h_n = module(x, hx)
        leaves = {id(t) for t in (x, hx, *module.parameters())}
        assert any(ref() is not None and id(ref()) not in leaves for ref in saved)
        del output, h_n
        assert all(ref() is None or id(ref()) in leaves for ref in saved)


class TestModes:
    @pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
    def test_anomaly_mode_changes_no_number(self):
        def compute(module, x, hx):
            with torch.autograd.detect_anomaly():
                return grad(weighted(module(x, hx)[0]), [x, hx, *module.parameters()])

        of_both(compute)

    @pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
    @pytest.mark.filterwarnings("ignore:Error detected in")
    def test_anomaly_mode_reports_nan(self):
        for module in pair():
            x, hx = arguments()
            with torch.autograd.detect_anomaly(), pytest.raises(RuntimeError, match="nan values"):
                module(x * float("nan"), hx)[0].sum().backward()

    @pytest.mark.parametrize("cudnn", [True, False], ids=["with cuDNN", "without cuDNN"])
    @pytest.mark.parametrize("training", [False, True])
    def test_backward_works_in_training_and_in_evaluation(self, training, cudnn, device):
        def compute(module, x, hx):
            output, h_n = module.train(training)(x, hx)
            return grad(weighted(output) + weighted(h_n), [x, hx, *module.parameters()])

        with torch.backends.cudnn.flags(enabled=cudnn):
            of_both(compute, device=device)


SHAPES = {"small": (3, 4, 5, 7), "many rows": (5, 32, 16, 64), "few rows": (9, 2, 32, 264)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
class TestSameBits:
    """On a GPU, test_gpu_results.py and test_gpu_use.py look at these: of more shapes, and with
    streams."""

    def call(self, shape):
        steps, batch, *sizes = shape
        return our_call("cpu", steps=steps, batch=batch, sizes=tuple(sizes))

    def run(self, module, x, hx):
        output, h_n = module(x, hx)
        slopes = grad(weighted(output) + weighted(h_n), [x, hx, *module.parameters()])
        return [output, h_n, *slopes]

    def test_on_repetition(self, shape):
        given = self.call(shape)
        first = self.run(*given)
        for _ in range(4):
            assert all(map(torch.equal, first, self.run(*given)))

    def together(self, work, count=4):
        """work() by so many threads that begin at the same time; what it returned."""
        barrier, results = threading.Barrier(count), []

        def begin():
            barrier.wait()
            results.append(work())

        threads = [threading.Thread(target=begin) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == count
        return results

    def test_from_several_threads_at_once(self, shape):
        given = self.call(shape)
        first = self.run(*given)
        for runs in self.together(lambda: [self.run(*given) for _ in range(3)]):
            assert all(all(map(torch.equal, first, run)) for run in runs)

    def test_of_one_graph_from_several_threads_at_once(self, shape):
        module, x, hx = self.call(shape)
        loss, leaves = weighted(module(x, hx)[0]), [x, hx, *module.parameters()]
        first = grad(loss, leaves, retain_graph=True)
        for run in self.together(lambda: grad(loss, leaves, retain_graph=True)):
            assert all(map(torch.equal, first, run))
