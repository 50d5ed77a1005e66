# SPDX-License-Identifier: Apache-2.0
"""What a peer is: another way to compute a case, and what it says about itself.

Peers that are no PyTorch module get their numbers from a `Problem`: time first, whatever the case
says, because the order of two dimensions is a matter of the caller's layout and not of speed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from cases import MODES, BenchmarkCase, numbers
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from fastrnn import testing


@dataclass(frozen=True)
class Loaded:
    """A case in a mode, ready to be called.

    `step` is what is timed. `results` makes one such call and returns all that it computes:
    ``output``, of shape (T, B, features) or the data of a packed sequence; in inference ``h_n`` if
    the peer has it; in training ``grad_<parameter>`` for every parameter of torch.nn.RNN.
    """

    step: Callable[[], Any]
    results: Callable[[], dict[str, Tensor]]


class Peer:
    """One way to compute an RNN. Importing it needs none of its packages."""

    name: str
    #: Distributions that must be installed.
    packages: tuple[str, ...] = ()
    modes: tuple[str, ...] = MODES
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    packed = False

    def missing(self) -> str | None:
        """Why the peer cannot run here at all; None if it can."""
        absent = [name for name in self.packages if version(name) is None]
        return f"not installed: {', '.join(absent)}" if absent else None

    def unsupported(self, case: BenchmarkCase, mode: str) -> str | None:
        """Why the peer cannot compute this; None if it can."""
        if mode not in self.modes:
            return f"no {mode}"
        if case.dtype not in self.dtypes:
            return f"no {str(case.dtype).removeprefix('torch.')}"
        if case.lengths and not self.packed:
            return "no sequences of unequal length"
        if case.hx or case.unbatched or not case.bias:
            return "not written for this benchmark: hx, unbatched input, no bias"
        return None

    def floor_ulps(self, dtype: torch.dtype) -> float:
        """Units of rounding that its error may have, however small torch.nn.RNN's is."""
        return testing.FLOOR_ULPS

    def load(self, case: BenchmarkCase, mode: str, threads: int) -> Loaded:
        """Convert, compile, allocate: everything that one call need not do.

        Parameters
        ----------
        case : BenchmarkCase
            A case for which `unsupported` is None.
        mode : str
            One of `cases.MODES`. In training the gradients are those of weights and biases.
        threads : int
            How many to use. The process is of the peer alone, its environment as in run.py.

        Returns
        -------
        Loaded
            Its functions are called under `torch.inference_mode` for inference.
        """
        raise NotImplementedError


class Problem:
    """The numbers of a case, the same for every peer.

    Attributes
    ----------
    weights : dict of str to Tensor
        torch.nn.RNN's parameters, by name and in its order.
    layers : list of list of tuple of Tensor
        The same for each layer and direction: ``(w_ih, w_hh, b_ih, b_hh)``.
    x : Tensor
        (T, B, I); zeros after the end of a shorter sequence.
    lengths : Tensor or None
        Of the sequences, in the caller's order.
    """

    def __init__(self, case: BenchmarkCase) -> None:
        module = case.module(torch.nn.RNN, case.dtype)
        self.weights = {name: weight.detach() for name, weight in module.named_parameters()}
        flat = list(self.weights.values())
        cells = [tuple(flat[i : i + 4]) for i in range(0, len(flat), 4)]
        directions = 2 if case.bidirectional else 1
        self.layers = [cells[i : i + directions] for i in range(0, len(cells), directions)]
        self._case = case
        self.x, self.lengths = self._case.input(), None
        if isinstance(self.x, PackedSequence):
            self.x, self.lengths = pad_packed_sequence(self.x)
        self.x = self.time_first(self.x)

    def cotangent(self) -> Tensor:
        """Draw the gradient of the output, (T, B, features)."""
        assert not self._case.lengths
        return self.time_first(self._case.cotangent())

    def time_first(self, tensor: Tensor) -> Tensor:
        """A tensor in the case's layout as (T, B, features)."""
        return (tensor.transpose(0, 1) if self._case.batch_first else tensor).contiguous()

    def output(self, padded: Tensor) -> Tensor:
        """An output (T, B, features), of a packed case the data of the packed sequence."""
        if self.lengths is None:
            return padded
        return pack_padded_sequence(padded, self.lengths, enforce_sorted=False).data


def module_steps(
    module: torch.nn.Module,
    parameters: dict[str, Tensor],
    x: Tensor | PackedSequence,
    cotangent: Tensor,
    mode: str,
    batch_first: bool = False,
) -> Loaded:
    """The calls of a PyTorch module that returns output and h_n.

    Parameters
    ----------
    module : Module
        Called with `x`.
    parameters : dict of str to Tensor
        The module's, by the names that torch.nn.RNN gives them.
    x, cotangent : Tensor or PackedSequence
        The input and the gradient of the output.
    mode : str
        One of `cases.MODES`.
    batch_first : bool
        The layout of `x`, `cotangent` and the output.
    """
    module.train(mode == "training")

    def infer() -> Any:
        return module(x)

    def train() -> None:
        output, _ = module(x)
        torch.autograd.backward(numbers(output), cotangent)
        module.zero_grad(set_to_none=True)

    def results() -> dict[str, Tensor]:
        output, h_n = module(x)
        found = {"output": numbers(output)}
        if mode == "inference":
            found["h_n"] = h_n
        else:
            torch.autograd.backward(numbers(output), cotangent)
            for name, weight in parameters.items():
                # w_hh has no gradient where a loop of one step does not use it.
                gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
                found[f"grad_{name}"] = gradient
            module.zero_grad(set_to_none=True)
        if batch_first:
            found["output"] = found["output"].transpose(0, 1)
        return {name: tensor.detach() for name, tensor in found.items()}

    return Loaded(infer if mode == "inference" else train, results)


def version(package: str) -> str | None:
    """The installed version of a distribution; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
