# SPDX-License-Identifier: Apache-2.0
"""What gpu.py measures: the cases, both classes on the device, and the gate there.

A grid of batch and hidden sizes in four precisions, then what the grid lacks. `part` orders the
cases: a run that is stopped has the most telling ones.
"""

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import gate
import torch
from cases import CLASSES, BenchmarkCase, numbers
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from fastrnn import testing

#: The type of the numbers, and whether cuDNN may round float32 to TF32 in products.
PRECISIONS = {
    "tf32": (torch.float32, True),
    "fp32": (torch.float32, False),
    "fp16": (torch.float16, True),
    "bf16": (torch.bfloat16, True),
}
GRID_B = (1, 16, 64, 256)
GRID_H = (64, 128, 256, 512, 1024, 2048)
CORE_H = (64, 128, 256, 512, 1024)
#: Steps of the gate's float64 run on the CPU, and its products T·B·H² at most (but one step).
GATE_T, GATE_PRODUCTS = 64, 2**34
#: Inputs take turns so that none is found in the L2 cache (H200: 60 MB), unless they need more
#: than `INPUT_BYTES` for that.
CACHE_BYTES, INPUT_BYTES = 64 * 2**20, 2 * 2**30


@dataclass(frozen=True, kw_only=True)
class GpuCase(BenchmarkCase):
    """A case in one of `PRECISIONS`; `part` is ``"core"``, ``"grid"`` or ``"extra"``."""

    precision: str
    part: str

    @property
    def is_main(self) -> bool:
        """Whether it is a point of the grid as nn.RNN computes by default."""
        return self.part != "extra" and self.precision != "fp32"


def make(
    precision: str, part: str, reason: str, T: int = 512, B: int = 16, H: int = 128, **options: Any
) -> GpuCase:
    """A case with I = H, named after what it is."""
    plain = GpuCase(
        T, B, H, H, name="", reason=reason, dtype=PRECISIONS[precision][0], precision=precision,
        part=part, **options,
    )  # fmt: skip
    words = [precision, f"T{T}", f"B{B}", f"H{H}"]
    words += [f"{plain.num_layers} layers"] if plain.num_layers > 1 else []
    words += ["bidirectional"] if plain.bidirectional else []
    words += ["packed"] if plain.lengths else []
    return replace(plain, name=" ".join(words))


def core(precision: str) -> list[GpuCase]:
    """One column of the grid."""
    return [make(precision, "core", "a common batch", H=H) for H in CORE_H]


def rest_of_grid(precision: str) -> list[GpuCase]:
    """The grid without its core."""
    points = [(B, H) for H, B in itertools.product(GRID_H, GRID_B) if B != 16 or H not in CORE_H]
    return [make(precision, "grid", "a point of the grid", B=B, H=H) for B, H in points]


def extras(precision: str) -> list[GpuCase]:
    """What the grid does not have, one by one."""
    lengths = tuple(round(1 + 511 * i / 15) for i in range(16))
    return [
        make(precision, "extra", "no power of two", H=200),
        make(precision, "extra", "cuDNN's persistent kernel is slow here", H=320),
        make(precision, "extra", "cuDNN has no persistent kernel for it", lengths=lengths),
        make(precision, "extra", "layers may overlap", num_layers=2),
        make(precision, "extra", "layers may overlap", num_layers=4),
        make(precision, "extra", "directions may overlap", bidirectional=True),
        make(precision, "extra", "the cost of a call", T=16),
        make(precision, "extra", "the latency of a step", T=4096),
    ]


#: In the order of measurement: each point in all precisions, then the next point.
CASES = [
    case
    for part in (core, rest_of_grid, extras)
    for point in zip(*map(part, PRECISIONS), strict=True)
    for case in point
]


def settings_of(case: GpuCase) -> AbstractContextManager[None]:
    """Allow TF32 or not, as the case says, by the setting that nn.RNN obeys; then as before.

    The setting of torch.matmul, by default without TF32, is no part of a case.
    """
    return cudnn_with_tf32(PRECISIONS[case.precision][1])


def cudnn_with_tf32(allowed: bool) -> AbstractContextManager[None]:
    """cuDNN's settings as they are, but for TF32."""
    cudnn = torch.backends.cudnn
    names = ("enabled", "benchmark", "deterministic")
    return cudnn.flags(**{name: getattr(cudnn, name) for name in names}, allow_tf32=allowed)


class Bench:
    """Both classes, with the same weights, inputs and gradient of the output, on a device.

    Parameters
    ----------
    case : GpuCase
        What to run.
    device : str
        ``"cuda"`` or ``"cpu"``.
    """

    def __init__(self, case: GpuCase, device: str) -> None:
        self.modules = {n: case.module(c, case.dtype).to(device) for n, c in CLASSES.items()}
        self.inputs = inputs(case, device)
        shape = (*numbers(self.inputs[0]).shape[:-1], case.H * (2 if case.bidirectional else 1))
        self.cotangent = torch.randn(shape, dtype=case.dtype, device=device)

    def step(self, class_name: str, mode: str) -> Callable[[], None]:
        """The function that is measured, as of `BenchmarkCase.step`; the inputs take turns.

        The module is put into `mode` here: make the steps of one mode, run them, then the other's.
        """
        module = self.modules[class_name].train(mode == "training")
        turns = itertools.cycle(self.inputs)

        def infer() -> None:
            module(next(turns))

        def train() -> None:
            output, _ = module(next(turns))
            torch.autograd.backward(numbers(output), self.cotangent)
            module.zero_grad(set_to_none=True)

        return infer if mode == "inference" else train


def inputs(case: GpuCase, device: str) -> list[Tensor | PackedSequence]:
    """Draw the inputs that take turns: two, or as many as `CACHE_BYTES` asks for."""
    shape = (sum(case.lengths), case.I) if case.lengths else (case.T, case.B, case.I)
    size = torch.Size(shape).numel() * case.dtype.itemsize
    count = max(2, CACHE_BYTES // size + 1)
    count = count if count * size <= INPUT_BYTES else 2
    drawn = torch.randn((count, *shape), dtype=case.dtype, device=device).unbind()
    if not case.lengths:
        return list(drawn)
    layout = pack_sequence([torch.empty(n, 1) for n in case.lengths], enforce_sorted=False)
    _, batch_sizes, *indices = layout.to(device)
    return [PackedSequence(x, batch_sizes, *indices) for x in drawn]


def failure(case: GpuCase, device: str) -> str | None:
    """The gate: compare the first steps with a run on the CPU, then the whole on the device.

    Parameters
    ----------
    case : GpuCase
        What to run, with its own settings in force already.
    device : str
        Where both classes run.

    Returns
    -------
    str or None
        What is wrong, an exception included; None if nothing is.
    """
    try:
        short = shortened(case)
        theirs, ours = (
            results(case.module(cls, case.dtype).to(device), short) for cls in CLASSES.values()
        )
        exact = results(case.module(torch.nn.RNN, case.dtype).double(), short)
        testing.assert_as_accurate(ours, theirs, exact, case.dtype)
        return whole_failure(case, device)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def shortened(case: GpuCase) -> GpuCase:
    """The case with so few steps that a float64 run on the CPU is quick.

    The batch stays whole: it decides which kernel runs.
    """
    T = max(1, min(case.T, GATE_T, GATE_PRODUCTS // (case.B * case.H**2)))
    lengths = case.lengths and tuple(max(1, n * T // case.T) for n in case.lengths)
    return replace(case, T=T, lengths=lengths)


def results(module: Any, case: GpuCase) -> dict[str, Tensor]:
    """As `gate.results`, of a module on any device, in the CPU's memory."""
    return {name: t.cpu() for name, t in gate.results(OnDevice(module), case).items()}


class OnDevice:
    """A module that takes its arguments from the CPU and leaves its results there."""

    def __init__(self, module: Any) -> None:
        self.parameters = module.parameters
        self.named_parameters = module.named_parameters
        self._module = module

    def __call__(self, x: Any, hx: Tensor | None = None) -> tuple[Any, Tensor]:
        device = next(self.parameters()).device
        output, h_n = self._module(x.to(device), None if hx is None else hx.to(device))
        return output.to("cpu"), h_n.to("cpu")


def whole_failure(case: GpuCase, device: str) -> str | None:
    """Compare what is measured, at its full size, with nn.RNN in float64 on the same device."""
    bench = Bench(case, device)
    theirs, ours = (whole(bench.modules[name], bench) for name in CLASSES)
    exact = whole(bench.modules["nn_rnn"].double(), bench)
    try:
        testing.assert_as_accurate(ours, theirs, exact, case.dtype)
    except AssertionError as error:
        return f"at full size: {error}"
    return None


def whole(module: Any, bench: Bench) -> dict[str, Tensor]:
    """Outputs and the weights' gradients of one inference and one step of training."""
    weights = dict(module.named_parameters())
    own = next(iter(weights.values())).dtype
    x = bench.inputs[0].to(own)
    with torch.inference_mode():
        inferred = [numbers(t) for t in module.eval()(x)]
    output, h_n = module.train()(x)
    gradients = torch.autograd.grad(
        numbers(output), list(weights.values()), bench.cotangent.to(own)
    )
    names = ["inference_output", "inference_h_n", "output", "h_n"]
    values = [*inferred, numbers(output).detach(), h_n.detach()]
    grads = {f"grad_{name}": g for name, g in zip(weights, gradients, strict=True)}
    return dict(zip(names, values, strict=True)) | grads
