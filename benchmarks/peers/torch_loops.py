# SPDX-License-Identifier: Apache-2.0
"""A loop over time in PyTorch's operators, for its two compilers.

Written for speed: one product for the input of all steps, none with an initial state of zeros, and
`unbind` instead of an index for each step, whose gradient would be as large as the sequence.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from cases import BenchmarkCase
from torch import Tensor

from .interface import Loaded, Peer, Problem, module_steps

#: An unrolled loop of more steps takes minutes to compile.
MOST_STEPS = 20


def rnn(
    x: Tensor, weights: list[Tensor], layers: int, directions: int, relu: bool
) -> tuple[Tensor, Tensor]:
    """Return output and h_n of x (T, B, I); `weights` as torch.nn.RNN orders them."""
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

    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

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
