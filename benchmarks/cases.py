# SPDX-License-Identifier: Apache-2.0
"""What is measured: the cases, each with its reason, and one call of a class in a mode.

A new case is one line in `CASES`; everything else reads that list. In files and on command lines a
case is what `BenchmarkCase.spec` and `parse_shape` say.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fastrnn
from fastrnn.testing import Case

#: What is compared, by its name in results.
CLASSES: dict[str, Any] = {"nn_rnn": torch.nn.RNN, "fastrnn": fastrnn.RNN}
MODES = ("inference", "training")


@dataclass(frozen=True, kw_only=True)
class BenchmarkCase(Case):
    """A call of an RNN as in the tests, with its name, its dtype and why it is measured.

    With `lengths`, `T` and `B` are the longest and the number of the packed sequences.
    """

    name: str
    reason: str
    dtype: torch.dtype = torch.float32

    def spec(self) -> dict[str, Any]:
        """What the case is, fit for JSON: name, sizes and what is not the default."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        defaults = {field.name: field.default for field in fields(self)}
        spec = {"name": self.name}
        spec |= {k: v for k, v in values.items() if v != defaults[k] and k != "reason"}
        return spec | ({"dtype": dtype_name(self)} if "dtype" in spec else {})

    def step(self, class_name: str, mode: str) -> Callable[[], None]:
        """Make the function that is measured: one inference, or one step of training.

        Parameters
        ----------
        class_name : str
            A key of `CLASSES`.
        mode : str
            ``"inference"``: the forward pass, which the caller runs under `torch.inference_mode`.
            ``"training"``: forward, backward from a fixed gradient of the output, gradients back
            to None. The input needs no gradient.

        Returns
        -------
        callable
            Weights, input and the output's gradient are made here, not in the call.
        """
        module = self.module(CLASSES[class_name], self.dtype).train(mode == "training")
        x, cotangent = self.input(), self.cotangent()

        def infer() -> None:
            module(x)

        if mode == "inference":
            return infer

        def train() -> None:
            output, _ = module(x)
            torch.autograd.backward(numbers(output), cotangent)
            module.zero_grad(set_to_none=True)

        return train

    def input(self) -> Tensor | PackedSequence:
        """Draw what the module is called with."""
        inputs, _ = self.arguments(self.dtype)
        return pack_sequence(inputs, enforce_sorted=False) if self.lengths else inputs[0]

    def cotangent(self) -> Tensor:
        """Draw the gradient of the output's `numbers`."""
        features = self.H * (2 if self.bidirectional else 1)
        rows = (self.B, self.T) if self.batch_first else (self.T, self.B)
        size = (sum(self.lengths),) if self.lengths else rows
        generator = torch.Generator().manual_seed(1)
        return torch.randn(*size, features, generator=generator).to(self.dtype)


def numbers(output: Tensor | PackedSequence) -> Tensor:
    """The tensor of an output, packed or not."""
    return output.data if isinstance(output, PackedSequence) else output


def dtype_name(case: BenchmarkCase) -> str:
    """The dtype of a case in plain letters."""
    return str(case.dtype).removeprefix("torch.")


def from_spec(spec: dict[str, Any]) -> BenchmarkCase:
    """The case of a `BenchmarkCase.spec`, without its reason."""
    lengths = spec.get("lengths")
    return BenchmarkCase(
        **{
            **spec,
            "reason": "",
            "dtype": getattr(torch, spec.get("dtype", "float32")),
            "lengths": tuple(lengths) if lengths else None,
        }
    )


def by_name(name: str) -> BenchmarkCase:
    """The case of this name.

    Raises
    ------
    KeyError
        If there is none.
    """
    return {case.name: case for case in CASES}[name]


def parse_shape(text: str) -> BenchmarkCase:
    """The case of a command line.

    Parameters
    ----------
    text : str
        ``T,B,I,H``, then any of ``dtype=bfloat16``, ``nonlinearity=relu``, ``num_layers=2``,
        ``bidirectional=1``, ``batch_first=1``, ``bias=0``, and ``lengths=5:3:3`` or
        ``lengths=1-50``: B lengths, evenly from 1 to 50.

    Raises
    ------
    ValueError
        If it is none.
    """
    sizes, options = text.split(",")[:4], text.split(",")[4:]
    T, B, I, H = map(int, sizes)
    made: dict[str, Any] = {}
    for option in options:
        key, value = option.split("=")
        if key == "dtype":
            made[key] = getattr(torch, value)
        elif key == "nonlinearity":
            made[key] = value
        elif key == "lengths" and "-" in value:
            low, high = map(int, value.split("-"))
            made[key] = tuple(round(low + (high - low) * i / max(B - 1, 1)) for i in range(B))
        elif key == "lengths":
            made[key] = tuple(map(int, value.split(":")))
        elif key == "num_layers":
            made[key] = int(value)
        elif key in ("bidirectional", "batch_first", "bias"):
            made[key] = bool(int(value))
        else:
            raise ValueError(f"no option {key}")
    if "lengths" in made:
        T, B = max(made["lengths"]), len(made["lengths"])
    return BenchmarkCase(T, B, I, H, name=text, reason="asked for", **made)


CASES = [
    BenchmarkCase(9, 1, 1, 1, name="tiny", reason="the example by hand: bookkeeping alone"),
    BenchmarkCase(100, 1, 1, 1, name="scalar", reason="the cost of a step without arithmetic"),
    BenchmarkCase(50, 32, 2, 16, name="small", reason="few features"),
    BenchmarkCase(1, 1, 64, 64, name="one-step", reason="streaming: one step in each call"),
    BenchmarkCase(1, 8, 64, 64, name="one-step-batch", reason="streaming: eight at once"),
    BenchmarkCase(1000, 1, 64, 64, name="long", reason="one long sequence: the latency of a step"),
    BenchmarkCase(1000, 16, 32, 32, name="long-batch", reason="a small batch of long sequences"),
    BenchmarkCase(100, 32, 64, 64, name="medium-64", reason="common size, weights of 16 KB"),
    BenchmarkCase(100, 1, 128, 128, name="row-128", reason="one sequence, weights of 64 KB"),
    BenchmarkCase(100, 32, 128, 128, name="medium-128", reason="common size, weights of 64 KB"),
    BenchmarkCase(100, 32, 128, 128, name="relu", reason="a step without tanh",
                  nonlinearity="relu"),
    BenchmarkCase(100, 32, 128, 128, name="two-layers", reason="layers", num_layers=2),
    BenchmarkCase(100, 32, 128, 128, name="bidirectional", reason="directions",
                  bidirectional=True),
    BenchmarkCase(100, 1, 128, 128, name="row-layers", reason="layers of one sequence",
                  num_layers=4),
    BenchmarkCase(20, 32, 2, 32, name="dc-motor", reason="the shape of the example",
                  nonlinearity="relu", batch_first=True),
    BenchmarkCase(30, 64, 1, 64, name="forecast", reason="everyday: series of one feature",
                  batch_first=True),
    BenchmarkCase(50, 128, 4, 128, name="sensors", reason="everyday: few features, two layers",
                  batch_first=True, num_layers=2),
    BenchmarkCase(100, 64, 256, 256, name="large-256", reason="products begin to dominate"),
    BenchmarkCase(100, 1, 256, 256, name="row-256", reason="one sequence, weights of 256 KB"),
    BenchmarkCase(100, 1, 512, 512, name="row-512", reason="reads 1 MB of weights in each step"),
    BenchmarkCase(50, 64, 512, 512, name="large-512", reason="bound by arithmetic"),
    BenchmarkCase(20, 1, 1024, 1024, name="row-1024", reason="reads 4 MB of weights in each step"),
    BenchmarkCase(30, 64, 1024, 1024, name="large-1024", reason="PyTorch's BLAS at its best"),
    BenchmarkCase(20, 200, 2, 4096, name="huge-4096", reason="reads 64 MB of weights in each step",
                  nonlinearity="relu"),
    BenchmarkCase(10, 1024, 1, 16, name="wide-batch", reason="many short series of one feature",
                  nonlinearity="relu"),
    BenchmarkCase(100, 32, 128, 128, name="stacked", reason="layers and directions",
                  num_layers=2, bidirectional=True),
    BenchmarkCase(100, 32, 64, 64, name="packed", reason="sequences of unequal length",
                  lengths=tuple(round(10 + 90 * i / 31) for i in range(32))),
    BenchmarkCase(50, 32, 64, 128, name="packed-from-1", reason="every length from 1 to T",
                  lengths=tuple(round(1 + 49 * i / 31) for i in range(32))),
    BenchmarkCase(100, 32, 64, 64, name="float64", reason="half as many numbers in a vector",
                  dtype=torch.float64),
    BenchmarkCase(100, 32, 128, 128, name="bfloat16", reason="16 bits, in their own instructions",
                  dtype=torch.bfloat16),
    BenchmarkCase(100, 32, 256, 256, name="bfloat16-256", reason="16 bits, weights of 128 KB",
                  dtype=torch.bfloat16),
    BenchmarkCase(50, 64, 512, 512, name="large-bfloat16", reason="products in 16 bits",
                  dtype=torch.bfloat16),
    BenchmarkCase(50, 16, 64, 64, name="float16", reason="16 bits, computed in float32",
                  dtype=torch.float16),
]  # fmt: skip

#: The shape of the study of scaling, and what each of its numbers is varied to, itself included.
COMMON = {"T": 100, "B": 32, "H": 128, "num_layers": 1}
VARIED = {
    "T": [1, 3, 10, 30, 100, 300, 1000],
    "B": [1, 2, 4, 8, 16, 32, 64, 128, 256],
    "H": [8, 16, 32, 64, 128, 256, 512, 1024],
    "num_layers": [1, 2, 4, 8],
}


def scaled(varied: str, value: int) -> BenchmarkCase:
    """The common shape with one of its numbers changed; I = H."""
    sizes = {**COMMON, varied: value}
    name = "base" if sizes == COMMON else f"{varied}-{value}"
    return BenchmarkCase(**sizes, I=sizes["H"], name=name, reason=f"against {varied}")


#: The common shape once.
SCALING = list(
    {
        case.name: case
        for case in (scaled(varied, value) for varied in VARIED for value in VARIED[varied])
    }.values()
)

#: Rows or columns of a step, parts of the batch, layers: what threads share.
BUSY = [by_name(name) for name in ("medium-64", "medium-128", "row-256", "row-layers", "large-256")]
