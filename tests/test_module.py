# SPDX-License-Identifier: Apache-2.0
"""fastrnn.RNN as a module: construction, state, copies, and weights that change between calls.

Each expectation is read off torch.nn.RNN when the test runs. Numbers are compared in float64.
"""

import copy
import enum
import functools
import gc
import inspect
import io
import pickle
import warnings
import weakref

import numpy
import pytest
import torch
from pairs import tensor
from torch.nn.utils import parametrizations, parametrize, prune

import fastrnn
from fastrnn import functional

SIZES = (3, 4)
OPTIONS = {
    "with the defaults": {},
    "with relu": {"nonlinearity": "relu"},
    "with two layers": {"num_layers": 2},
    "without bias": {"num_layers": 2, "bias": False},
    "with both directions": {"bidirectional": True},
    "with batch first": {"batch_first": True},
    "with dropout": {"num_layers": 3, "dropout": 0.25},
    "in float64": {"dtype": torch.float64, "nonlinearity": "relu"},
    "in bfloat16": {"dtype": torch.bfloat16, "num_layers": 2},
    "with every option": {
        "num_layers": 3,
        "nonlinearity": "relu",
        "bias": False,
        "batch_first": True,
        "dropout": 0.5,
        "bidirectional": True,
        "device": "cpu",
        "dtype": torch.float64,
    },
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)


def pair(*sizes, **options):
    """(fastrnn.RNN, torch.nn.RNN) with the same weights, in float64 unless told otherwise."""
    options = {"dtype": torch.float64, **options}
    modules = []
    for cls in (fastrnn.RNN, torch.nn.RNN):
        torch.manual_seed(0)
        modules.append(cls(*(sizes or SIZES), **options))
    return modules


def loss(output, h_n):
    """A scalar in which every element of both results has its own weight."""

    def weigh(t):
        weights = torch.linspace(-1, 1, t.numel(), dtype=t.dtype, device=t.device)
        return (t * weights.view(t.shape)).sum()

    return weigh(tensor(output)) + weigh(h_n)


def run(module, *arguments):
    """Results and the gradients of every parameter, by name."""
    module.zero_grad()
    output, h_n = module(*arguments)
    loss(output, h_n).backward()
    gradients = {name: p.grad for name, p in module.named_parameters()}
    return {"output": tensor(output).detach(), "h_n": h_n.detach(), **gradients}


def sequence(T=5, B=2, I=3):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(T, B, I, dtype=torch.float64, generator=generator)


# Construction


def test_constructor_takes_the_documented_arguments_in_the_documented_order():
    parameters = inspect.signature(fastrnn.RNN).parameters.values()
    assert ", ".join(p.name for p in parameters if p.kind is not p.VAR_KEYWORD) == (
        "input_size, hidden_size, num_layers, nonlinearity, bias, batch_first, dropout, "
        "bidirectional, device, dtype"
    )


def test_device_and_dtype_may_be_positional():
    module = fastrnn.RNN(3, 4, 2, "relu", False, True, 0.5, True, "meta", torch.float64)
    weight = module.weight_hh_l1_reverse
    assert (weight.device.type, weight.dtype) == ("meta", torch.float64)
    assert repr(module) == repr(torch.nn.RNN(3, 4, 2, "relu", False, True, 0.5, True))


class Layers(enum.IntEnum):
    TWO = 2


@pytest.mark.parametrize("two", [numpy.int64(2), Layers.TWO, torch.tensor(2)], ids=repr)
def test_any_integer_is_a_number_of_layers(two):
    ours, theirs = pair(num_layers=two)
    assert repr(ours) == repr(theirs)
    close(run(ours, sequence()), run(theirs, sequence()))


@every_option
def test_attributes_and_repr_equal_those_of_nn_rnn(options):
    ours, theirs = (cls(*SIZES, **options) for cls in (fastrnn.RNN, torch.nn.RNN))
    names = "mode nonlinearity input_size hidden_size num_layers bias batch_first dropout"
    for name in [*names.split(), "bidirectional", "proj_size", "training", "_flat_weights_names"]:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert repr(ours) == repr(theirs)
    assert type(ours.dropout) is float


@every_option
def test_same_seed_gives_same_weights_and_leaves_same_generator_state(options):
    initial = []
    for cls in (fastrnn.RNN, torch.nn.RNN):
        torch.manual_seed(3)
        initial.append((cls(*SIZES, **options), torch.get_rng_state()))
    (ours, our_state), (theirs, their_state) = initial
    names = [name for name, _ in theirs.named_parameters()]
    assert [name for name, _ in ours.named_parameters()] == names
    for name in names:
        torch.testing.assert_close(
            ours.get_parameter(name), theirs.get_parameter(name), rtol=0, atol=0
        )
    assert torch.equal(our_state, their_state)


@every_option
def test_state_dict_loads_strictly_both_ways(options, device):
    ours, theirs = (cls(*SIZES, **options).to(device) for cls in (fastrnn.RNN, torch.nn.RNN))
    assert ours.state_dict()._metadata == theirs.state_dict()._metadata
    for source, target in ((ours, theirs), (theirs, ours)):
        source.reset_parameters()
        target.load_state_dict(source.state_dict(), strict=True)
        assert list(target.state_dict()) == list(source.state_dict())
        for name, value in source.state_dict().items():
            assert torch.equal(target.state_dict()[name], value)


@every_option
def test_all_weights_groups_the_parameters_as_nn_rnn_does(options):
    ours, theirs = (cls(*SIZES, **options) for cls in (fastrnn.RNN, torch.nn.RNN))
    shapes = lambda module: [[w.shape for w in group] for group in module.all_weights]  # noqa: E731
    assert shapes(ours) == shapes(theirs)
    flat = [w for group in ours.all_weights for w in group]
    assert all(a is b for a, b in zip(flat, ours.parameters(), strict=True))


def test_skip_init_builds_the_module_without_drawing():
    before = torch.get_rng_state()
    module = torch.nn.utils.skip_init(fastrnn.RNN, 3, 4, num_layers=2, dtype=torch.float64)
    assert torch.equal(torch.get_rng_state(), before)
    reference = pair(num_layers=2)[1]
    module.load_state_dict(reference.state_dict())
    close(module(sequence())[0], reference(sequence())[0])


def test_dropout_with_one_layer_warns_once_as_nn_rnn_does():
    caught = []
    for cls in (fastrnn.RNN, torch.nn.RNN):
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            cls(3, 4, dropout=0.5)
        caught.append(record)
    (ours,), (theirs,) = caught
    assert (ours.category, str(ours.message)) == (theirs.category, str(theirs.message))


# Copies and moves


def saved_and_loaded(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "pickled": lambda module: pickle.loads(pickle.dumps(module)),
    "deep-copied": copy.deepcopy,
    "saved whole": saved_and_loaded,
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copy_computes_the_same_and_has_weights_of_its_own(duplicate, device):
    module, x = pair(num_layers=2, bidirectional=True)[0].to(device), sequence().to(device)
    expected = run(module, x)
    clone = duplicate(module)
    assert repr(clone) == repr(module)
    assert all(p.device == x.device for p in clone.parameters())
    found = run(clone, x)
    assert all(torch.equal(found[name], right) for name, right in expected.items())
    with torch.no_grad():
        clone.weight_hh_l1.mul_(2)
    assert not torch.equal(clone(x)[0], expected["output"])
    assert torch.equal(module(x)[0], expected["output"])


def test_state_pickled_before_proj_size_existed_still_loads():
    module, _ = pair(num_layers=2)
    state = module.__getstate__()
    weights = module.all_weights
    old = {k: v for k, v in state.items() if k not in ("proj_size", "_all_weights")}
    revived = fastrnn.RNN.__new__(fastrnn.RNN)
    revived.__setstate__({**old, "all_weights": weights, "_all_weights": weights})
    assert revived.proj_size == 0
    close(revived(sequence())[0], module(sequence())[0])


def test_module_is_freed_without_the_cycle_collector():
    module = fastrnn.RNN(*SIZES)
    run(module, sequence().float())
    alive = weakref.ref(module)
    gc.disable()
    try:
        del module
        assert alive() is None
    finally:
        gc.enable()


def test_shared_memory_weights_are_the_ones_used():
    ours, theirs = pair()
    assert ours.share_memory() is ours
    assert all(p.is_shared() for p in ours.parameters())
    close(run(ours, sequence()), run(theirs, sequence()))


@pytest.mark.parametrize("move", ["double", "float", "bfloat16", "half"])
def test_module_moved_to_another_dtype_is_as_accurate_as_nn_rnn(move, device):
    ours, theirs = pair(16, 32, num_layers=2)
    x = sequence(6, 5, 16)
    exact = run(copy.deepcopy(theirs), x)
    values = [
        run(getattr(m.to(device), move)(), getattr(x.to(device), move)()) for m in (ours, theirs)
    ]
    for name, reference in exact.items():
        our_error, their_error = ((v[name].double().cpu() - reference).norm() for v in values)
        assert values[0][name].dtype == values[1][name].dtype
        assert our_error <= 1.5 * their_error + 1e-13 * reference.norm(), name


def test_module_built_on_meta_runs_after_weights_are_assigned():
    reference = pair(num_layers=2)[1]
    with torch.device("meta"):
        module = fastrnn.RNN(*SIZES, num_layers=2, dtype=torch.float64)
    assert module.weight_ih_l0.is_meta
    module.load_state_dict(reference.state_dict(), assign=True)
    close(run(module, sequence()), run(reference, sequence()))


# Weights that change under the module's feet


def drawn(like):
    return torch.randn(like.shape, dtype=like.dtype, generator=torch.Generator().manual_seed(4))


def step_an_optimiser(module):
    optimiser = torch.optim.Adam(module.parameters(), lr=0.1)
    loss(*module(sequence())).backward()
    optimiser.step()


def put_in_place(module, name, value):
    delattr(module, name)
    setattr(module, name, value)


def put_computed_tensor_in_place(module):
    module.root = torch.nn.Parameter(drawn(module.bias_ih_l0))
    put_in_place(module, "weight_hh_l1", module.root.exp().expand(4, 4))


def load_a_vector(module):
    vector = torch.nn.utils.parameters_to_vector(module.parameters())
    torch.nn.utils.vector_to_parameters(drawn(vector), module.parameters())


def scale_weight_norm(module):
    parametrizations.weight_norm(module, "weight_hh_l0")
    module.parametrizations.weight_hh_l0.original0.detach().mul_(3)


def replace_parameter_object(module):
    module(sequence())
    module._parameters["weight_hh_l0"] = torch.nn.Parameter(drawn(module.weight_hh_l0))


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


CHANGES = {
    "data assigned": lambda m: setattr(m.weight_hh_l0, "data", drawn(m.weight_hh_l0)),
    "weight edited in place": lambda m: m.weight_ih_l0.detach().mul_(2),
    "bias edited in place": lambda m: m.bias_hh_l1.detach().add_(1),
    "optimiser stepped": step_an_optimiser,
    "Parameter assigned": lambda m: setattr(
        m, "weight_hh_l0", torch.nn.Parameter(drawn(m.weight_hh_l0))
    ),
    "transposed Parameter assigned": lambda m: setattr(
        m, "weight_hh_l0", torch.nn.Parameter(drawn(m.weight_hh_l0).t())
    ),
    "plain tensor in place": lambda m: put_in_place(m, "weight_hh_l0", drawn(m.weight_hh_l0)),
    "computed expanded tensor in place": put_computed_tensor_in_place,
    "two weights tied": lambda m: setattr(m, "weight_hh_l1", m.weight_hh_l0),
    "weight deleted after an edit": lambda m: (
        m.weight_hh_l0.detach().mul_(2),
        delattr(m, "weight_hh_l0"),
    ),
    "vector_to_parameters": load_a_vector,
    "weight_norm scaled": scale_weight_norm,
    "parametrization registered": lambda m: parametrize.register_parametrization(
        m, "weight_hh_l0", Doubled()
    ),
    "Parameter put among the others": replace_parameter_object,
    "flat weight replaced": lambda m: m._flat_weights.__setitem__(1, drawn(m.weight_hh_l0)),
    "weight pruned": lambda m: prune.l1_unstructured(m, "weight_hh_l1", amount=0.5),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_weights_changed_between_calls_are_seen_at_the_next_call(change):
    after = []
    for module in pair(num_layers=2):
        before = module(sequence())[0]
        change(module)
        after.append(run(module, sequence()))
        assert not torch.allclose(after[-1]["output"], before)
    close(*after)


def test_a_subclass_may_compute_with_other_flat_weights():
    results = []
    for module in pair(num_layers=2):

        class Adapted(type(module)):
            def forward(self, *arguments):
                self._flat_weights = [getattr(self, name) * 2 for name in self._flat_weights_names]
                return super().forward(*arguments)

        module.__class__ = Adapted
        results.append(run(module, sequence()))
    close(*results)


def test_a_replaced_parameter_is_freed():
    module, _ = pair()
    before = weakref.ref(module.weight_hh_l0)
    module._parameters["weight_hh_l0"] = torch.nn.Parameter(drawn(module.weight_hh_l0))
    module(sequence())
    assert before() is None


def test_functional_call_uses_the_given_weights_and_leaves_the_module_alone():
    results = []
    for module in pair(num_layers=2):
        before = module(sequence())[0]
        weights = {name: drawn(p).requires_grad_() for name, p in module.named_parameters()}
        output, h_n = torch.func.functional_call(module, weights, (sequence(),))
        gradients = torch.autograd.grad(loss(output, h_n), list(weights.values()))
        results.append([output, h_n, *gradients])
        assert torch.equal(module(sequence())[0], before)
    close(*results)


def test_averaged_model_computes_with_the_average():
    outputs = []
    for module in pair():
        average = torch.optim.swa_utils.AveragedModel(module)
        average.update_parameters(module)
        average(sequence())
        load_a_vector(module)
        average.update_parameters(module)
        outputs.append(average(sequence())[0])
    close(*outputs)


def test_parameters_that_kernels_read_are_not_moved_into_one_buffer(monkeypatch):
    """On a GPU RNNBase would, at every move, and cannot where one has strange strides."""

    def refuse(module):
        raise AssertionError("the parameters would be copied")

    monkeypatch.setattr(torch.nn.RNNBase, "flatten_parameters", refuse)
    module = fastrnn.RNN(*SIZES).double()
    module.flatten_parameters()
    weights = {name: drawn(p) for name, p in module.named_parameters()}
    torch.func.functional_call(module, weights, (sequence(),))


class OnAGpu(torch.Tensor):
    """Says that it is."""

    is_cuda = True
    device = torch.device("cuda")


@pytest.mark.parametrize(
    "built_for, gpus, capability, flattened",
    [
        ({"cpu", "cuda"}, True, (8, 0), False),
        ({"cpu", "cuda"}, True, (7, 5), True),
        ({"cpu"}, True, (9, 0), True),
        ({"cpu", "cuda"}, False, None, False),  # the tensors are fake
    ],
)
def test_only_what_cudnn_will_compute_is_moved_into_one_buffer(
    built_for, gpus, capability, flattened, monkeypatch
):
    module, calls = fastrnn.RNN(*SIZES), []
    module._flat_weights = [w.detach().as_subclass(OnAGpu) for w in module.parameters()]
    monkeypatch.setattr(torch.nn.RNNBase, "flatten_parameters", lambda m: calls.append(m))
    monkeypatch.setattr(functional, "_FUSED_DEVICES", built_for)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    module.flatten_parameters()
    assert calls == [module] * flattened


def test_flatten_parameters_changes_nothing(device):
    module, x = pair(num_layers=2)[0].to(device), sequence().to(device)
    before, parameters = run(module, x), list(module.parameters())
    addresses = [p.data_ptr() for p in parameters]
    assert module.flatten_parameters() is None
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
    assert [p.data_ptr() for p in parameters] == addresses
    close(run(module, x), before)
