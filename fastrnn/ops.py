# SPDX-License-Identifier: Apache-2.0
"""The C++ operator as a Python function, and what PyTorch's tracers need to know of it.

The schemas are in csrc/library.cpp. A fake kernel returns tensors of the right shape, strides and
dtype without computing, so that torch.compile keeps each operator as one node of its graph.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrnn import _extension


def rnn(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    nonlinearity: str,
    bias: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor]:
    """Call fastrnn::rnn: through torch.ops where a compiler traces, else by the shorter way."""
    call = torch.ops.fastrnn.rnn.default if torch.compiler.is_compiling() else _extension.C.rnn
    return call(  # type: ignore[no-any-return]
        input, hx, weights, batch_sizes, nonlinearity, bias, num_layers, bidirectional, batch_first
    )


def _rnn_forward_fake(
    input: Tensor,
    hx: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    nonlinearity: str,
    bias: bool,
    num_layers: int,
    bidirectional: bool,
    keep: bool,
    batch_first: bool = False,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    torch.ops.fastrnn.check_arguments(
        input, hx, weights, batch_sizes, nonlinearity, bias, num_layers, bidirectional, batch_first
    )
    units = (2 if bidirectional else 1) * weights[1].size(0)
    x = _time_major(input, batch_sizes, batch_first)
    output = _user_layout(x.new_empty((*x.shape[:-1], units)), input, batch_sizes, batch_first)
    h_n = _state_like(input, hx, weights, batch_sizes, num_layers, bidirectional, batch_first)
    kept = [x.new_empty((*x.shape[:-1], units)) for _ in range(num_layers)] if keep else []
    return output, h_n, kept


def _time_major(t: Tensor, batch_sizes: Tensor | None, batch_first: bool) -> Tensor:
    """What the engines see: ``(T, B, features)``, or packed."""
    if batch_sizes is not None:
        return t
    if t.dim() == 2:
        return t.unsqueeze(1)
    return t.transpose(0, 1) if batch_first else t


def _user_layout(t: Tensor, input: Tensor, batch_sizes: Tensor | None, batch_first: bool) -> Tensor:
    """The way back, to the layout of `input`."""
    if batch_sizes is not None:
        return t
    if input.dim() == 2:
        return t.squeeze(1)
    return t.transpose(0, 1) if batch_first else t


def _state_like(
    input: Tensor,
    hx: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> Tensor:
    """A tensor of the shape of h_n and of hx."""
    if hx is not None:
        return input.new_empty(hx.shape)
    rows, hidden_size = num_layers * (2 if bidirectional else 1), weights[1].size(0)
    if batch_sizes is None and input.dim() == 2:
        return input.new_empty((rows, hidden_size))
    # The number of packed sequences is data: known only when the graph runs.
    batch: int | torch.SymInt = (
        torch.library.get_ctx().new_dynamic_size()
        if batch_sizes is not None
        else input.size(0 if batch_first else 1)
    )
    return input.new_empty((rows, batch, hidden_size))


def _rnn_backward_fake(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    input: Tensor,
    hx: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    layer_outputs: list[Tensor],
    nonlinearity: str,
    bias: bool,
    num_layers: int,
    bidirectional: bool,
    needs: list[bool],
    batch_first: bool = False,
) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
    x = _time_major(input, batch_sizes, batch_first)
    return (
        _user_layout(x.new_empty(x.shape), input, batch_sizes, batch_first) if needs[0] else None,
        _state_like(input, hx, weights, batch_sizes, num_layers, bidirectional, batch_first)
        if needs[1]
        else None,
        [w.new_empty(w.shape if n else (0,)) for w, n in zip(weights, needs[2:], strict=True)],
    )


if _extension.load_error is None:
    torch.library.register_fake("fastrnn::rnn_forward", _rnn_forward_fake)
    torch.library.register_fake("fastrnn::rnn_backward", _rnn_backward_fake)
