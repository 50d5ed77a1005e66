# SPDX-License-Identifier: Apache-2.0
"""PyTorch's own classes and fastrnn's, called as they are; and a loop over time in PyTorch's
operators, for its two compilers."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from cases import BenchmarkCase
from torch import Tensor

import fastrnn

from .interface import Loaded, Peer, Problem, module_steps

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
#: An unrolled loop of more steps takes minutes to compile.
MOST_STEPS = 20


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


def rnn(
    x: Tensor, weights: list[Tensor], layers: int, directions: int, relu: bool
) -> tuple[Tensor, Tensor]:
    """Return output and h_n of x (T, B, I); `weights` as torch.nn.RNN orders them.

    Written for speed: one product for the input of all steps, none with an initial state of zeros,
    and `unbind` instead of an index for each step, whose gradient would be as large as the
    sequence.
    """
    finals: list[Tensor] = []
    for layer in range(layers):
        outputs: list[Tensor] = []
        for direction in range(directions):
            first = 4 * (layer * directions + direction)
            w_ih, w_hh, b_ih, b_hh = weights[first : first + 4]
            products = F.linear(x, w_ih, b_ih + b_hh).unbind(0)
            transposed = w_hh.t()
            states: list[Tensor] = []
            for i in range(len(products)):
                z = products[len(products) - 1 - i if direction else i]
                if i > 0:
                    z = torch.addmm(z, states[-1], transposed)
                states.append(torch.relu(z) if relu else torch.tanh(z))
            finals.append(states[-1])
            if direction:
                states.reverse()
            outputs.append(torch.stack(states))
        x = torch.cat(outputs, 2) if directions == 2 else outputs[0]
    return x, torch.stack(finals)


class Loop(torch.nn.Module):
    """`rnn`, compiled, with the weights of a torch.nn.RNN."""

    def __init__(self, function: Callable[..., tuple[Tensor, Tensor]], module: torch.nn.RNN):
        super().__init__()
        self.function = function
        self.module = module
        self.weights = list(module.parameters())
        directions = 2 if module.bidirectional else 1
        self.options = (module.num_layers, directions, module.nonlinearity == "relu")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return output and h_n."""
        return self.function(x, self.weights, *self.options)


class LoopPeer(Peer):
    """`rnn` behind a compiler."""

    dtypes = DTYPES

    def compiled(self, threads: int) -> Callable[..., tuple[Tensor, Tensor]]:
        """The function, compiled now or when first called."""
        raise NotImplementedError

    def load(self, case: BenchmarkCase, mode: str, threads: int) -> Loaded:
        """As of `Peer`."""
        problem = Problem(case)
        module = case.module(torch.nn.RNN, case.dtype)
        loop = Loop(self.compiled(threads), module)
        parameters = dict(module.named_parameters())
        return module_steps(loop, parameters, problem.x, problem.cotangent(), mode)


class ScriptLoop(LoopPeer):
    """The loop under `torch.jit.script`."""

    name = "script_loop"

    def compiled(self, threads: int) -> Callable[..., tuple[Tensor, Tensor]]:
        """As of `LoopPeer`."""
        return torch.jit.script(rnn)


class CompiledLoop(LoopPeer):
    """The loop under `torch.compile`, which unrolls it."""

    name = "compiled_loop"

    def unsupported(self, case: BenchmarkCase, mode: str) -> str | None:
        """As of `Peer`."""
        if case.T * case.num_layers > MOST_STEPS:
            return f"compiling more than {MOST_STEPS} unrolled steps takes minutes"
        return super().unsupported(case, mode)

    def compiled(self, threads: int) -> Callable[..., tuple[Tensor, Tensor]]:
        """As of `LoopPeer`."""
        from torch._inductor import config

        # Part of the key of Inductor's cache: code for two threads is not taken for one.
        config.cpp.threads = threads
        # Else a function that was compiled for several cases is run eagerly.
        torch._dynamo.reset()
        return torch.compile(rnn, fullgraph=True, dynamic=False)
