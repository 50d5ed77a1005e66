# SPDX-License-Identifier: Apache-2.0
"""The README's example, and the differences from nn.RNN that docs/differences.md names."""

import copy
import io
import pickle
import re
from pathlib import Path

import pytest
import torch
from pairs import B, I, Setting, T, arguments, draw, pair

import fastrnn

README = Path(__file__).resolve().parents[1] / "README.md"
BOTH = [torch.nn.RNN, fastrnn.RNN]


def test_the_examples_run_and_give_the_shapes_they_name():
    text = README.read_text(encoding="utf-8")
    code = "".join(re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    names = {}
    exec(code, names)
    assert f"# {tuple(names['output'].shape)}, {tuple(names['h_n'].shape)}\n" in code


def test_an_instance_is_an_rnn_base_and_no_nn_rnn():
    ours, _ = pair()
    assert isinstance(ours, torch.nn.RNNBase) and not isinstance(ours, torch.nn.RNN)


def test_script_is_refused():
    ours, theirs = pair()
    torch.jit.script(theirs)
    with pytest.raises(RuntimeError):
        torch.jit.script(ours)


def test_symbolic_trace_needs_a_tracer_that_treats_the_module_as_a_leaf():
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m, qualified_name):
            return isinstance(m, torch.nn.RNNBase)

    ours, theirs = map(torch.nn.Sequential, pair())
    torch.fx.symbolic_trace(theirs)
    with pytest.raises(torch.fx.proxy.TraceError):
        torch.fx.symbolic_trace(ours)
    traced = torch.fx.GraphModule(ours, Tracer().trace(ours))
    x, _ = arguments()
    assert torch.equal(traced(x)[0], ours(x)[0])


@pytest.mark.parametrize("cls", BOTH)
def test_a_pickled_module_loads_by_default_only_where_its_class_is_allowed(cls):
    module, buffer = cls(I, 3), io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    with pytest.raises(pickle.UnpicklingError, match=re.escape(f"{cls.__module__}.RNN")):
        torch.load(buffer)
    buffer.seek(0)
    with torch.serialization.safe_globals([cls]):
        loaded = torch.load(buffer)
    x = torch.ones(T, B, I)
    assert type(loaded) is cls and torch.equal(loaded(x)[0], module(x)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_without_hx_an_infinite_recurrent_weight_leaves_the_first_step_finite(dtype):
    ours, theirs = (m.to(dtype) for m in pair(Setting(num_layers=1, bidirectional=False)))
    x = draw(T, B, I, requires_grad=False).to(dtype)
    # From a state of zeros any finite W_hh gives this first step.
    exact = copy.deepcopy(theirs).double()(x.double())[0][0]
    for module in (ours, theirs):
        with torch.no_grad():
            module.weight_hh_l0[0, 0] = torch.inf
    first, of_nn_rnn = (module(x)[0][0] for module in (ours, theirs))
    bound = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(first.double(), exact, rtol=0.0, atol=bound)
    assert of_nn_rnn[:, 0].isnan().all()


def test_a_float16_state_that_overflows_is_infinite_in_output_and_goes_on_in_float32():
    modules = [cls(1, 1, 1, "relu", False, dtype=torch.float16) for cls in BOTH]
    for module in modules:
        with torch.no_grad():
            module.weight_ih_l0.fill_(1)
            module.weight_hh_l0.fill_(0.25)
    x = torch.tensor([[60000.0], [60000.0], [0.0], [0.0]], dtype=torch.float16)
    theirs, ours = (module(x)[0] for module in modules)
    # 60000, 75000 and its quarters; float16 ends at 65504.
    exact = modules[0].double()(x.double())[0].to(torch.float16)
    assert exact.isinf().flatten().tolist() == [False, True, False, False]
    assert torch.equal(ours, exact)
    assert theirs[1:].isinf().all()


def test_a_complex_call_gives_the_numbers_of_nn_rnn():
    outcomes = []
    for module in pair():
        for parameter in module.parameters():
            parameter.data = parameter.data * (1 - 0.5j)
        x, hx = (tensor.detach() * (1 + 0.5j) for tensor in arguments())
        output, h_n = module(x, hx)
        gradients = torch.autograd.grad(output.abs().sum(), list(module.parameters()))
        outcomes.append([output, h_n, *gradients])
    ours, theirs = outcomes
    assert ours[0].dtype == torch.complex128
    assert all(map(torch.equal, ours, theirs))
