# SPDX-License-Identifier: Apache-2.0
"""fastrnn.RNN inside the rest of PyTorch: operator checks, autocast, fake and meta tensors, tools.

Contract: torch.library.opcheck for the operators; for the rest torch.nn.RNN in the same place.
Compilers, exporters and functional transforms have a file of their own, test_transforms.py.
"""

import copy
from contextlib import contextmanager, nullcontext

import pytest
import torch
from cross import crossed
from pairs import H, I, Setting, arguments, draw, our_call, pair, same, weighted
from test_capabilities import run_python
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.testing._internal.common_modules import module_db
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

import fastrnn
from fastrnn import testing
from fastrnn.functional import takes_fused_path

MODES = [Setting(*f) for f in [("tanh", 1, False), ("relu", 2, True), ("tanh", 2, True, False)]]


def sample(setting, form, requires_grad, dtype=torch.float32):
    """Arguments of torch.ops.fastrnn.rnn: input, hx, weights, batch_sizes and the setting."""
    x, hx = (t.detach() for t in arguments(setting, steps=3, batch=2))
    module = pair(setting)[0].to(dtype)
    weights = [p.detach().requires_grad_(requires_grad) for p in module.parameters()]
    packed = form == "packed"
    x = x.reshape(-1, x.shape[-1]) if packed else x
    x, hx = (t.to(dtype).requires_grad_(requires_grad) for t in (x, hx))
    batch_sizes = torch.tensor([2, 2, 1, 1]) if packed else None
    shared = (setting.nonlinearity, setting.bias, setting.num_layers, setting.bidirectional)
    return x, None if form == "no hx" else hx, weights, batch_sizes, shared


class TestOperators:
    """Schema, aliasing, autograd, fake kernel and tracing, as torch.library judges them."""

    @pytest.mark.parametrize(
        "setting, form, requires_grad",
        crossed(MODES, ["padded", "batch_first", "packed", "no hx"], [True, False]),
    )
    def test_rnn(self, setting, form, requires_grad):
        batch_first = form == "batch_first"
        sampled = setting._replace(batch_first=batch_first)
        x, hx, weights, batch_sizes, shared = sample(sampled, form, requires_grad)
        torch.library.opcheck(
            torch.ops.fastrnn.rnn.default, (x, hx, weights, batch_sizes, *shared, batch_first)
        )

    @pytest.mark.parametrize("form", ["padded", "batch_first", "packed", "no hx"])
    def test_check_arguments(self, form):
        batch_first = form == "batch_first"
        sampled = MODES[1]._replace(batch_first=batch_first)
        x, hx, weights, batch_sizes, shared = sample(sampled, form, False)
        torch.library.opcheck(
            torch.ops.fastrnn.check_arguments.default,
            (x, hx, weights, batch_sizes, *shared, batch_first),
        )

    @pytest.mark.parametrize(
        "setting, form, keep", crossed(MODES, ["padded", "packed", "no hx"], [False, True])
    )
    def test_rnn_forward(self, setting, form, keep):
        x, hx, weights, batch_sizes, shared = sample(setting, form, False)
        torch.library.opcheck(
            torch.ops.fastrnn.rnn_forward.default, (x, hx, weights, batch_sizes, *shared, keep)
        )

    def check_backward(self, sampled, slopes="both", needs="all"):
        x, hx, weights, batch_sizes, shared = sampled
        output, h_n, kept = torch.ops.fastrnn.rnn_forward(
            x, hx, weights, batch_sizes, *shared, True
        )
        wanted = [needs == "all" or (needs == "odd" and i % 2) for i in range(2 + len(weights))]
        wanted[1] = wanted[1] and hx is not None
        d_output = torch.ones_like(output) if slopes != "h_n" else None
        d_h_n = torch.ones_like(h_n) if slopes != "output" else None
        torch.library.opcheck(
            torch.ops.fastrnn.rnn_backward.default,
            (d_output, d_h_n, x, hx, weights, batch_sizes, kept, *shared, [*map(bool, wanted)]),
        )

    @pytest.mark.parametrize("form", ["padded", "packed", "no hx"])
    @pytest.mark.parametrize("setting", MODES, ids=str)
    def test_rnn_backward(self, setting, form):
        self.check_backward(sample(setting, form, False))

    @pytest.mark.parametrize("form", ["batch_first", "unbatched"])
    def test_forward_and_backward_in_the_callers_layout(self, form):
        x, hx, weights, _, shared = sample(MODES[1], "padded", False)
        if form == "unbatched":
            x, hx = x[:, 0], hx[:, 0]
        else:
            x = x.transpose(0, 1).contiguous()
        forward = (x, hx, weights, None, *shared, True, True)
        torch.library.opcheck(torch.ops.fastrnn.rnn_forward.default, forward)
        output, h_n, kept = torch.ops.fastrnn.rnn_forward(*forward)
        assert (output.shape[:-1], h_n.shape) == (x.shape[:-1], hx.shape)
        needs = [True] * (2 + len(weights))
        torch.library.opcheck(
            torch.ops.fastrnn.rnn_backward.default,
            (output, h_n, x, hx, weights, None, kept, *shared, needs, True),
        )

    @pytest.mark.parametrize(
        "options",
        [{"slopes": "h_n"}, {"slopes": "output"}, {"needs": "odd"}, {"needs": "none"}],
        ids=str,
    )
    def test_rnn_backward_of_a_part(self, options):
        self.check_backward(sample(Setting(), "padded", False), **options)

    def test_an_unwanted_gradient_is_none_or_has_no_elements(self):
        x, hx, weights, _, shared = sample(MODES[1], "padded", False)
        output, h_n, kept = torch.ops.fastrnn.rnn_forward(x, hx, weights, None, *shared, True)
        nothing = [False] * (2 + len(weights))
        d_input, d_hx, d_weights = torch.ops.fastrnn.rnn_backward(
            output, h_n, x, hx, weights, None, kept, *shared, nothing
        )
        assert d_input is None and d_hx is None
        assert sum(d.numel() for d in d_weights) == 0

    def test_results_share_no_memory(self):
        x, hx, weights, _, shared = sample(MODES[1], "padded", False)
        output, h_n, kept = torch.ops.fastrnn.rnn_forward(x, hx, weights, None, *shared, True)
        tensors = [x, hx, *weights, output, h_n, *kept]
        assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)


def stock_entry():
    return next(entry for entry in module_db if entry.module_cls is torch.nn.RNN)


class TestPyTorchsOwnSamples:
    """The samples with which PyTorch tests nn.RNN, run through both classes."""

    def inputs(self, dtype, requires_grad, training):
        entry = stock_entry()
        for packed in (False, True):
            yield from entry.module_inputs_func(
                entry, "cpu", dtype, requires_grad, training, with_packed_sequence=packed
            )

    def run(self, module, sample):
        """Results and gradients, by name, in the module's dtype."""
        dtype = next(module.parameters()).dtype
        args = [
            arg.detach().to(dtype).requires_grad_(arg.requires_grad)
            if isinstance(arg, torch.Tensor)
            else arg.to(dtype)
            for arg in copy.deepcopy(sample.forward_input.args)
        ]
        output, h_n = module(*args, **sample.forward_input.kwargs)
        data = output.data if isinstance(output, PackedSequence) else output
        leaves = [a.data if isinstance(a, PackedSequence) else a for a in args]
        wanted = [*(leaf for leaf in leaves if leaf.requires_grad), *module.parameters()]
        slopes = torch.autograd.grad(data.sin().sum() + h_n.cos().sum(), wanted)
        results = {"output": data, "h_n": h_n} | {str(i): slope for i, slope in enumerate(slopes)}
        return {name: result.detach().double() for name, result in results.items()}

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("requires_grad", [False, True])
    @pytest.mark.parametrize("training", [False, True])
    def test_give_what_nn_rnn_gives(self, dtype, requires_grad, training):
        torch.manual_seed(0)
        errors = []  # of ours and of theirs
        for sample in self.inputs(dtype, requires_grad, training):
            given = sample.constructor_input
            theirs = torch.nn.RNN(*given.args, **given.kwargs, dtype=dtype).train(training)
            ours = fastrnn.RNN(*given.args, **given.kwargs, dtype=dtype).train(training)
            ours.load_state_dict(theirs.state_dict())
            exact = self.run(copy.deepcopy(theirs).double(), sample)
            results = [testing.grouped(self.run(module, sample)) for module in (ours, theirs)]
            for name, right in testing.grouped(exact).items():
                errors.append([testing.relative_error(each[name], right) for each in results])
        errors = torch.tensor(errors)
        assert len(errors) > 64
        # Each by itself is chance, in samples of so few numbers.
        assert errors[:, 0].max() < (1e-4 if dtype is torch.float32 else testing.FLOAT64_DIFFERENCE)
        if dtype is torch.float32:
            of_ours, of_theirs = errors.clamp(min=torch.finfo(dtype).eps).log().mean(0).exp()
            assert of_ours < testing.ERROR_RATIO * of_theirs

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_are_refused_where_nn_rnn_refuses(self, dtype):
        entry = stock_entry()
        refused = entry.module_error_inputs_func(entry, "cpu", dtype, False, True)
        assert len(refused) > 5
        for sample in refused:
            made, given = (
                sample.module_error_input.constructor_input,
                sample.module_error_input.forward_input,
            )
            with pytest.raises(sample.error_type, match=sample.error_regex):
                fastrnn.RNN(*made.args, **made.kwargs)(*given.args, **given.kwargs)


class TestAutocast:
    @pytest.mark.parametrize(
        "setting, form, dtype",
        crossed(
            MODES,
            ["padded", "batch_first", "packed", "low precision input"],
            [torch.bfloat16, torch.float16],
        ),
    )
    def test_results_are_low_and_gradients_are_float32(self, setting, form, dtype):
        """Against a float64 run: no further from it than twice nn.RNN under the same autocast."""
        setting = setting._replace(batch_first=form == "batch_first")
        (ours, theirs), exact = pair(setting), pair(setting)[1]
        answers = []
        for module, region in ((ours.float(), True), (theirs.float(), True), (exact, False)):
            high = torch.float32 if region else torch.float64
            x, hx = (t.detach().to(dtype).to(high) for t in arguments(setting))
            x = (x.to(dtype) if region and form == "low precision input" else x).requires_grad_()
            if form == "packed":
                given = PackedSequence(x.view(-1, I), torch.tensor([2, 2, 1, 1]))
            else:
                given = x
            with torch.autocast("cpu", dtype, enabled=region):
                output, h_n = module(given, hx.to(x.dtype))
            data = output.data if form == "packed" else output
            loss = weighted(data.double()) + weighted(h_n.double())
            slopes = torch.autograd.grad(loss, [x, *module.parameters()])
            if region:
                assert data.dtype == h_n.dtype == dtype
                assert [s.dtype for s in slopes] == [x.dtype] + [torch.float32] * (len(slopes) - 1)
            answers.append([data, h_n, *slopes])
        for ours, theirs, exact in zip(*answers, strict=True):
            error = (ours.double() - exact).norm()
            rounding = torch.finfo(dtype).eps * exact.norm()
            assert error <= 2 * (theirs.double() - exact).norm() + rounding

    def test_float64_stays_float64(self, device):
        module, x, hx = our_call(device)
        with torch.autocast(device.type, torch.bfloat16):
            results = module(x, hx)
        assert all(r.dtype == torch.float64 for r in results)
        same(results, pair()[1](*arguments()))

    def test_a_float64_input_to_a_float32_module_is_an_error(self):
        """nn.RNN leaves the complaint to addmm, a RuntimeError; saying it earlier is allowed."""
        for module in pair():
            region = torch.autocast("cpu", torch.bfloat16)
            with region, pytest.raises((RuntimeError, ValueError), match="dtype"):
                module.float()(arguments()[0])

    def test_dropout_drops_where_weights_of_two_dtypes_are_cast_to_one(self):
        module, x = pair(dropout=1.0)[0].float(), draw(3, 2, I).float()
        module.bias_hh_l1.data = module.bias_hh_l1.data.bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(module(x)[0], module(-x)[0])
            module.eval()
            assert not torch.equal(module(x)[0], module(-x)[0])

    def test_a_disabled_region_inside_computes_in_float32(self, device):
        module, x = pair()[0].to(device).float(), draw(3, 2, 2, device=device).float()
        region = torch.autocast(device.type, torch.bfloat16)
        with region, torch.autocast(device.type, enabled=False):
            inside = module(x)
        assert all(map(torch.equal, inside, module(x)))


class TestTensorsWithoutNumbers:
    @pytest.mark.parametrize("setting", MODES, ids=str)
    def test_meta_results_have_the_real_shapes(self, setting):
        for module in pair(setting):
            x, hx = arguments(setting)
            real = module(x, hx)
            meta = module.to("meta")(x.detach().to("meta"), hx.detach().to("meta"))
            for a, b in zip(meta, real, strict=True):
                assert a.device.type == "meta"
                assert (a.shape, a.dtype, a.requires_grad) == (b.shape, b.dtype, b.requires_grad)

    @pytest.mark.parametrize("batch_first", [False, True])
    def test_fake_results_and_gradients_have_the_real_layouts(self, batch_first):
        setting = Setting(batch_first=batch_first)
        module, (x, hx) = pair(setting)[0], arguments(setting)
        real = module(x, hx)
        plain = [x.detach(), hx.detach()]
        with FakeTensorMode() as mode:
            fake_module = fastrnn.RNN(I, H, dtype=torch.float64, **setting._asdict())
            fakes = [mode.from_tensor(t).requires_grad_() for t in plain]
            results = fake_module(*fakes)
            (results[0].sum() + results[1].sum()).backward()
        for fake, true in zip(results, real, strict=True):
            assert (fake.shape, fake.stride(), fake.dtype) == (
                true.shape,
                true.stride(),
                true.dtype,
            )
        for leaf in (*fakes, *fake_module.parameters()):
            assert leaf.grad.shape == leaf.shape


class Labelled(torch.Tensor):
    """A subclass by __torch_function__ alone: every result is of the class again."""


class Wrapped(torch.Tensor):
    """A subclass by __torch_dispatch__ alone, that knows ATen's operators, as DTensor does."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, requires_grad=inner.requires_grad
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        assert func.namespace == "aten"
        unwrapped = tree_map_only(cls, lambda t: t.inner, (args, kwargs or {}))
        return tree_map_only(torch.Tensor, cls, func(*unwrapped[0], **unwrapped[1]))


class Spy(torch.overrides.TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class TestOverrides:
    @pytest.mark.parametrize("batch_first", [False, True])
    def test_a_tensor_subclass_comes_back(self, batch_first):
        setting = Setting(batch_first=batch_first)
        module, reference = pair(setting)
        x, hx = arguments(setting)
        results = module(x.detach().as_subclass(Labelled), hx)
        assert all(type(r) is Labelled for r in results)
        same([r.as_subclass(torch.Tensor) for r in results], reference(x, hx))

    def test_a_subclass_as_hx_comes_back(self):
        x, hx = arguments()
        results = pair()[0](x, hx.detach().as_subclass(Labelled))
        assert all(type(r) is Labelled for r in results)

    @pytest.mark.parametrize("who", ["input", "hx", "weights"])
    def test_a_subclass_may_know_atens_operators_alone(self, who):
        results = []
        for module in pair():
            given = dict(zip(("input", "hx"), (t.detach() for t in arguments()), strict=True))
            if who == "weights":
                for name, p in list(module.named_parameters()):
                    setattr(module, name, torch.nn.Parameter(Wrapped(p.detach())))
            else:
                given[who] = Wrapped(given[who])
            results.append(module(**given))
        assert [type(r) for r in results[0]] == [type(r) for r in results[1]]
        same(*tree_map_only(Wrapped, lambda t: t.inner, results))

    def test_a_function_mode_sees_the_operator_of_nn_rnn(self):
        module, (x, hx) = pair()[0], arguments()
        with Spy() as spy:
            results = module(x, hx)
        assert torch._VF.rnn_tanh in spy.seen or torch.rnn_tanh in spy.seen
        same(results, module(x, hx))


@contextmanager
def default_device_set(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("place", ["cpu", "meta"])
@pytest.mark.parametrize("region", [torch.device, default_device_set], ids=["region", "setting"])
class TestADefaultDevice:
    """It is a function mode too, but one that looks only at calls that make tensors."""

    def test_leaves_the_fused_path_on(self, region, place):
        module, (x, hx) = pair()[0], arguments()
        with region(place):
            assert takes_fused_path(x, list(module.parameters()), hx)

    @pytest.mark.parametrize("has_hx", [False, True])
    def test_changes_no_result(self, region, place, has_hx):
        (module, reference), (x, hx) = pair(), arguments()
        given = (x, hx) if has_hx else (x,)
        with region(place):
            results = module(*given)
        same(results, reference(*given))

    def test_changes_no_draw_for_packed_sequences(self, region, place):
        packed = pack_sequence([draw(2, I), draw(3, I, seed=1)], enforce_sorted=False)
        answers = []
        for module, around in zip(pair(dropout=0.5), (region(place), nullcontext()), strict=True):
            torch.manual_seed(0)
            with around:
                output, h_n = module(packed)
            answers.append((output.data, h_n))
        same(*answers)

    def test_hides_no_tensor_subclass(self, region, place):
        module, (x, hx) = pair()[0], arguments()
        with region(place):
            results = module(x.detach().as_subclass(Labelled), hx)
        assert all(type(r) is Labelled for r in results)

    def test_hides_no_other_function_mode(self, region, place):
        module, given = pair()[0], arguments()
        with region(place), Spy() as spy:
            module(*given)
        assert torch._VF.rnn_tanh in spy.seen or torch.rnn_tanh in spy.seen


#: On one thread: the OpenMP runtime has no others to offer after a fork.
TRAIN_IN_A_FORKED_CHILD = """
import torch
import fastrnn.testing

context = torch.multiprocessing.get_context("fork")
module, x = fastrnn.RNN(32, 64, 2).double(), torch.randn(16, 24, 32, dtype=torch.float64)
module(x)[0].sum().backward()
receive, send = context.Pipe(duplex=False)

def train():
    torch.set_num_threads(1)
    module.zero_grad()
    module(x)[0].sum().backward()
    send.send([p.grad.tolist() for p in module.parameters()])

child = context.Process(target=train, daemon=True)
child.start()
try:
    assert receive.poll(30), "the child hangs"
    there = [torch.tensor(g, dtype=torch.float64) for g in receive.recv()]
finally:
    child.kill()
for found, right in zip(there, [p.grad for p in module.parameters()], strict=True):
    assert (found - right).norm() <= fastrnn.testing.FLOAT64_DIFFERENCE * right.norm()
"""


class TestTools:
    def test_the_flop_counter_counts_the_products(self):
        counts = []
        for module in pair():
            x, hx = arguments()
            with FlopCounterMode(display=False) as counter:
                module(x, hx)[0].sum().backward()
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1] > 0

    def test_the_profiler_names_the_operator(self):
        module, (x, hx) = pair()[0], arguments()
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
            module(x, hx)[0].sum().backward()
        names = {event.key for event in profile.key_averages()}
        assert any(n.startswith("fastrnn::") for n in names)
        assert any("rnn" in n.lower() and "backward" in n.lower() for n in names)

    def test_deterministic_algorithms_can_be_demanded(self):
        module, (x, hx) = pair()[0], arguments()
        torch.use_deterministic_algorithms(True)
        try:
            first, second = module(x, hx), module(x, hx)
        finally:
            torch.use_deterministic_algorithms(False)
        assert all(map(torch.equal, first, second))

    def test_a_forked_child_computes_the_same_bits(self):
        """As a DataLoader worker does: fork after the parent has used its threads."""
        module = fastrnn.RNN(32, 64, 2)
        dataset = [draw(16, 24, 32, seed=i, requires_grad=False).float() for i in range(3)]
        with torch.no_grad():
            here = [module(x)[0] for x in dataset]
            loader = torch.utils.data.DataLoader(
                dataset,
                batch_size=None,
                num_workers=1,
                multiprocessing_context="fork",
                collate_fn=lambda x: module(x)[0].detach(),
                timeout=30,
            )
            there = list(loader)
        assert len(here) == len(there) == 3
        assert all(map(torch.equal, here, there))

    def test_a_forked_child_can_train(self):
        """In a process of its own: what other tests have done may keep PyTorch from it."""
        process = run_python(TRAIN_IN_A_FORKED_CHILD, OMP_NUM_THREADS="2")
        assert process.returncode == 0, process.stderr
