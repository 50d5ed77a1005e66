# SPDX-License-Identifier: Apache-2.0
"""The gate before a peer is timed: its results against torch.nn.RNN's, as in gate.py."""

from dataclasses import dataclass

import gate
import torch
from cases import BenchmarkCase
from torch import Tensor

from .interface import Peer
from .torch_modules import NnRnn


@dataclass(frozen=True)
class Reference:
    """Results of torch.nn.RNN, in the case's dtype and in float64, by `Loaded.results`' names."""

    theirs: dict[str, Tensor]
    exact: dict[str, Tensor]


def compute(case: BenchmarkCase) -> Reference:
    """Run torch.nn.RNN once in each precision, on the same numbers."""
    theirs = {}
    for mode in ("inference", "training"):
        with torch.inference_mode(mode == "inference"):
            theirs |= NnRnn().load(case, mode, torch.get_num_threads()).results()
    module = case.module(torch.nn.RNN, case.dtype).double()
    parameters = dict(module.named_parameters())
    x, cotangent = case.input().to(torch.float64), case.cotangent().double()
    output, h_n = module(x)
    data = output.data if case.lengths else output
    gradients = torch.autograd.grad(data, list(parameters.values()), cotangent)
    if case.batch_first and not case.lengths:
        data = data.transpose(0, 1)
    exact = {"output": data.detach(), "h_n": h_n.detach()}
    exact |= {f"grad_{n}": g for n, g in zip(parameters, gradients, strict=True)}
    return Reference({name: tensor.double() for name, tensor in theirs.items()}, exact)


def failure(
    peer: Peer, case: BenchmarkCase, mode: str, results: dict[str, Tensor], reference: Reference
) -> str | None:
    """What is wrong with a peer's results; None if nothing is."""
    needed = {"output"} if mode == "inference" else reference.exact.keys() - {"output", "h_n"}
    if needed - results.keys():
        return f"without {', '.join(sorted(needed - results.keys()))}"
    try:
        gate.assert_right(
            {name: tensor.double() for name, tensor in results.items()},
            {name: reference.theirs[name] for name in results},
            reference.exact,
            case,
            peer.floor_ulps(case.dtype),
        )
    except AssertionError as error:
        return str(error) or "other shapes"
    return None
