# SPDX-License-Identifier: Apache-2.0
"""How fastrnn is compared with PyTorch: one grid of cases, one measure of error.

An error is ``|ours - exact| / |exact|``, by norms. In float32 and 16 bits a float64 run is taken as
exact, and our error may be at most 1.5 times PyTorch's own.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

#: Our error may be this many times nn.RNN's.
ERROR_RATIO = 1.5
#: Errors below this many units of rounding are chance: a handful of numbers, each rounded once.
FLOOR_ULPS = 4
#: Results smaller than this are measured together.
FEW_NUMBERS = 8
#: A case's name lists at most this many lengths.
FEW_LENGTHS = 8
#: Largest relative difference between two float64 runs that add in different orders.
FLOAT64_DIFFERENCE = 1e-12


@dataclass(frozen=True)
class Case:
    """One call of an RNN: sizes, options, layout.

    `lengths` makes it packed, from sequences of these lengths in this order, and replaces `T` and
    `B`; `unbatched` makes the input ``(T, I)``, with `B` equal to 1.
    """

    T: int
    B: int
    I: int
    H: int
    num_layers: int = 1
    bidirectional: bool = False
    nonlinearity: str = "tanh"
    bias: bool = True
    batch_first: bool = False
    hx: bool = False
    unbatched: bool = False
    lengths: tuple[int, ...] | None = None

    def __str__(self) -> str:
        flags = [n for n in ("bidirectional", "batch_first", "hx", "unbatched") if getattr(self, n)]
        flags += [] if self.bias else ["no bias"]
        if self.lengths and len(self.lengths) > FEW_LENGTHS:
            shortest, longest = min(self.lengths), max(self.lengths)
            flags += [f"{len(self.lengths)} lengths from {shortest} to {longest}"]
        elif self.lengths:
            flags += [f"lengths {self.lengths}".replace(", ", " ")]
        size = f"T{self.T} B{self.B} I{self.I} H{self.H} L{self.num_layers} {self.nonlinearity}"
        return " ".join([size, *flags])

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the constructor, besides the sizes."""
        names = ("num_layers", "nonlinearity", "bias", "batch_first", "bidirectional")
        return {name: getattr(self, name) for name in names}

    def arguments(self, dtype: torch.dtype, seed: int = 0) -> tuple[list[Tensor], Tensor | None]:
        """Draw the input, one tensor or the sequences to pack, and hx if there is one."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

        batch = len(self.lengths) if self.lengths else self.B
        if self.lengths:
            inputs = [draw(length, self.I) for length in self.lengths]
        elif self.unbatched:
            inputs = [draw(self.T, self.I)]
        else:
            inputs = [draw(*((batch, self.T) if self.batch_first else (self.T, batch)), self.I)]
        rows = self.num_layers * (2 if self.bidirectional else 1)
        state = (rows, self.H) if self.unbatched else (rows, batch, self.H)
        return inputs, draw(*state) if self.hx else None

    def module(self, cls: Any, dtype: torch.dtype, seed: int = 0) -> Any:
        """Make the module, with the same weights for every class and, but for rounding, dtype."""
        made = cls(self.I, self.H, **self.options, dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed)
        bound = self.H**-0.5
        with torch.no_grad():
            for weight in made.parameters():
                weight.uniform_(-bound, bound, generator=generator)
        return made.to(dtype)


def grid() -> list[Case]:
    """List the cases of the tests: every combination of options at one small size, then sizes.

    With two threads or more the sizes reach every path of the CPU's plan: tails of vectors and of
    tiles, one row and many, weights packed and not, the input's product fused and not, several
    parts of the batch, and backward in one chunk of steps, in two, and in more.
    """
    small = Case(5, 3, 4, 7)
    cases = [
        replace(small, num_layers=L, bidirectional=bi, nonlinearity=f, bias=bias,
                batch_first=batch_first, hx=hx)
        for L, bi, f, bias, batch_first, hx in itertools.product(
            (1, 2), (False, True), ("tanh", "relu"), (True, False), (False, True), (False, True))
    ]  # fmt: skip
    sizes = [(1, 1, 1, 1), (9, 1, 1, 1), (7, 13, 5, 17), (20, 33, 70, 65), (40, 16, 3, 32)]
    sizes += [(30, 1, 64, 64), (4, 2, 300, 300), (3, 40, 500, 320), (5, 6, 16, 416)]
    for size, f, bi in itertools.product(sizes, ("tanh", "relu"), (False, True)):
        cases.append(Case(*size, nonlinearity=f, bidirectional=bi, num_layers=2, hx=True))
        cases.append(Case(*size, nonlinearity=f, bidirectional=bi, batch_first=True, bias=not bi))
    for f, bi, hx in itertools.product(("tanh", "relu"), (False, True), (False, True)):
        cases.append(Case(6, 1, 4, 7, 2, bi, f, unbatched=True, hx=hx, batch_first=hx))
    lengths = [(5, 3, 2, 2, 1), (4, 4), (1, 1, 1), (3,), (2, 9, 30, 1, 7, 7)]
    for each, bi, hx in itertools.product(lengths, (False, True), (False, True)):
        for I, H in ((3, 5), (17, 40), (600, 330)):
            f = "relu" if hx != bi else "tanh"
            cases.append(Case(0, 0, I, H, 2, bi, f, bias=H != 40, hx=hx, lengths=each))
    # Backward in two chunks of one step.
    cases.append(Case(2, 320, 3, 40))
    cases.append(Case(0, 0, 3, 40, bidirectional=True, lengths=(2,) * 300 + (1,) * 50))
    # Backward with a middle chunk, in float32 too; two directions share one budget.
    cases += [Case(60, 560, 3, 64), Case(84, 100, 5, 130, bidirectional=True, hx=True)]
    # Backward in four chunks, W_hh larger than each: in float32 and float64 it is read as it is.
    for f, bi in (("tanh", False), ("relu", True)):
        cases.append(Case(19, 40, 6, 516, bidirectional=bi, nonlinearity=f, hx=bi))
    for H, many in ((112, range(70, 156)), (300, range(40, 94)), (160, range(8, 36))):
        cases.append(Case(0, 0, 5, H, bidirectional=True, hx=True, lengths=tuple(many)))
    return cases


def run(module: Any, case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Run `module` forward and backward, on numbers that `dtype` can hold, in its own dtype.

    Returns
    -------
    dict
        ``output``, ``h_n`` and the gradient of a random combination of both with respect to the
        input, hx and every weight, by name, in float64.
    """
    own = next(module.parameters()).dtype
    inputs, hx = case.arguments(dtype)
    inputs = [x.to(own).requires_grad_() for x in inputs]
    leaves = {f"grad_input{i}": x for i, x in enumerate(inputs)}
    if hx is not None:
        leaves["grad_hx"] = hx = hx.to(own).requires_grad_()
    leaves |= {f"grad_{name}": w for name, w in module.named_parameters()}
    packed = pack_sequence(inputs, enforce_sorted=False) if case.lengths else inputs[0]
    output, h_n = module(packed, hx)
    output = output.data if isinstance(output, PackedSequence) else output
    generator = torch.Generator().manual_seed(1)
    cotangents = [
        torch.randn(t.shape, generator=generator, dtype=torch.float64).to(dtype).to(own)
        for t in (output, h_n)
    ]
    gradients = torch.autograd.grad((output, h_n), list(leaves.values()), cotangents)
    results = {"output": output, "h_n": h_n, **dict(zip(leaves, gradients, strict=True))}
    return {name: t.detach().double() for name, t in results.items()}


def relative_error(value: Tensor, exact: Tensor) -> float:
    """|value - exact| / |exact| by Euclidean norms; the numerator where exact is zero."""
    norm = exact.norm().item()
    return float((value - exact).norm().item() / (norm if norm > 0 else 1.0))


def grouped(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join the small results: one number that cancels has no small relative error."""
    small = [t.flatten() for t in results.values() if t.numel() < FEW_NUMBERS]
    large = {name: t for name, t in results.items() if t.numel() >= FEW_NUMBERS}
    return {**large, "small results": torch.cat(small)} if small else large


def assert_as_accurate(
    ours: dict[str, Tensor],
    theirs: dict[str, Tensor],
    exact: dict[str, Tensor],
    dtype: torch.dtype,
    floor_ulps: float = FLOOR_ULPS,
) -> None:
    """Assert that every result is at most `ERROR_RATIO` times as far from `exact` as theirs.

    Errors below `floor_ulps` pass. In float64 nothing is more exact, so the two may differ by
    `FLOAT64_DIFFERENCE`.

    Raises
    ------
    AssertionError
        With the name and the errors of every result that is farther away.
    """
    shapes = [{name: t.shape for name, t in results.items()} for results in (ours, theirs)]
    if shapes[0] != shapes[1]:
        raise AssertionError(f"shapes differ: {shapes[0]}, {shapes[1]}")
    ours, theirs = grouped(ours), grouped(theirs)
    exact = grouped({name: exact[name] for name in shapes[0]})
    floor = floor_ulps * torch.finfo(dtype).eps
    failures = []
    for name, value in ours.items():
        if dtype is torch.float64:
            error, allowed = relative_error(value, theirs[name]), FLOAT64_DIFFERENCE
        else:
            error = relative_error(value, exact[name])
            allowed = max(ERROR_RATIO * relative_error(theirs[name], exact[name]), floor)
        if not error <= allowed:
            failures.append(f"{name}: error {error:.2e}, allowed {allowed:.2e}")
    if failures:
        raise AssertionError("; ".join(failures))


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill new tensors with NaN, so that a read before the first write shows."""
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
