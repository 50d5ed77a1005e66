# SPDX-License-Identifier: Apache-2.0
"""Results of a case against torch.nn.RNN's and the reference's, and how the CPU runs it."""

from contextlib import contextmanager, nullcontext

import torch
from torch.nn.utils.rnn import pack_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import fastrnn
from fastrnn import _C, reference, testing

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
    output, h_n = module(pack_sequence(inputs, enforce_sorted=False), hx)
    return output.data, h_n


def exact(t):
    """The same numbers in float64, on the CPU."""
    return t.cpu().double()


def rows_of(t):
    """[T, B, N] or [rows, N] as the reference has it."""
    return exact(t).reshape(-1, t.size(-1))


class OperatorCall:
    """The arguments of rnn_forward and rnn_backward for a case, and of the reference."""

    def __init__(self, case, dtype, device="cpu"):
        inputs, hx = case.arguments(dtype)
        self.batch_sizes = None
        if case.lengths:
            packed = pack_sequence(inputs, enforce_sorted=False)
            self.input, self.batch_sizes = packed.data, packed.batch_sizes
            self.sizes = packed.batch_sizes.tolist()
            hx = hx if hx is None else hx[:, packed.sorted_indices]
        else:
            x = inputs[0].unsqueeze(1) if case.unbatched else inputs[0]
            self.input = x.transpose(0, 1) if case.batch_first and not case.unbatched else x
            self.sizes = [self.input.size(1)] * self.input.size(0)
            hx = hx.unsqueeze(1) if case.unbatched and hx is not None else hx
        self.input, self.hx = (t if t is None else t.to(device) for t in (self.input, hx))
        module = case.module(fastrnn.RNN, dtype).to(device)
        self.weights = [w.detach() for w in module.parameters()]
        self.options = (case.nonlinearity, case.bias, case.num_layers, case.bidirectional)
        self.named = {n: getattr(case, n) for n in ("nonlinearity", "bias", "bidirectional")}

    def forward(self):
        return torch.ops.fastrnn.rnn_forward(
            self.input, self.hx, self.weights, self.batch_sizes, *self.options, True
        )

    def backward(self, grad_output, grad_h_n, layer_outputs):
        return torch.ops.fastrnn.rnn_backward(
            grad_output, grad_h_n, self.input, self.hx, self.weights, self.batch_sizes,
            layer_outputs, *self.options, [True] * (len(self.weights) + 2),
        )  # fmt: skip

    def exact_arguments(self, h_n):
        """The reference's: rows, hx and weights, and the rows of each step."""
        hx = torch.zeros_like(h_n) if self.hx is None else self.hx
        return rows_of(self.input), exact(hx), [exact(w) for w in self.weights], self.sizes


def backward_errors(call):
    """Errors of the gradients, by name, against the reference's at the states that were found.

    So they are of backward alone: a state that rounds to the other side of relu's kink is the same
    for both.
    """
    output, h_n, layer_outputs = call.forward()
    generator = torch.Generator().manual_seed(1)
    slopes = [
        torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype)
        for t in (output, h_n)
    ]
    # A GPU's products refuse to be deterministic without a setting.
    with nullcontext() if output.is_cuda else testing.poisoned_memory():
        found = call.backward(*(s.to(output.device) for s in slopes), layer_outputs)
    right = reference.rnn_backward(
        rows_of(slopes[0]), exact(slopes[1]), *call.exact_arguments(h_n),
        [rows_of(y) for y in layer_outputs], **call.named,
    )  # fmt: skip
    ours = testing.grouped(named(rows_of(found[0]), *found[1:]))
    return {
        name: testing.relative_error(exact(ours[name]), value)
        for name, value in testing.grouped(named(*right)).items()
    }


def named(grad_input, grad_hx, grad_weights):
    weights = {str(i): w for i, w in enumerate(grad_weights)}
    return {n: t.cpu() for n, t in {"input": grad_input, "hx": grad_hx, **weights}.items()}


def float32_drift(sizes):
    """What errors in float32 are allowed: those of sums grow with the root of their rows."""
    return 1e-6 * max(1.0, sum(sizes) / 1000) ** 0.5
