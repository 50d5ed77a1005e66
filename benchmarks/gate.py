# SPDX-License-Identifier: Apache-2.0
"""The gate before every measurement: wrong results are not timed.

Results are measured against a float64 run, as those of torch.nn.RNN with the same weights are, by
`fastrnn.testing.assert_as_accurate`, whose tolerances hold here too.
"""

from dataclasses import dataclass
from typing import Any

import torch
from cases import BenchmarkCase, numbers
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

from fastrnn import testing

#: So many sums before relu that some lie within rounding of zero, and how many may.
MANY_SUMS, KINKS = 10**6, 8


@dataclass(frozen=True)
class Reference:
    """Results of torch.nn.RNN, in the case's dtype and in float64, by name."""

    theirs: dict[str, Tensor]
    exact: dict[str, Tensor]


def reference(case: BenchmarkCase) -> Reference:
    """What the measured calls compute, by torch.nn.RNN."""
    module = case.module(torch.nn.RNN, case.dtype)
    theirs = called(module, case)
    return Reference(theirs, called(module.double(), case))


def called(module: Any, case: BenchmarkCase) -> dict[str, Tensor]:
    """Results of a measured call in float64: ``output``, time first, ``h_n``, ``grad_<weight>``."""
    parameters = dict(module.named_parameters())
    own = next(iter(parameters.values())).dtype
    output, h_n = module(case.input().to(own))
    data = numbers(output)
    gradients = torch.autograd.grad(data, list(parameters.values()), case.cotangent().to(own))
    if case.batch_first and not case.lengths:
        data = data.transpose(0, 1)
    found = {"output": data.detach(), "h_n": h_n.detach()}
    found |= {f"grad_{n}": g for n, g in zip(parameters, gradients, strict=True)}
    return {name: tensor.double() for name, tensor in found.items()}


def wrong(
    results: dict[str, Tensor],
    case: BenchmarkCase,
    mode: str,
    reference: Reference,
    floor_ulps: float = testing.FLOOR_ULPS,
) -> str | None:
    """What is wrong with the results of one call; None if nothing is.

    Parameters
    ----------
    results : dict of str to Tensor
        By the names of `called`; in training without ``h_n``, in inference without gradients.
    case : BenchmarkCase
        What was run.
    mode : str
        One of `cases.MODES`.
    reference : Reference
        What it should be.
    floor_ulps : float
        As of `testing.assert_as_accurate`.
    """
    needed = {"output"} if mode == "inference" else reference.exact.keys() - {"h_n"}
    if needed - results.keys():
        return f"without {', '.join(sorted(needed - results.keys()))}"
    theirs = {name: reference.theirs[name] for name in results}
    ours = {name: tensor.double() for name, tensor in results.items()}
    try:
        assert_right(ours, theirs, reference.exact, case, floor_ulps)
    except AssertionError as error:
        return str(error)
    return None


def assert_right(
    ours: dict[str, Tensor],
    theirs: dict[str, Tensor],
    exact: dict[str, Tensor],
    case: BenchmarkCase,
    floor_ulps: float = testing.FLOOR_ULPS,
) -> None:
    """As `testing.assert_as_accurate`, with room for relu's kink in the gradients of large cases.

    A sum within rounding of zero may fall on either side of it, and its output's derivative is then
    0 or 1. Of ten million sums a few do, in torch.nn.RNN as well but not the same ones; each moves
    the gradients by about one part in the root of their number.
    """
    sums = case.T * case.B * case.H
    if case.nonlinearity != "relu" or sums < MANY_SUMS:
        testing.assert_as_accurate(ours, theirs, exact, case.dtype, floor_ulps)
        return
    kinks = KINKS * sums**-0.5 / torch.finfo(case.dtype).eps
    for of_gradients, floor in ((False, floor_ulps), (True, max(floor_ulps, kinks))):
        parts = [
            {name: t for name, t in each.items() if name.startswith("grad_") is of_gradients}
            for each in (ours, theirs, exact)
        ]
        testing.assert_as_accurate(*parts, case.dtype, floor)


def results(module: Any, case: BenchmarkCase) -> dict[str, Tensor]:
    """More than measured calls compute, for modules: every gradient, and inference's results."""
    own = next(module.parameters()).dtype
    inputs = [x.to(own) for x in case.arguments(case.dtype)[0]]
    x = pack_sequence(inputs, enforce_sorted=False) if case.lengths else inputs[0]
    with torch.inference_mode():
        output, h_n = module(x)
        inferred = {"inference_output": numbers(output), "inference_h_n": h_n}
        inferred = {name: tensor.double() for name, tensor in inferred.items()}
    return testing.run(module, case, case.dtype) | inferred
