# SPDX-License-Identifier: Apache-2.0
"""What programs do around the derivatives of fastrnn.RNN: hooks, checkpoints, threads, edits.

Contract: torch.nn.RNN under the same use, in float64, run beside it here; and the same bits for the
same inputs.
"""

import threading
import weakref

import pytest
import torch
from pairs import B, H, I, Setting, T, arguments, draw, of_both, pair, same, weighted
from torch.autograd import grad
from torch.nn.utils.rnn import PackedSequence
from torch.utils.checkpoint import checkpoint

from fastrnn.functional import rnn


class TestLifetime:
    """What may happen between forward and backward, and after."""

    def test_a_retained_graph_gives_the_same_bits_again(self):
        module, (x, hx) = pair()[0], arguments()
        loss, leaves = weighted(module(x, hx)[0]), [x, hx, *module.parameters()]
        once = grad(loss, leaves, retain_graph=True)
        again = grad(loss, leaves, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))

    def test_a_second_backward_says_what_nn_rnn_says(self):
        messages = []
        for module in pair():
            x, hx = arguments()
            output = module(x, hx)[0]
            loss = output.sum()
            loss.backward()
            with pytest.raises(RuntimeError, match="backward through the graph a second time") as e:
                loss.backward()
            messages.append(str(e.value))
        assert messages[0] == messages[1]

    @pytest.mark.parametrize("victim", ["input", "hx", "weight_ih_l0", "weight_hh_l1_reverse"])
    @pytest.mark.parametrize("form", ["padded", "batch_first", "packed"])
    def test_a_change_in_place_before_backward_is_reported(self, victim, form):
        setting = Setting(batch_first=form == "batch_first")
        module, (x, hx) = pair(setting)[0], arguments(setting)
        named = {"input": x, "hx": hx, **dict(module.named_parameters())}
        if form == "packed":
            x = PackedSequence(x.view(-1, I), torch.tensor([B] * T))
        h_n = module(x, hx)[1]
        with torch.no_grad():
            named[victim].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            h_n.sum().backward()

    def test_batch_sizes_may_be_changed_in_place_before_backward(self):
        def compute(module, x, hx):
            sizes = torch.tensor([3, 1])
            output, _ = module(PackedSequence(x.flatten(0, 1)[:4], sizes))
            sizes.fill_(2)
            return grad(weighted(output.data), [x, *module.parameters()])

        of_both(compute)

    def test_results_may_be_changed_in_place_before_backward(self):
        def compute(module, x, hx):
            output, h_n = module(x, hx)
            output.mul_(2).tanh_()
            h_n.zero_().add_(output[0, 0, 0])
            return grad(weighted(output) + weighted(h_n), [x, hx, *module.parameters()])

        of_both(compute)

    def test_truncated_backpropagation_carries_the_state_only(self):
        def compute(module, x, hx):
            state = hx
            for _ in range(3):
                output, state = module(x, state.detach())
                weighted(output).backward()
            return [p.grad for p in module.parameters()]

        of_both(compute)

    def test_backpropagation_through_a_chain_of_calls(self):
        def compute(module, x, hx):
            state = hx
            for _ in range(3):
                output, state = module(x, state)
            return grad(weighted(output), [x, hx, *module.parameters()])

        of_both(compute)


def transposed(shape):
    leaf = draw(*shape[:-2], *reversed(shape[-2:]))
    return leaf, leaf.transpose(-1, -2) if len(shape) > 1 else leaf


def sliced(shape):
    leaf = draw(*(2 * n + 1 for n in shape))
    return leaf, leaf[(slice(1, None, 2),) * len(shape)]


def offset(shape):
    leaf = draw(shape.numel() + 1)
    return leaf, leaf[1:].view(shape)


def row_expanded(shape):
    leaf = draw(1, *shape[1:])
    return leaf, leaf.expand(shape)


def column_expanded(shape):
    leaf = draw(*shape[:-1], 1)
    return leaf, leaf.expand(shape)


def batch_expanded(shape):
    leaf = draw(shape[0], *[1] * (len(shape) > 1), *shape[2:])
    return leaf, leaf.expand(shape)


@pytest.mark.parametrize(
    "view", [transposed, sliced, offset, row_expanded, column_expanded, batch_expanded]
)
class TestStrangeMemory:
    """Views of every kind are taken as they are; the leaf behind the view gets its gradient."""

    @pytest.mark.parametrize("batch_first", [False, True])
    @pytest.mark.parametrize("who", ["input", "hx"])
    def test_as_input_or_hx(self, who, batch_first, view):
        def compute(module, x, hx):
            leaf, viewed = view((x if who == "input" else hx).shape)
            output, h_n = module(viewed, hx) if who == "input" else module(x, viewed)
            return [output, h_n, *grad(weighted(output) + h_n.sum(), [leaf, *module.parameters()])]

        of_both(compute, Setting(batch_first=batch_first))

    def test_as_packed_data(self, view):
        def compute(module, x, hx):
            leaf, viewed = view(torch.Size((6, I)))
            packed = PackedSequence(viewed, torch.tensor([3, 2, 1]))
            output, h_n = module(packed)
            return [output.data, h_n, *grad(weighted(output.data), [leaf, *module.parameters()])]

        of_both(compute)

    @pytest.mark.parametrize("sizes", [(I, H), (17, 16)], ids=["packed", "unpacked"])
    @pytest.mark.parametrize("kind", ["weight_ih", "weight_hh", "bias_ih", "bias_hh"])
    def test_as_weights_of_the_function(self, kind, sizes, view):
        (module, _), (x, hx) = pair(sizes=sizes), arguments(sizes=sizes)
        leaves, flat = [], []
        for name, parameter in module.named_parameters():
            leaf, weight = (
                view(parameter.shape) if name.startswith(kind) else (parameter, parameter)
            )
            leaves.append(leaf)
            flat.append(weight)
        ours = rnn(x, flat, hx, num_layers=2, bidirectional=True)
        theirs = torch._VF.rnn_tanh(x, hx, flat, True, 2, 0.0, False, True, False)
        slopes = [grad(weighted(y) + weighted(h), [x, hx, *leaves]) for y, h in (ours, theirs)]
        same([*ours, *slopes[0]], [*theirs, *slopes[1]])


class TestHooks:
    def test_tensor_hooks_see_and_change_what_nn_rnn_lets_them(self):
        def compute(module, x, hx):
            seen = []
            output, h_n = module(x, hx)
            for i, tensor in enumerate((x, hx, output, h_n, *module.parameters())):
                tensor.register_hook(lambda g, i=i: (seen.append(g), g * (i + 2))[1])
            (weighted(output) + weighted(h_n)).backward()
            seen.sort(key=lambda g: (g.numel(), g.norm().item()))
            return [*seen, *(leaf.grad for leaf in (x, hx, *module.parameters()))]

        of_both(compute)

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
    def test_results_can_retain_their_gradients(self, batch_first):
        def compute(module, x, hx):
            output, h_n = module(x, hx)
            output.retain_grad()
            h_n.retain_grad()
            (weighted(output) + module(output[..., :I], h_n)[0].sum()).backward()
            return [output.grad, h_n.grad, x.grad]

        of_both(compute, Setting(batch_first=batch_first))

    def test_post_accumulate_hooks_run_once_for_each_parameter(self):
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
            return list(module.parameters())

        of_both(compute)

    @pytest.mark.parametrize("used", [0, 1])
    def test_full_backward_hooks_see_what_nn_rnns_see(self, used):
        def compute(module, x, hx):
            seen = []
            module.register_full_backward_hook(lambda m, gi, go: seen.extend([*gi, *go]))
            module.register_full_backward_pre_hook(lambda m, go: seen.extend(go))
            weighted(module(x, hx)[used]).backward()
            return seen

        of_both(compute)


class TestSavedTensors:
    @pytest.mark.parametrize("use_reentrant", [False, True])
    @pytest.mark.parametrize("dropout", [0.0, 0.5])
    def test_checkpoints_replay_the_call(self, use_reentrant, dropout):
        plain, wrapped = pair(dropout=dropout)[0], pair(dropout=dropout)[0]
        results = []
        for module, options in ((plain, None), (wrapped, {"use_reentrant": use_reentrant})):
            torch.manual_seed(7)
            x, hx = arguments()
            call = checkpoint if options else lambda m, *args: m(*args)
            output, h_n = call(module, x, hx, **(options or {}))
            (weighted(output) + weighted(h_n)).backward()
            results.append([output, h_n, x.grad, hx.grad, *(p.grad for p in module.parameters())])
        same(*results)

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

    def test_save_on_cpu_changes_nothing(self):
        def compute(module, x, hx):
            with torch.autograd.graph.save_on_cpu():
                output, h_n = module(x, hx)
                loss = weighted(output) + weighted(h_n)
            leaves = [x, hx, *module.parameters()]
            first = grad(loss, leaves, create_graph=True)
            return [*first, *grad(first[0].square().sum(), leaves, materialize_grads=True)]

        of_both(compute)

    def test_dropping_the_results_frees_what_was_saved(self):
        module, (x, hx) = pair()[0], arguments()
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

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    @pytest.mark.parametrize("setting", [Setting(), Setting("relu", batch_first=True)], ids=str)
    def test_results_without_gradients_have_the_same_numbers(self, mode, setting):
        module, (x, hx) = pair(setting)[0], arguments(setting)
        with mode():
            results = module(x, hx)
        assert not any(r.requires_grad for r in results)
        assert all(r.is_inference() == (mode is torch.inference_mode) for r in results)
        same(results, module(x, hx))

    @pytest.mark.parametrize("training", [False, True])
    def test_backward_works_in_training_and_in_evaluation(self, training):
        def compute(module, x, hx):
            output, h_n = module.train(training)(x, hx)
            return grad(weighted(output) + weighted(h_n), [x, hx, *module.parameters()])

        of_both(compute)


SIZES = {"small": (3, 4, 5, 7), "many rows": (5, 32, 16, 64), "few rows": (9, 2, 32, 264)}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
class TestSameBits:
    def run(self, module, sizes):
        steps, batch, inputs, hidden = sizes
        x, hx = arguments(Setting(), steps, batch, (inputs, hidden))
        output, h_n = module(x, hx)
        slopes = grad(weighted(output) + weighted(h_n), [x, hx, *module.parameters()])
        return [output, h_n, *slopes]

    def test_on_repetition(self, sizes):
        module = pair(sizes=sizes[2:])[0]
        first = self.run(module, sizes)
        for _ in range(4):
            assert all(map(torch.equal, first, self.run(module, sizes)))

    def test_from_several_threads_at_once(self, sizes):
        module = pair(sizes=sizes[2:])[0]
        first, results = self.run(module, sizes), [[] for _ in range(4)]
        barrier = threading.Barrier(len(results))

        def work(mine):
            barrier.wait()
            for _ in range(3):
                mine.append(self.run(module, sizes))

        threads = [threading.Thread(target=work, args=(mine,)) for mine in results]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        runs = [run for mine in results for run in mine]
        assert len(runs) == 12
        assert all(all(map(torch.equal, first, run)) for run in runs)

    def test_of_one_graph_from_several_threads_at_once(self, sizes):
        steps, batch, inputs, hidden = sizes
        module = pair(sizes=sizes[2:])[0]
        x, hx = arguments(Setting(), steps, batch, (inputs, hidden))
        loss, leaves = weighted(module(x, hx)[0]), [x, hx, *module.parameters()]
        first, results = grad(loss, leaves, retain_graph=True), []
        work = lambda: results.append(grad(loss, leaves, retain_graph=True))  # noqa: E731
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 4
        assert all(all(map(torch.equal, first, run)) for run in results)
