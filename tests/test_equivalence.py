# SPDX-License-Identifier: Apache-2.0
"""fastrnn.RNN against torch.nn.RNN over a product of shapes and modes, all gradients included."""

import itertools

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

import fastrnn

SHAPES = [(1, 1, 1, 1), (5, 3, 4, 7), (7, 13, 5, 17), (20, 33, 70, 65), (4, 2, 300, 130)]
TOLERANCE = {torch.float64: 1e-11, torch.float32: 3e-4}


def relative_error(value, reference):
    return ((value - reference).norm() / reference.norm().clamp(min=1e-12)).item()


def results(module, inputs, hx, call):
    """Outputs and every gradient of a random scalar of them."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    state = None if hx is None else hx.clone().requires_grad_()
    output, h_n = call(module, inputs, state)
    generator = torch.Generator().manual_seed(1)
    draw = lambda t: torch.randn(t.shape, dtype=t.dtype, generator=generator)  # noqa: E731
    ((output * draw(output)).sum() + (h_n * draw(h_n)).sum()).backward()
    leaves = [*inputs, *module.parameters()] + ([] if state is None else [state])
    return [output.detach(), h_n.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_padded(shape, nonlinearity, dtype):
    T, B, I, H = shape
    flags = itertools.product((1, 2), *[(False, True)] * 4)
    for layers, bidirectional, bias, batch_first, has_hx in flags:
        torch.manual_seed(0)
        arguments = (I, H, layers, nonlinearity, bias, batch_first, 0.0, bidirectional)
        reference = torch.nn.RNN(*arguments, dtype=dtype)
        module = fastrnn.RNN(*arguments, dtype=dtype)
        module.load_state_dict(reference.state_dict())
        x = torch.randn(*((B, T) if batch_first else (T, B)), I, dtype=dtype)
        hx = torch.randn(layers * (1 + bidirectional), B, H, dtype=dtype) if has_hx else None
        call = lambda m, inputs, state: m(inputs[0], state)  # noqa: E731
        pairs = zip(results(module, [x], hx, call), results(reference, [x], hx, call), strict=True)
        for ours, theirs in pairs:
            assert relative_error(ours, theirs) < TOLERANCE[dtype]


@pytest.mark.parametrize("lengths", [[5, 3, 2, 2, 1], [4, 4], [1, 1], [2, 9, 30, 1, 7, 7]], ids=str)
@pytest.mark.parametrize("size", [(3, 5), (17, 40), (600, 330)], ids=str)
def test_packed(lengths, size):
    for layers, bidirectional, has_hx in itertools.product((1, 2), (False, True), (False, True)):
        torch.manual_seed(0)
        reference = torch.nn.RNN(*size, layers, bidirectional=bidirectional, dtype=torch.float64)
        module = fastrnn.RNN(*size, layers, bidirectional=bidirectional, dtype=torch.float64)
        module.load_state_dict(reference.state_dict())
        xs = [torch.randn(n, size[0], dtype=torch.float64) for n in lengths]
        hx = (
            torch.randn(layers * (1 + bidirectional), len(lengths), size[1], dtype=torch.float64)
            if has_hx
            else None
        )

        def call(m, inputs, state):
            output, h_n = m(pack_sequence(inputs, enforce_sorted=False), state)
            return output.data, h_n

        pairs = zip(results(module, xs, hx, call), results(reference, xs, hx, call), strict=True)
        for ours, theirs in pairs:
            assert relative_error(ours, theirs) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_first_and_second_derivatives(nonlinearity, bidirectional):
    torch.manual_seed(0)
    module = fastrnn.RNN(2, 3, 2, nonlinearity, bidirectional=bidirectional, dtype=torch.float64)
    x = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)

    def call(x, *weights):
        return fastrnn.functional.rnn(
            x, list(weights), nonlinearity=nonlinearity, num_layers=2, bidirectional=bidirectional
        )

    arguments = (x, *module.parameters())
    assert torch.autograd.gradcheck(call, arguments)
    assert torch.autograd.gradgradcheck(call, arguments)


def test_integer_input_says_what_to_write():
    with pytest.raises(ValueError, match=r"input is Long, the weights are Float.*input\.float\(\)"):
        fastrnn.RNN(1, 1)(torch.arange(1, 10).reshape(9, 1))


def test_compiles_into_one_graph():
    torch.manual_seed(0)
    module = fastrnn.RNN(3, 5)
    x = torch.randn(4, 2, 3)
    output, _ = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(output, module(x)[0])
