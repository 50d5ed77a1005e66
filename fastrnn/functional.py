# SPDX-License-Identifier: Apache-2.0
"""The Elman recurrence as a function of its weights: packed or not, fused or PyTorch's own path.

The fused path checks its arguments in one place, csrc/check.cpp.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence

from fastrnn import _extension, ops
from fastrnn._stock import StockRNN

_FUSED_DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
_FUSED_DEVICES = frozenset(() if _extension.load_error else _extension.C.device_types)


def takes_fused_path(input: Any, weights: Sequence[Tensor], hx: Tensor | None) -> bool:
    """Whether the fused operators take this call; if not, PyTorch's own path does.

    They take ordinary strided tensors of float32, float64, float16 and bfloat16 on the CPU, and, if
    fastrnn was built with CUDA, on a GPU of compute capability 8.0 or above: outside of function
    transforms (torch.func), forward-mode derivatives, tracing, export and modes that watch every
    operator.

    Parameters
    ----------
    input : Tensor or PackedSequence
    weights : sequence of Tensor
    hx : Tensor or None
        As for `rnn`.

    Returns
    -------
    bool

    Raises
    ------
    ImportError
        The extension could not be loaded.
    """
    if not torch.compiler.is_compiling():
        return _extension.C.takes_fused_path(input, weights, hx)  # type: ignore[no-any-return]
    if isinstance(input, PackedSequence):
        input = input.data
    # Not is_exporting(), which Dynamo of torch 2.11 takes for True whenever it traces.
    if torch.compiler._is_exporting_flag:
        return False
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    if not isinstance(input, Tensor) or not (hx is None or isinstance(hx, Tensor)):
        return False
    for w in weights:
        if w is None or not _is_fused_device(w.device) or w.layout is not torch.strided:
            return False
    if not (input.layout is torch.strided and (hx is None or hx.layout is torch.strided)):
        return False
    return not weights or weights[0].dtype in _FUSED_DTYPES


def _is_fused_device(device: torch.device) -> bool:
    """Whether there are kernels for it: the CPU, or in a build with CUDA an A100 or newer."""
    if device.type == "cuda" and "cuda" in _FUSED_DEVICES:
        return torch.cuda.get_device_capability(device)[0] >= 8
    return device.type in _FUSED_DEVICES


def rnn(
    input: Any,
    weights: Sequence[Tensor],
    hx: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    num_layers: int = 1,
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
) -> tuple[Any, Tensor]:
    r"""Apply a multi-layer Elman RNN: ``h_t = f(x_t W_ihᵀ + b_ih + h_{t-1} W_hhᵀ + b_hh)``.

    Parameters
    ----------
    input : Tensor or PackedSequence
        ``(T, B, I)``, ``(B, T, I)`` with `batch_first`, ``(T, I)`` for one sequence, or packed.
    weights : sequence of Tensor
        For each layer, then direction: ``w_ih (H, I)``, ``w_hh (H, H)`` and, with `bias`,
        ``b_ih (H)``, ``b_hh (H)``; ``I`` is ``D*H`` above the first layer.
    hx : Tensor, optional
        Initial state ``(L*D, B, H)``, or ``(L*D, H)`` for one sequence. Zeros if absent.
    nonlinearity : {'tanh', 'relu'}
    num_layers : int
        ``L``.
    bias : bool
        Whether `weights` holds biases.
    batch_first : bool
        Layout of `input` and `output`; `hx` and `h_n` do not change.
    dropout : float
        Probability of zeroing an output between layers, while `training`.
    training : bool
    bidirectional : bool
        ``D`` is 2 instead of 1.

    Returns
    -------
    output : Tensor or PackedSequence
        Last layer's states, ``(T, B, D*H)`` in the layout of `input`.
    h_n : Tensor
        Every layer's final state, ``(L*D, B, H)`` or ``(L*D, H)``.

    Raises
    ------
    ValueError
        `input` has a wrong rank or another dtype than the weights, `nonlinearity` is unknown,
        `num_layers` is below 1, or the weights have no hidden features.
    TypeError
        A weight is None, or an option has a wrong type.
    IndexError
        A packed `input` has no batch sizes.
    RuntimeError
        A size, dtype, device or the number of weights does not fit.
    ImportError
        The extension could not be loaded.
    """
    packed = isinstance(input, PackedSequence)
    tensor, batch_sizes = (input.data, input.batch_sizes) if packed else (input, None)
    if not takes_fused_path(tensor, weights, hx):
        stock = StockRNN(
            weights,
            nonlinearity=nonlinearity,
            num_layers=num_layers,
            bias=bias,
            batch_first=batch_first,
            dropout=dropout,
            training=training,
            bidirectional=bidirectional,
        )
        return stock(input, hx)  # type: ignore[no-any-return]
    order = input.sorted_indices if packed else None
    # On a GPU, an index out of range would be the end of the process's work there: the operator
    # says what is wrong with hx.
    if order is not None and hx is not None and (hx.is_cpu or hx.shape[1:2] == order.shape):
        hx = hx.index_select(1, order)
    if dropout != 0 and training and num_layers > 1:
        output, h_n = _rnn_with_dropout(
            tensor, hx, weights, batch_sizes, nonlinearity, bias, num_layers, bidirectional,
            batch_first, dropout,
        )  # fmt: skip
    else:
        output, h_n = ops.rnn(
            tensor, hx, weights, batch_sizes, nonlinearity, bias, num_layers, bidirectional,
            batch_first,
        )  # fmt: skip
    if batch_sizes is None:
        return output, h_n
    if input.unsorted_indices is not None:
        h_n = h_n.index_select(1, input.unsorted_indices)
    return PackedSequence(output, batch_sizes, input.sorted_indices, input.unsorted_indices), h_n


def _rnn_with_dropout(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    nonlinearity: str,
    bias: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """Layer by layer, with torch.dropout between: nn.RNN's draws, on time-major outputs."""
    # The whole call's, before slices of it hide what is wrong.
    torch.ops.fastrnn.check_arguments(
        input, hx, weights, batch_sizes, nonlinearity, bias, num_layers, bidirectional, batch_first
    )
    directions = 2 if bidirectional else 1
    per_layer = directions * (4 if bias else 2)
    swap = batch_first and batch_sizes is None and input.dim() == 3
    output = input.transpose(0, 1) if swap else input
    finals = []
    for layer in range(num_layers):
        if layer > 0:
            output = torch.dropout(output, dropout, True)
        state = None if hx is None else hx[layer * directions : (layer + 1) * directions]
        output, h_n = ops.rnn(
            output, state, weights[layer * per_layer : (layer + 1) * per_layer], batch_sizes,
            nonlinearity, bias, 1, bidirectional, batch_first and not swap,
        )  # fmt: skip
        finals.append(h_n)
    return output.transpose(0, 1) if swap else output, torch.cat(finals)
