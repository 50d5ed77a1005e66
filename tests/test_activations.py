# SPDX-License-Identifier: Apache-2.0
"""tanh as the kernels compute it: one step with identity weights gives it of each number."""

import pytest
import torch

import fastrnn
from fastrnn import _C

WIDTH = 64
BITS = {torch.float32: torch.int32, torch.float64: torch.int64}
every_dtype = pytest.mark.parametrize("dtype", BITS, ids=lambda dtype: str(dtype)[6:])


def tanh(x):
    """Elementwise; x: a multiple of WIDTH numbers, of which a row with an infinite one is NaN."""
    module = fastrnn.RNN(WIDTH, WIDTH, bias=False, dtype=x.dtype)
    with torch.no_grad():
        torch.nn.init.eye_(module.weight_ih_l0)
        return module(x.view(1, -1, WIDTH))[0].reshape(x.shape)


def magnitudes(dtype):
    """Ascending runs of neighbours in every binade, subnormal numbers and the largest included."""
    mantissa = {torch.float32: 23, torch.float64: 52}[dtype]
    end = torch.tensor(torch.inf, dtype=dtype).view(BITS[dtype])
    run = 2**20 // int(end >> mantissa)
    first = torch.arange(0, int(end), 2**mantissa, dtype=BITS[dtype])
    generator = torch.Generator().manual_seed(0)
    offset = torch.randint(2**mantissa - run, first.shape, generator=generator, dtype=BITS[dtype])
    starts = torch.cat([first, first + offset, first + (2**mantissa - run)])
    bits = (starts.sort().values[:, None] + torch.arange(run, dtype=BITS[dtype])).flatten()
    bits = bits.unique()
    return bits[: len(bits) // WIDTH * WIDTH].view(dtype)


@every_dtype
def test_tanh_is_near_the_exact_one_odd_and_monotone(dtype):
    x = magnitudes(dtype)
    assert x[0] == 0 and torch.finfo(dtype).max / 2 < x[-1]
    y, exact = tanh(x), torch.tanh(x.double())
    spacing = torch.nextafter(exact.to(dtype), torch.tensor(2.0, dtype=dtype)).double() - exact.to(
        dtype
    )
    fused = _C.cpu_capability() != "default"
    allowed = (1.05 if fused else 1.55) + (dtype == torch.float64)  # the reference errs too
    assert ((y.double() - exact).abs() / spacing).max() < allowed
    assert torch.equal(tanh(-x), -y)
    # Without fused multiply-add neighbours may be in the wrong order, by the last bits.
    slack = 0 if fused else 2 * spacing[1:]
    assert (y.double().diff() >= -slack).all()
    assert y[-1] == 1


@every_dtype
@pytest.mark.parametrize("hidden_size", [1, 5, WIDTH])
def test_tanh_of_what_is_no_finite_number(dtype, hidden_size):
    module = fastrnn.RNN(1, hidden_size, bias=False, dtype=dtype)
    with torch.no_grad():
        module.weight_ih_l0.fill_(1)
        x = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0, 0.0], dtype=dtype)
        y = module(x.view(1, -1, 1))[0][0]
    for column in y.T:
        assert torch.equal(column[[0, 1]], torch.tensor([1.0, -1.0], dtype=dtype))
        assert column[2].isnan() and not column[[3, 4]].any()
