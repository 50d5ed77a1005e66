# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

device_types: tuple[str, ...]

def rnn(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    nonlinearity: str,
    bias: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    /,
) -> tuple[Tensor, Tensor]: ...
def is_ordinary_call(input: Any, weights: Sequence[Any], hx: Any, /) -> bool: ...
def build_info() -> dict[str, Any]: ...
def cpu_capability() -> str: ...
def cpu_plan(
    T: int,
    B: int,
    I: int,
    H: int,
    directions: int = 1,
    dtype: torch.dtype = ...,
    rows: int | None = None,
) -> dict[str, Any]: ...
def cuda_plan(
    T: int,
    B: int,
    I: int,
    H: int,
    directions: int = 1,
    element_size: int = 4,
    *,
    major: int | None = None,
    multiprocessors: int | None = None,
    shared_bytes: int | None = None,
) -> dict[str, Any]: ...
