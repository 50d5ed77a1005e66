# SPDX-License-Identifier: Apache-2.0
"""The operators called by themselves, with arguments that do not fit: an error, never a crash.

fastrnn.RNN never calls them so. Each call runs in this process: one that reads out of bounds fails
the whole run.
"""

import pytest
import torch
from pairs import pair

import fastrnn

T, B, I, H, L = 5, 2, 2, 3, 2
OPTIONS = {"nonlinearity": "tanh", "bias": True, "num_layers": L, "bidirectional": False}


def weights():
    module = fastrnn.RNN(I, H, L)
    return [p.detach() for p in module.parameters()]


def forward_arguments(**changes):
    given = {"input": torch.randn(T, B, I), "hx": None, "weights": weights(), "batch_sizes": None}
    return given | OPTIONS | {"keep": True} | changes


def backward_arguments(**changes):
    given = forward_arguments()
    keep = given.pop("keep")
    output, h_n, layer_outputs = torch.ops.fastrnn.rnn_forward(**given, keep=keep)
    given |= {"grad_output": output, "grad_h_n": h_n, "layer_outputs": layer_outputs}
    return given | {"needs": [True] * (2 + len(given["weights"]))} | changes


def without(index):
    flat = weights()
    del flat[index]
    return flat


def reshaped(index, *shape):
    flat = weights()
    flat[index] = torch.randn(shape)
    return flat


MISFITS = {
    "no weights": {"weights": []},
    "too few weights": {"weights": without(-1)},
    "more layers than weights": {"num_layers": 2**62 + 1},
    "no layers": {"num_layers": 0},
    "short w_ih": {"weights": reshaped(0, H - 1, I)},
    "wide w_hh": {"weights": reshaped(1, H, H + 1)},
    "short bias": {"weights": reshaped(2, H - 1)},
    "no steps": {"input": torch.randn(0, B, I)},
    "another input size": {"input": torch.randn(T, B, I - 1)},
    "four dimensions": {"input": torch.randn(T, B, I, 1)},
    "an integer input": {"input": torch.ones(T, B, I, dtype=torch.long)},
    "a float64 input": {"input": torch.randn(T, B, I).double()},
    "another batch of hx": {"hx": torch.zeros(L, 1, H)},
    "hx of two dimensions": {"hx": torch.zeros(L, H)},
    "an unknown nonlinearity": {"nonlinearity": "gelu"},
    "no batch_sizes": {"input": torch.randn(0, I), "batch_sizes": torch.tensor([]).long()},
    "negative batch_sizes": {"input": torch.randn(1, I), "batch_sizes": torch.tensor([2, -1])},
    "growing batch_sizes": {"input": torch.randn(3, I), "batch_sizes": torch.tensor([1, 2])},
    "too many batch_sizes": {"input": torch.randn(3, I), "batch_sizes": torch.tensor([2, 2])},
    "float batch_sizes": {"input": torch.randn(4, I), "batch_sizes": torch.tensor([2.0, 2.0])},
}
every_misfit = pytest.mark.parametrize("changes", MISFITS.values(), ids=MISFITS)


@every_misfit
def test_rnn_forward_refuses(changes):
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        torch.ops.fastrnn.rnn_forward(**forward_arguments(**changes))


@every_misfit
def test_rnn_backward_refuses(changes):
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        torch.ops.fastrnn.rnn_backward(**backward_arguments(**changes))


@pytest.mark.parametrize("sizes", [torch.tensor([[2, 2]]), torch.tensor(2)], ids=["2-D", "0-D"])
def test_batch_sizes_are_one_row_of_numbers(sizes):
    call = forward_arguments(input=torch.randn(4, I), batch_sizes=sizes)
    with pytest.raises(RuntimeError, match="batch_sizes must be a 1-D CPU tensor"):
        torch.ops.fastrnn.rnn_forward(**call)


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_outputs": []},
        {"layer_outputs": [torch.zeros(T, B, H)]},
        {"layer_outputs": [torch.zeros(T, B, H), torch.zeros(T, B, H - 1)]},
        {"layer_outputs": [torch.zeros(T, B, H)] * 2, "grad_output": torch.zeros(T, B, H).double()},
        {"grad_output": torch.zeros(T - 1, B, H)},
        {"grad_h_n": torch.zeros(L, B + 1, H)},
        {"needs": [True]},
    ],
)
def test_rnn_backward_refuses_what_forward_did_not_make(changes):
    with pytest.raises(RuntimeError, match="rnn_backward"):
        torch.ops.fastrnn.rnn_backward(**backward_arguments(**changes))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn], ids=str)
def test_the_operator_says_which_dtypes_it_does_not_take(dtype):
    flat = [w.to(dtype) for w in weights()]
    call = forward_arguments(input=torch.randn(T, B, I).to(dtype), weights=flat)
    with pytest.raises(NotImplementedError, match="not implemented for"):
        torch.ops.fastrnn.rnn_forward(**call)


@pytest.mark.parametrize(
    "sizes",
    [
        (0, 1, 1, 1),
        (1, -1, 1, 1),
        (1, 1, 1, 1, 0),
        (1, 1, 1, 1, 1, torch.int64),
        (2, 3, 1, 1, 1, torch.float32, 2),
        (2, 3, 1, 1, 1, torch.float32, 7),
    ],
)
def test_a_plan_is_made_for_possible_sizes_only(sizes):
    with pytest.raises(ValueError, match="cpu_plan"):
        fastrnn._extension.C.cpu_plan(*sizes)


@pytest.mark.parametrize("hidden_size", [3, 160])
@pytest.mark.parametrize("packed", [False, True])
def test_kept_tensors_may_come_back_with_other_strides(hidden_size, packed):
    """As from saved-tensor hooks that store what autograd keeps elsewhere."""

    def restrided(t):
        if t.dim() != 3:
            return t.clone()
        return t.transpose(0, 1).contiguous().transpose(0, 1)

    gradients = []
    for module in pair(sizes=(I, hidden_size)):
        torch.manual_seed(1)
        x = torch.randn(6, 4, I, dtype=torch.float64)
        if packed:
            x = torch.nn.utils.rnn.pack_padded_sequence(x, [6, 4, 4, 1])
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, restrided):
            module(x)[1].sin().sum().backward()
        gradients.append([p.grad for p in module.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("needed", ["weight_ih_l2", "bias_hh_l1_reverse", "weight_hh_l0"])
def test_frozen_layers_below_change_no_gradient(needed):
    gradients = []
    for module in pair():
        big = type(module)(I, H, 3, bidirectional=True, dtype=torch.float64)
        torch.manual_seed(0)
        for name, p in big.named_parameters():
            torch.nn.init.uniform_(p.data, -0.5, 0.5)
            p.requires_grad_(name == needed)
        x = torch.linspace(-1, 1, T * B * I, dtype=torch.float64).view(T, B, I)
        big(x)[0].sin().sum().backward()
        gradients.append({name: p.grad for name, p in big.named_parameters()})
    ours, theirs = gradients
    assert [name for name, g in ours.items() if g is not None] == [needed]
    torch.testing.assert_close(ours[needed], theirs[needed])
