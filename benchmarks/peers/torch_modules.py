# SPDX-License-Identifier: Apache-2.0
"""PyTorch's own classes, called as they are, and fastrnn's."""

from typing import Any

import torch
from cases import BenchmarkCase
from torch import Tensor

import fastrnn

from .interface import Loaded, Peer, Problem, module_steps

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Module(Peer):
    """A class with torch.nn.RNN's constructor."""

    dtypes = DTYPES
    packed = True
    cls: Any

    def load(self, case: BenchmarkCase, mode: str, threads: int) -> Loaded:
        """As of `Peer`."""
        module = case.module(self.cls, case.dtype)
        parameters = dict(module.named_parameters())
        x, cotangent = case.input(), case.cotangent()
        # The data of a packed sequence have no such layout.
        batch_first = case.batch_first and not case.lengths
        return module_steps(module, parameters, x, cotangent, mode, batch_first)


class NnRnn(Module):
    """torch.nn.RNN, eager."""

    name = "nn_rnn"
    cls = torch.nn.RNN


class FastRnn(Module):
    """fastrnn.RNN, eager."""

    name = "fastrnn"
    cls = fastrnn.RNN


class CompiledNnRnn(Module):
    """`torch.compile` of torch.nn.RNN. Dynamo makes no graph of that class: it runs eagerly."""

    name = "compiled_nn_rnn"

    @staticmethod
    def cls(*sizes: int, **options: Any) -> torch.nn.RNN:
        """Make the module; `torch.compile` in place keeps the names of its parameters."""
        torch._dynamo.reset()
        module = torch.nn.RNN(*sizes, **options)
        module.compile()
        return module


class CellLoop(torch.nn.Module):
    """A Python loop over torch.nn.RNNCell."""

    def __init__(self, cell: torch.nn.RNNCell) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output (T, B, H) and h_n (1, B, H)."""
        h, states = None, []
        for x_t in x:
            h = self.cell(x_t, h)
            states.append(h)
        output = torch.stack(states)
        return output, output[-1:]


class NnRnnCell(Peer):
    """torch.nn.RNNCell, for streaming: one step in each call."""

    name = "nn_rnn_cell"
    dtypes = DTYPES

    def unsupported(self, case: BenchmarkCase, mode: str) -> str | None:
        """As of `Peer`."""
        if case.num_layers > 1 or case.bidirectional:
            return "a cell is one layer in one direction"
        if case.T != 1:
            return "measured for single steps"
        return super().unsupported(case, mode)

    def load(self, case: BenchmarkCase, mode: str, threads: int) -> Loaded:
        """As of `Peer`."""
        cell = torch.nn.RNNCell(case.I, case.H, nonlinearity=case.nonlinearity, dtype=case.dtype)
        rnn = case.module(torch.nn.RNN, case.dtype)
        cell.load_state_dict({n.removesuffix("_l0"): w for n, w in rnn.state_dict().items()})
        parameters = {f"{name}_l0": weight for name, weight in cell.named_parameters()}
        problem = Problem(case)
        x, cotangent = problem.x, problem.cotangent()
        return module_steps(CellLoop(cell), parameters, x, cotangent, mode)
