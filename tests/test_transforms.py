# SPDX-License-Identifier: Apache-2.0
"""fastrnn.RNN under compilers, exporters, tracers, functional transforms and forward-mode AD.

Contract: what it computes there is what it computes eagerly, and what torch.nn.RNN computes where
nn.RNN can be asked; a compiled graph keeps one node of ours, an exported one needs no package.
"""

import io
from collections.abc import Sequence

import pytest
import torch
from pairs import B, I, Setting, T, arguments, draw, of_both, pair, same, weighted
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad, gradcheck
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from fastrnn.functional import rnn, takes_fused_path

SETTINGS = [
    Setting("tanh", 1, False),
    Setting("relu", 2, True),
    Setting("tanh", 2, True, False),
    Setting("tanh", 2, True, batch_first=True),
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Tagger(torch.nn.Module):
    """A model around the layer, with something to fuse before and behind it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        width = layer.hidden_size * (1 + layer.bidirectional)
        self.head = torch.nn.Linear(width, 2, dtype=torch.float64)

    def forward(self, x, hx=None):
        output, h_n = self.layer(x * 2, hx)
        return self.head(output.relu()), h_n + 1


def tagger(setting=Setting()):  # noqa: B008 - immutable
    layer = pair(setting)[0]
    torch.manual_seed(1)
    return Tagger(layer)


def step(call, model, x, hx=None):
    """Results and gradients of one training step."""
    y, h = call(x) if hx is None else call(x, hx)
    leaves = [x, *([] if hx is None else [hx]), *model.parameters()]
    return [y, h, *torch.autograd.grad(weighted(y) + weighted(h), leaves)]


class TestCompile:
    @pytest.mark.parametrize("has_hx", [False, True])
    @pytest.mark.parametrize("setting", SETTINGS, ids=str)
    def test_a_model_is_one_graph_and_gives_the_eager_results(self, setting, has_hx):
        model, (x, hx) = tagger(setting), arguments(setting)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        given = (x, hx) if has_hx else (x,)
        same(step(compiled, model, *given), step(model, model, *given))
        assert counter.frame_count == 1
        targets = [str(node.target) for g in counter.graphs for node in g.graph.nodes]
        assert sum(target.startswith("fastrnn.") for target in targets) == 1

    def test_inductor_gives_the_eager_results(self):
        model, (x, hx) = tagger(), arguments()
        compiled = torch.compile(model, fullgraph=True)
        same(step(compiled, model, x, hx), step(model, model, x, hx))

    def test_one_dynamic_graph_serves_other_lengths_and_batches(self):
        model = tagger()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
        counts = []
        # No length or batch equals a size of the weights, which are static: equal sizes are one.
        for steps, batch in [(5, 7), (8, 9), (12, 11), (10, 5)]:
            given = arguments(Setting(), steps, batch)
            same(step(compiled, model, *given), step(model, model, *given))
            counts.append(counter.frame_count)
        assert len(set(counts)) == 1

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_without_gradients(self, mode):
        model, (x, hx) = tagger().eval(), arguments()
        with mode():
            same(torch.compile(model, backend="aot_eager", fullgraph=True)(x, hx), model(x, hx))

    def test_an_unbatched_sequence(self):
        model, x = tagger(), draw(T, I)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        same(step(compiled, model, x), step(model, model, x))

    def test_a_packed_batch_of_the_operator(self):
        """With hx: nothing else says how many sequences there are before the graph runs."""
        weights, (x, hx) = list(pair()[0].parameters()), arguments()

        def call(x, hx, batch_sizes):
            return torch.ops.fastrnn.rnn(
                x * 2, hx, weights, batch_sizes, "tanh", True, 2, True, False
            )

        given = x.detach().view(-1, I), hx, torch.tensor([2, 2, 1, 1])
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        same(compiled(*given), call(*given))

    def test_a_packed_sequence_works_with_graph_breaks(self):
        module, (x, _) = pair()[0], arguments()
        packed = PackedSequence(x.detach().view(-1, I), torch.tensor([2, 2, 1, 1]))
        output, h_n = torch.compile(module, backend="aot_eager")(packed)
        expected, state = module(packed)
        same([output.data, h_n], [expected.data, state])

    def test_under_autocast(self):
        module, x = pair()[0].float(), draw(T, B, I).float()
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        with torch.autocast("cpu", torch.bfloat16):
            results, expected = compiled(x), module(x)
        assert all(r.dtype == torch.bfloat16 for r in results)
        assert all(map(torch.equal, results, expected))

    @pytest.mark.parametrize("place", ["cpu", "meta"])
    def test_under_a_default_device(self, place):
        model, given = tagger(), arguments()
        counter = CompileCounterWithBackend("aot_eager")
        with torch.device(place):
            results = torch.compile(model, backend=counter, fullgraph=True)(*given)
        same(results, model(*given))
        targets = [str(node.target) for g in counter.graphs for node in g.graph.nodes]
        assert sum(target.startswith("fastrnn.") for target in targets) == 1

    def test_a_packed_batch_with_dropout_is_one_graph(self):
        weights, (x, hx) = list(pair()[0].parameters()), arguments()

        def call(x, hx, batch_sizes):
            output, h_n = rnn(
                PackedSequence(x, batch_sizes), weights, hx, num_layers=2, bidirectional=True,
                dropout=0.5, training=True,
            )  # fmt: skip
            return output.data, h_n

        given = x.detach().view(-1, I), hx, torch.tensor([2, 2, 1, 1])
        compiled = torch.compile(call, backend="eager", fullgraph=True)
        answers = []
        for function in (compiled, call):
            torch.manual_seed(0)
            answers.append(function(*given))
        same(*answers)

    def test_compiled_autograd_gives_the_eager_gradients(self):
        model, (x, hx) = tagger(), arguments()
        expected = step(model, model, x, hx)[2:]
        compiler = torch.compile(backend="eager", fullgraph=True)
        y, h = model(x, hx)
        with torch._dynamo.compiled_autograd._enable(compiler):
            (weighted(y) + weighted(h)).backward()
        same([leaf.grad for leaf in (x, hx, *model.parameters())], expected)

    @pytest.mark.skipif(
        not hasattr(torch._dynamo.config, "allow_rnn"), reason="this torch has no such switch"
    )
    @pytest.mark.parametrize("allow_rnn", [False, True])
    def test_the_switch_for_stock_rnns_does_not_matter(self, allow_rnn):
        model, given = tagger(), arguments()
        with torch._dynamo.config.patch(allow_rnn=allow_rnn):
            compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
            same(step(compiled, model, *given), step(model, model, *given))


class TestExport:
    @pytest.mark.parametrize("strict", [False, True])
    @pytest.mark.parametrize("setting", SETTINGS, ids=str)
    def test_a_program_holds_pytorchs_own_operators(self, setting, strict):
        model, given = tagger(setting).eval(), arguments(setting)
        given = tuple(t.detach() for t in given)
        program = torch.export.export(model, given, strict=strict)
        targets = {str(node.target) for node in program.graph.nodes}
        assert not any("fastrnn" in target for target in targets)
        assert (
            f"aten.rnn_{setting.nonlinearity}.input" in targets or "aten.addmm.default" in targets
        )
        same(program.module()(*given), model(*given))

    def test_a_program_survives_decomposition_and_saving(self):
        model, given = tagger().eval(), tuple(t.detach() for t in arguments())
        program = torch.export.export(model, given).run_decompositions()
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        same(torch.export.load(file).module()(*given), model(*given))

    def test_a_program_with_a_dynamic_batch(self):
        model, given = tagger().eval(), tuple(t.detach() for t in arguments())
        batch = torch.export.Dim("batch", min=1)
        shapes = {"x": {1: batch}, "hx": {1: batch}}
        program = torch.export.export(model, given, dynamic_shapes=shapes)
        for size in (2, 5):
            given = tuple(t.detach() for t in arguments(batch=size))
            same(program.module()(*given), model(*given))


class TestTrace:
    def reload(self, traced):
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        return torch.jit.load(file)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
    @pytest.mark.parametrize("setting", SETTINGS, ids=str)
    def test_a_traced_module_serves_other_lengths_and_batches(self, setting):
        module = pair(setting)[0]
        traced = torch.jit.trace(module, arguments(setting))
        for call in (traced, self.reload(traced)):
            for steps, batch in [(3, 2), (8, 5)]:
                given = arguments(setting, steps, batch)
                same(call(*given), module(*given))

    def test_make_fx_sees_the_same_numbers(self):
        module, given = pair()[0], arguments()
        call = lambda x, hx: torch.autograd.grad(weighted(module(x, hx)[0]), (x, hx))  # noqa: E731
        same(make_fx(call)(*given)(*given), call(*given))


def loss_of(module):
    """A scalar of (parameters, x, hx), for the transforms of torch.func."""

    def loss(parameters, x, hx):
        output, h_n = functional_call(module, parameters, (x, hx))
        return weighted(output) + weighted(h_n).sin()

    return loss


def plain(module, setting):
    parameters = {k: p.detach() for k, p in module.named_parameters()}
    return parameters, *(t.detach() for t in arguments(setting))


def leaves(tree):
    return torch.utils._pytree.tree_leaves(tree)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
class TestFunctionalTransforms:
    @pytest.mark.parametrize("argument", [0, 1, 2], ids=["parameters", "input", "hx"])
    @pytest.mark.parametrize("name", ["grad", "jacrev", "jacfwd"])
    def test_first_derivatives(self, setting, name, argument):
        transform = getattr(torch.func, name)

        def compute(module, x, hx):
            return leaves(transform(loss_of(module), argument)(*plain(module, setting)))

        of_both(compute, setting)

    def test_the_hessian(self, setting):
        def compute(module, x, hx):
            return leaves(torch.func.hessian(loss_of(module), (1, 2))(*plain(module, setting)))

        of_both(compute, setting)

    @pytest.mark.parametrize("name", ["jacrev", "jacfwd"])
    def test_jacobians_of_the_results(self, setting, name):
        def compute(module, x, hx):
            _, x, hx = plain(module, setting)
            return leaves(getattr(torch.func, name)(module, (0, 1))(x, hx))

        of_both(compute, setting)

    def test_products_with_vectors_from_the_left(self, setting):
        def compute(module, x, hx):
            arguments = plain(module, setting)
            results, pull = torch.func.vjp(
                lambda p, x, hx: functional_call(module, p, (x, hx)), *arguments
            )
            return leaves((results, pull(tuple(r.detach().cos() for r in results))))

        of_both(compute, setting)

    @pytest.mark.parametrize("name", ["jvp", "linearize"])
    def test_products_with_vectors_from_the_right(self, setting, name):
        def compute(module, x, hx):
            arguments = plain(module, setting)
            tangents = torch.utils._pytree.tree_map(torch.cos, arguments)
            call = lambda p, x, hx: functional_call(module, p, (x, hx))  # noqa: E731
            if name == "jvp":
                return leaves(torch.func.jvp(call, arguments, tangents))
            results, push = torch.func.linearize(call, *arguments)
            return leaves((results, push(*tangents)))

        of_both(compute, setting)

    def test_functional_call_uses_the_given_weights(self, setting):
        def compute(module, x, hx):
            given = {k: (p * 2).detach() for k, p in module.named_parameters()}
            return [*functional_call(module, given, (x, hx)), *module(x, hx)]

        of_both(compute, setting)

    def test_forward_mode_tangents(self, setting):
        def compute(module, x, hx):
            tangents = []
            for name, given in {"x": x, "hx": hx, **dict(module.named_parameters())}.items():
                with forward_ad.dual_level(), torch.no_grad():
                    dual = forward_ad.make_dual(given.detach(), given.detach().cos())
                    replaced = {name: dual} if name not in ("x", "hx") else {}
                    state = [dual if name == "x" else x, dual if name == "hx" else hx]
                    results = functional_call(module, replaced, tuple(state))
                    tangents += [forward_ad.unpack_dual(r).tangent for r in results]
            assert sum(t is not None for t in tangents) > len(tangents) // 2
            return tangents

        of_both(compute, setting)

    def test_forward_mode_inside_a_compiled_function(self, setting):
        def compute(module, x, hx):
            @torch.compile(backend="eager")
            def tangent(x):
                with forward_ad.dual_level():
                    dual = forward_ad.make_dual(x, x.cos())
                    return forward_ad.unpack_dual(module(dual, hx)[0]).tangent

            return [tangent(x.detach())]

        of_both(compute, setting)

    def test_forward_over_reverse(self, setting):
        def compute(module, x, hx):
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(x, x.detach().cos())
                slopes = torch.autograd.grad(
                    weighted(module(dual, hx)[0]), [hx, *module.parameters()]
                )
                return [forward_ad.unpack_dual(s).tangent for s in slopes]

        of_both(compute, setting)


def test_forward_mode_agrees_with_finite_differences():
    module, given = pair(Setting(num_layers=1))[0], arguments(Setting(num_layers=1))
    call = lambda x, hx, *flat: rnn(x, list(flat), hx, bidirectional=True)  # noqa: E731
    inputs = (*given, *module.parameters())
    assert gradcheck(call, inputs, check_forward_ad=True, check_batched_forward_grad=False)


@pytest.mark.parametrize("who", ["input", "hx", "weight"])
def test_the_bare_operator_refuses_dual_tensors(who):
    """Losing a tangent silently is the one thing it must not do."""
    module, (x, hx) = pair()[0], arguments()
    weights = list(module.parameters())
    with forward_ad.dual_level():
        dual = {"input": x, "hx": hx, "weight": weights[5]}[who].detach()
        dual = forward_ad.make_dual(dual, torch.ones_like(dual))
        given = dual if who == "input" else x
        flat = [*weights[:5], dual, *weights[6:]] if who == "weight" else weights
        state = dual if who == "hx" else hx
        with pytest.raises(RuntimeError, match=r"(?i)forward.?(mode|AD)|jvp|dual"):
            torch.ops.fastrnn.rnn(given, state, flat, None, "tanh", True, 2, True, False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_the_fused_path_is_for_ordinary_tensors_only():
    module = pair()[0].requires_grad_(False)
    x, hx = (t.detach() for t in arguments())
    weights, seen = list(module.parameters()), []
    assert takes_fused_path(x, weights, hx)

    def look(x):
        seen.append(takes_fused_path(x, weights, hx))
        return module(x, hx)[0].sum()

    torch.func.grad(look)(x)
    torch.func.jvp(look, (x,), (x,))
    torch.jit.trace(look, (x,), check_trace=False)
    with forward_ad.dual_level():
        look(forward_ad.make_dual(x, x))
    for kind in ("meta", torch.complex128):
        seen.append(takes_fused_path(x.to(kind), [w.to(kind) for w in weights], hx.to(kind)))
    assert len(seen) >= 6 and not any(seen)


def test_a_packed_sequence_takes_the_path_of_its_data():
    module, x = pair()[0], pack_sequence([draw(n, I) for n in (4, 2)])
    weights = list(module.parameters())
    assert takes_fused_path(x, weights, None)
    assert not takes_fused_path(x.to("meta"), [w.to("meta") for w in weights], None)


def test_weights_may_come_from_a_sequence_that_makes_them_when_asked():
    class Anew(Sequence):
        def __len__(self):
            return len(weights)

        def __getitem__(self, i):
            return weights[i].clone()

    module, (x, hx) = pair()[0], arguments()
    with torch.no_grad():
        weights = list(module.parameters())
        assert takes_fused_path(x, Anew(), hx)
        results = rnn(x, Anew(), hx, num_layers=2, bidirectional=True)
    same(results, module(x, hx))
