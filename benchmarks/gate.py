# SPDX-License-Identifier: Apache-2.0
"""The gate before every measurement: no speed-up is reported for wrong results.

Results of fastrnn.RNN and torch.nn.RNN, with the same weights, are both measured against a float64
run by `fastrnn.testing.assert_as_accurate`, whose tolerances hold here too.
"""

from typing import Any

import torch
from cases import BenchmarkCase, numbers
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

import fastrnn
from fastrnn import testing

#: So many sums before relu that some lie within rounding of zero, and how many may.
MANY_SUMS, KINKS = 10**6, 8


def failure(case: BenchmarkCase, cls: Any = fastrnn.RNN) -> str | None:
    """Compare training and inference of `cls` with torch.nn.RNN's.

    Parameters
    ----------
    case : BenchmarkCase
        What to run.
    cls : type
        The class that is to be measured.

    Returns
    -------
    str or None
        What is wrong, an exception included; None if nothing is.
    """
    try:
        theirs, ours = (case.module(c, case.dtype) for c in (torch.nn.RNN, cls))
        exact = case.module(torch.nn.RNN, case.dtype).double()
        assert_right(results(ours, case), results(theirs, case), results(exact, case), case)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
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
    """Everything that the measured calls compute, by name: results, gradients, inference's own."""
    own = next(module.parameters()).dtype
    inputs = [x.to(own) for x in case.arguments(case.dtype)[0]]
    x = pack_sequence(inputs, enforce_sorted=False) if case.lengths else inputs[0]
    with torch.inference_mode():
        output, h_n = module(x)
        inferred = {"inference_output": numbers(output), "inference_h_n": h_n}
        inferred = {name: tensor.double() for name, tensor in inferred.items()}
    return testing.run(module, case, case.dtype) | inferred
