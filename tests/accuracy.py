# SPDX-License-Identifier: Apache-2.0
"""Results of a case against torch.nn.RNN's, and its sizes as the CPU's plan sees them."""

import torch

from fastrnn import _C, testing


def exact_run(case, dtype):
    """A float64 run on the numbers that `dtype` can hold."""
    return testing.run(case.module(torch.nn.RNN, dtype).double(), case, dtype)


def assert_as_accurate_as_nn_rnn(ours, case, dtype, exact=None):
    theirs = testing.run(case.module(torch.nn.RNN, dtype), case, dtype)
    exact = exact_run(case, dtype) if exact is None else exact
    if case.nonlinearity == "relu" and dtype.itemsize == 2:
        # A state that rounds to the other side of relu's kink changes a gradient by all of it, in
        # either library. At given states, test_operators.py compares gradients.
        ours = {name: ours[name] for name in ("output", "h_n")}
        theirs = {name: theirs[name] for name in ours}
    testing.assert_as_accurate(ours, theirs, exact, dtype)


def mean_sizes(case):
    """Steps and rows of a step; of packed data, those of the mean batch."""
    if not case.lengths:
        return case.T, case.B
    T = max(case.lengths)
    return T, -(-sum(case.lengths) // T)


def layer_plans(case, dtype, T, B):
    """The plan of each layer, for T steps of B rows."""
    D = 1 + case.bidirectional
    features = [case.I] + [case.H * D] * (case.num_layers - 1)
    return [_C.cpu_plan(T, B, I, case.H, D, dtype, case.hx) for I in features]
