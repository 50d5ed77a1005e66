# SPDX-License-Identifier: Apache-2.0
"""The pair that most tests look at: fastrnn.RNN and torch.nn.RNN with equal weights and inputs.

Contract: everything here is small, float64 unless told otherwise, and the same at every call.
"""

from typing import NamedTuple

import torch

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


def draw(*shape, seed=0, requires_grad=True):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return x.requires_grad_() if requires_grad else x


def pair(setting=Setting(), dropout=0.0, sizes=(I, H)):  # noqa: B008 - immutable
    """Our module and nn.RNN with equal weights."""
    torch.manual_seed(0)
    theirs = torch.nn.RNN(*sizes, dropout=dropout, dtype=torch.float64, **setting._asdict())
    ours = fastrnn.RNN(*sizes, dropout=dropout, dtype=torch.float64, **setting._asdict())
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def arguments(setting=Setting(), steps=T, batch=B, sizes=(I, H)):  # noqa: B008
    x = draw(*((batch, steps) if setting.batch_first else (steps, batch)), sizes[0], seed=1)
    return x, draw(setting.num_layers * (1 + setting.bidirectional), batch, sizes[1], seed=2)


def same(ours, theirs):
    """Equal up to rounding, norm by norm; None only beside None."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert (a - b).norm() <= testing.FLOAT64_DIFFERENCE * max(b.norm(), 1e-3)


def of_both(compute, setting=Setting(), **options):  # noqa: B008
    """compute(module, x, hx) for both modules, from fresh leaves each, must agree."""
    same(*(compute(module, *arguments(setting)) for module in pair(setting, **options)))


def weighted(x):
    """A scalar of x with a different slope at every element; no random draw, for vmap's sake."""
    return (x * torch.arange(x.numel(), dtype=x.dtype).add(1).cos().view(x.shape)).sum()
