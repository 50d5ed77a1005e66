# SPDX-License-Identifier: Apache-2.0
"""Results of a case against torch.nn.RNN's, and how the CPU runs it."""

from contextlib import contextmanager, nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastrnn import _C, testing

PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
OTHER_PRODUCTS = ("addbmm", "addmv", "baddbmm", "bmm", "dot", "linear", "matmul", "mv")


class ExactProducts(TorchDispatchMode):
    """In its scope PyTorch makes matrix products in float64 and rounds each once.

    So what nn.RNN makes of 16 bits is the same on every processor. Else it is up to the product
    that PyTorch takes there: how it adds up, and what NaN and infinity in one row do to others.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in OTHER_PRODUCTS, f"{name} is not made in float64"
        if func not in PRODUCTS:
            return func(*args, **(kwargs or {}))
        return func(*(t.double() for t in args), **(kwargs or {})).to(args[0].dtype)


def exact_run(case, dtype):
    """A float64 run on the numbers that `dtype` can hold."""
    return testing.run(case.module(torch.nn.RNN, dtype).double(), case, dtype)


def assert_as_accurate_as_nn_rnn(ours, case, dtype, exact=None):
    with ExactProducts() if dtype.itemsize == 2 else nullcontext():
        theirs = testing.run(case.module(torch.nn.RNN, dtype), case, dtype)
    exact = exact_run(case, dtype) if exact is None else exact
    if case.nonlinearity == "relu" and dtype.itemsize == 2:
        # A state that rounds to the other side of relu's kink changes a gradient by all of it, in
        # either library. At given states, test_operators.py compares gradients.
        ours = {name: ours[name] for name in ("output", "h_n")}
        theirs = {name: theirs[name] for name in ours}
    testing.assert_as_accurate(ours, theirs, exact, dtype)


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def steps_of(case):
    return max(case.lengths) if case.lengths else case.T


def layer_plans(case, dtype=torch.float32):
    """The plan of each layer."""
    D = 1 + case.bidirectional
    packed = (len(case.lengths), sum(case.lengths)) if case.lengths else None
    B, rows = packed or (case.B, None)
    return [
        _C.cpu_plan(steps_of(case), B, I, case.H, D, dtype, rows)
        for I in [case.I] + [case.H * D] * (case.num_layers - 1)
    ]


def outputs(module, case, dtype=torch.float32):
    """(output, h_n) of a module for the case's arguments."""
    inputs, hx = case.arguments(dtype)
    if not case.lengths:
        return module(inputs[0], hx)
    output, h_n = module(torch.nn.utils.rnn.pack_sequence(inputs, enforce_sorted=False), hx)
    return output.data, h_n
