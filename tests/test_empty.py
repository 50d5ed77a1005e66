# SPDX-License-Identifier: Apache-2.0
"""Sizes of zero that nn.RNN accepts, or that functional.rnn does."""

import pytest
import torch
from pairs import tensor
from test_errors import BOTH, ROWS, X, packed
from torch.nn.utils.rnn import PackedSequence

import fastrnn
from fastrnn import testing

EMPTY = {
    "a batch of none": ({}, X[:, :0]),
    "a batch-first batch of none": ({"batch_first": True}, X[:0]),
    "a bidirectional batch of none": ({"bidirectional": True}, X[:, :0]),
    "batch_sizes that end in zero": ({}, packed(ROWS, [3, 2, 0])),
    "batch_sizes of zero only": ({}, packed(ROWS[:0], [0])),
}


def batch_of(x, options):
    """The shape of the state."""
    if isinstance(x, PackedSequence):
        batch = int(x.batch_sizes[0])
    else:
        batch = x.size(0 if options.get("batch_first") else 1)
    return 4 if options.get("bidirectional") else 2, batch, 4


@pytest.mark.parametrize("hx", [False, True])
@pytest.mark.parametrize("case", EMPTY.values(), ids=EMPTY)
def test_empty_batch_gives_the_results_and_gradients_of_nn_rnn(case, hx, device):
    options, x = case
    outcomes = []
    for cls, place in zip(BOTH, (device, "cpu"), strict=True):  # cuDNN fails for some
        torch.manual_seed(0)
        module = cls(3, 4, 2, **options).to(place)
        data = tensor(x).detach().to(place).requires_grad_()
        given = x._replace(data=data) if isinstance(x, PackedSequence) else data
        state = torch.ones(batch_of(x, options), device=place) if hx else None
        output, h_n = module(given, state)
        (tensor(output).sum() + h_n.sum()).backward()
        gradients = [data.grad, *(p.grad for p in module.parameters())]
        outcomes.append([t.cpu() for t in (tensor(output), h_n, *gradients)])
    torch.testing.assert_close(*outcomes)


@pytest.mark.parametrize("sizes", [(3, 2, 4), (5, 1, 4), (40, 9, 70), (2, 1, 300)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_input_of_no_features_leaves_the_biases_and_the_state(sizes, dtype, device):
    T, B, H = sizes
    module = torch.nn.RNN(1, H, dtype=dtype)  # one feature that is zero, for the call with none
    weights = [p.detach().to(device, copy=True).requires_grad_() for p in module.parameters()]
    weights[0] = weights[0].detach()[:, :0].clone().requires_grad_()
    x = torch.empty(T, B, 0, dtype=dtype, device=device, requires_grad=True)
    with testing.poisoned_memory():
        output, h_n = fastrnn.functional.rnn(x, weights)
        (output.sum() + h_n.sum()).backward()
    expected, _ = module(torch.zeros(T, B, 1, dtype=dtype))
    (expected.sum() + expected[-1].sum()).backward()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    close = torch.testing.assert_close
    close(output.cpu(), expected, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(weights[1:], list(module.parameters())[1:], strict=True):
        close(ours.grad.cpu(), theirs.grad, rtol=tolerance, atol=tolerance * T * B)
    assert x.grad.shape == x.shape and weights[0].grad.shape == (H, 0)
