# SPDX-License-Identifier: Apache-2.0
"""The pair that most tests look at: fastrnn.RNN and torch.nn.RNN with equal weights and inputs.

Contract: everything here is small, float64 unless told otherwise, and the same at every call. On a
GPU, ours is compared with nn.RNN on the CPU: cuDNN refuses a second derivative, and a backward in
eval mode.
"""

from typing import NamedTuple

import torch
from torch.nn.utils.rnn import PackedSequence

import fastrnn
from fastrnn import testing

T, B, I, H = 3, 2, 2, 3
LENGTHS = {"sorted": [3, 2, 1], "unsorted": [1, 3, 2]}


class Setting(NamedTuple):
    """What distinguishes one RNN from another; the same for both classes."""

    nonlinearity: str = "tanh"
    num_layers: int = 2
    bidirectional: bool = True
    bias: bool = True
    batch_first: bool = False

    def __str__(self):
        flags = [f for f in ("bidirectional", "bias", "batch_first") if getattr(self, f)]
        return "-".join([self.nonlinearity, str(self.num_layers), *flags])


def tensor(value):
    return value.data if isinstance(value, PackedSequence) else value


def draw(*shape, seed=0, requires_grad=True, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)
    return x.requires_grad_() if requires_grad else x


def pair(setting=Setting(), dropout=0.0, sizes=(I, H)):  # noqa: B008 - immutable
    """Our module and nn.RNN with equal weights, both on the CPU."""
    torch.manual_seed(0)
    theirs = torch.nn.RNN(*sizes, dropout=dropout, dtype=torch.float64, **setting._asdict())
    ours = fastrnn.RNN(*sizes, dropout=dropout, dtype=torch.float64, **setting._asdict())
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def arguments(setting=Setting(), steps=T, batch=B, sizes=(I, H), device="cpu"):  # noqa: B008
    """Input and hx: leaves."""
    shape = (batch, steps) if setting.batch_first else (steps, batch)
    rows = setting.num_layers * (1 + setting.bidirectional)
    x = draw(*shape, sizes[0], seed=1, device=device)
    return x, draw(rows, batch, sizes[1], seed=2, device=device)


def sequences(lengths, device="cpu"):
    """One leaf of each length, to be packed."""
    return [draw(n, I, seed=n, device=device) for n in lengths]


def our_call(device, setting=Setting(), dropout=0.0, **shape):  # noqa: B008
    """Our module on `device`, and input and hx there."""
    module = pair(setting, dropout, shape.get("sizes", (I, H)))[0].to(device)
    return module, *arguments(setting, device=device, **shape)


def same(ours, theirs):
    """Equal up to rounding, norm by norm, wherever they are; None only beside None."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            difference = (a.cpu() - b.cpu()).norm()
            assert difference <= testing.FLOAT64_DIFFERENCE * max(b.norm().item(), 1e-3)


def of_both(compute, setting=Setting(), device="cpu", dropout=0.0, **shape):  # noqa: B008
    """compute(module, x, hx) must agree: ours on `device`, nn.RNN on the CPU, from fresh leaves.

    `shape`: steps, batch and sizes, as `arguments` takes them.
    """
    theirs = pair(setting, dropout, shape.get("sizes", (I, H)))[1]
    same(
        compute(*our_call(device, setting, dropout, **shape)),
        compute(theirs, *arguments(setting, **shape)),
    )


def weighted(x):
    """A scalar of x with other slopes from element to element, that every dtype holds; not drawn,
    for vmap's sake."""
    slopes = torch.arange(x.numel(), dtype=torch.float64).add(1).cos().bfloat16()
    return (x * slopes.to(x.device, x.dtype).view(x.shape)).sum()
