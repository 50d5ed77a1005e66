# SPDX-License-Identifier: Apache-2.0
"""The executable specification: the recurrence and its derivative in plain PyTorch.

It is written to be read, one step after another, and PyTorch can differentiate it. Padded and
packed sequences have one layout: rows. The first ``sizes[0]`` rows are step 0 of every sequence,
the next ``sizes[1]`` rows are step 1 of the sequences that still go on, and so on. Sequences are
sorted by decreasing length. Padded ``[T, B, I]`` is ``T`` times ``B`` rows. The tests compare
nn.RNN and the extension with this file.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Cell(NamedTuple):
    """The weights of one layer and direction: ``(H, I)``, ``(H, H)``, and ``(H)`` or None."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None


class Gradients(NamedTuple):
    """What `rnn_backward` returns. A gradient has the shape of its argument."""

    input: Tensor
    hx: Tensor
    weights: list[Tensor]


def cells_of(weights: Sequence[Tensor], bias: bool) -> list[Cell]:
    """nn.RNN's flat list of weights, cut into cells: layer by layer, then direction."""
    if bias:
        return [Cell(*weights[i : i + 4]) for i in range(0, len(weights), 4)]
    return [Cell(w_ih, w_hh, None, None) for w_ih, w_hh in zip(*[iter(weights)] * 2, strict=True)]


def layer(
    x: Tensor, hx: Tensor, cell: Cell, sizes: Sequence[int], nonlinearity: str, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Walk through one direction of a layer: ``h_t = f(x_t W_ihᵀ + b_ih + h_{t-1} W_hhᵀ + b_hh)``.

    Parameters
    ----------
    x : Tensor
        ``(N, I)``, rows as the module's docstring says.
    hx : Tensor
        ``(B, H)``, the state of every sequence before its first step in this direction.
    cell : Cell
    sizes : sequence of int
        Rows of each step.
    nonlinearity : {'tanh', 'relu'}
    reverse : bool
        From each sequence's end to its start.

    Returns
    -------
    y : Tensor
        ``(N, H)``, every state.
    h : Tensor
        ``(B, H)``, every sequence's last state in this direction.
    """
    f = torch.tanh if nonlinearity == "tanh" else torch.relu
    h, y = hx, list(torch.split(x, list(sizes)))
    for t in _order(len(sizes), reverse):
        n = sizes[t]
        s = y[t] @ cell.w_ih.t() + h[:n] @ cell.w_hh.t()
        if cell.b_ih is not None and cell.b_hh is not None:
            s = s + cell.b_ih + cell.b_hh
        y[t] = f(s)
        # A sequence that has ended, or in reverse has not begun, keeps its state.
        h = torch.cat([y[t], h[n:]])
    return torch.cat(y), h


def layer_backward(
    grad_y: Tensor,
    grad_h: Tensor,
    x: Tensor,
    y: Tensor,
    hx: Tensor,
    cell: Cell,
    sizes: Sequence[int],
    nonlinearity: str,
    reverse: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Derive `layer` by hand: ``delta_t = (grad_y_t + delta_{t+1} W_hh) f'(y_t)``.

    The walk goes against that of `layer`. All else follows from delta: ``grad_x = delta W_ih``,
    ``grad_W_ih = deltaᵀ x``, ``grad_W_hh = deltaᵀ h_prev``, ``grad_b = Σ delta``. f' needs y
    alone: ``1 - y²`` for tanh, ``y > 0`` for relu.

    Parameters
    ----------
    grad_y, grad_h : Tensor
        Gradients of the results of `layer`.
    x, y, hx, cell, sizes, nonlinearity, reverse
        As `layer` takes and returns them.

    Returns
    -------
    grad_x, grad_hx : Tensor
    grad_weights : list of Tensor
        Of the cell's weights, biases last if there are any.
    """
    starts = [0, *accumulate(sizes)]
    rows = [slice(a, b) for a, b in pairwise(starts)]
    order = list(_order(len(sizes), reverse))
    h, h_prev = hx, torch.empty_like(y)
    for t in order:
        n = sizes[t]
        h_prev[rows[t]] = h[:n]
        h = torch.cat([y[rows[t]], h[n:]])
    slope = 1 - y * y if nonlinearity == "tanh" else (y > 0).to(y.dtype)
    delta = torch.empty_like(y)
    for t in reversed(order):
        n = sizes[t]
        delta[rows[t]] = (grad_y[rows[t]] + grad_h[:n]) * slope[rows[t]]
        grad_h = torch.cat([delta[rows[t]] @ cell.w_hh, grad_h[n:]])
    weights = [delta.t() @ x, delta.t() @ h_prev]
    if cell.b_ih is not None:
        weights += [delta.sum(0), delta.sum(0)]
    return delta @ cell.w_ih, grad_h, weights


def rnn(
    x: Tensor,
    hx: Tensor,
    weights: Sequence[Tensor],
    sizes: Sequence[int],
    *,
    nonlinearity: str = "tanh",
    bias: bool = True,
    bidirectional: bool = False,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Run all layers and directions.

    Parameters
    ----------
    x : Tensor
        ``(N, I)`` rows.
    hx : Tensor
        ``(L*D, B, H)``.
    weights : sequence of Tensor
        nn.RNN's flat list.
    sizes : sequence of int
        Rows of each step.
    nonlinearity, bias, bidirectional
        As `fastrnn.RNN` takes them.

    Returns
    -------
    output : Tensor
        ``(N, D*H)``, the last layer's states.
    h_n : Tensor
        ``(L*D, B, H)``.
    layer_outputs : list of Tensor
        Every layer's states; the last is `output`.
    """
    cells, D = cells_of(weights, bias), 2 if bidirectional else 1
    layer_outputs, finals = [], []
    for i in range(0, len(cells), D):
        both = [layer(x, hx[i + d], cells[i + d], sizes, nonlinearity, d == 1) for d in range(D)]
        x = torch.cat([y for y, _ in both], 1)
        layer_outputs.append(x)
        finals += [h for _, h in both]
    return x, torch.stack(finals), layer_outputs


def rnn_backward(
    grad_output: Tensor,
    grad_h_n: Tensor,
    x: Tensor,
    hx: Tensor,
    weights: Sequence[Tensor],
    sizes: Sequence[int],
    layer_outputs: Sequence[Tensor],
    *,
    nonlinearity: str = "tanh",
    bias: bool = True,
    bidirectional: bool = False,
) -> Gradients:
    """Derive `rnn` by hand, from its arguments and its layers' outputs alone.

    Parameters
    ----------
    grad_output, grad_h_n : Tensor
        Gradients of the results of `rnn`.
    x, hx, weights, sizes, nonlinearity, bias, bidirectional
        As `rnn` takes them.
    layer_outputs : sequence of Tensor
        As `rnn` returns them.

    Returns
    -------
    Gradients
    """
    cells, D, H = cells_of(weights, bias), 2 if bidirectional else 1, hx.size(-1)
    grad_hx = torch.empty_like(hx)
    grad_weights: list[list[Tensor]] = [[] for _ in cells]
    grad_y = grad_output
    for i in reversed(range(0, len(cells), D)):
        below = layer_outputs[i // D - 1] if i > 0 else x
        grad_x = torch.zeros_like(below)
        for d in range(D):
            columns = slice(d * H, (d + 1) * H)
            grad, grad_hx[i + d], grad_weights[i + d] = layer_backward(
                grad_y[:, columns], grad_h_n[i + d], below, layer_outputs[i // D][:, columns],
                hx[i + d], cells[i + d], sizes, nonlinearity, d == 1,
            )  # fmt: skip
            grad_x = grad_x + grad
        grad_y = grad_x
    return Gradients(grad_y, grad_hx, [w for cell in grad_weights for w in cell])


def _order(T: int, reverse: bool) -> Sequence[int]:
    return range(T - 1, -1, -1) if reverse else range(T)
