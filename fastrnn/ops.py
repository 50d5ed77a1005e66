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
) -> tuple[Tensor, Tensor, list[Tensor]]:
    output_size = (*input.shape[:-1], (2 if bidirectional else 1) * weights[1].size(0))
    output = input.new_empty(output_size)
    h_n = _state_like(input, hx, weights, batch_sizes, num_layers, bidirectional)
    kept = [input.new_empty(output_size) for _ in range(num_layers)] if keep else []
    return output, h_n, kept


def _state_like(
    input: Tensor,
    hx: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    num_layers: int,
    bidirectional: bool,
) -> Tensor:
    """A tensor of the shape of h_n and of hx."""
    batch: int | torch.SymInt
    if batch_sizes is None:
        batch = input.size(1)
    elif hx is not None:
        batch = hx.size(1)
    else:  # the number of sequences is data: known only when the graph runs
        batch = torch.library.get_ctx().new_dynamic_size()
    rows = num_layers * (2 if bidirectional else 1)
    return input.new_empty((rows, batch, weights[1].size(0)))


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
) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
    return (
        input.new_empty(input.shape) if needs[0] else None,
        _state_like(input, hx, weights, batch_sizes, num_layers, bidirectional)
        if needs[1]
        else None,
        [w.new_empty(w.shape if n else (0,)) for w, n in zip(weights, needs[2:], strict=True)],
    )


if _extension.load_error is None:
    torch.library.register_fake("fastrnn::rnn_forward", _rnn_forward_fake)
    torch.library.register_fake("fastrnn::rnn_backward", _rnn_backward_fake)
