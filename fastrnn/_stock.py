# SPDX-License-Identifier: Apache-2.0
"""PyTorch's own path, for what the fused operators do not take.

It runs `torch.nn.RNN.forward` on an object that has only the attributes which that function reads.
So layouts, checks and messages are PyTorch's own.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import RNNBase

# Bound at import: the class may later be replaced in torch.nn by fastrnn.RNN.
_forward: Any = torch.nn.RNN.forward

MODES = {"tanh": "RNN_TANH", "relu": "RNN_RELU"}


class StockRNN:
    """What nn.RNN.forward needs of a module: options and a flat list of weights."""

    proj_size = 0
    check_input = RNNBase.check_input
    check_hidden_size = RNNBase.check_hidden_size
    check_forward_args = RNNBase.check_forward_args
    get_expected_hidden_size = RNNBase.get_expected_hidden_size
    permute_hidden = RNNBase.permute_hidden

    def __init__(self, weights: Sequence[Tensor], **options: Any) -> None:
        for i, weight in enumerate(weights):
            if weight is None:
                raise TypeError(
                    f"expected Tensor as element {i} in argument 2, but got NoneType. Every layer "
                    "and direction needs w_ih, w_hh and, with bias, b_ih and b_hh."
                )
        nonlinearity = options.pop("nonlinearity")
        if nonlinearity not in MODES:
            raise ValueError(
                f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'."
            )
        self._flat_weights = weights
        self.mode = MODES[nonlinearity]
        self.input_size = weights[0].size(-1)
        self.hidden_size = weights[0].size(0)
        for name, value in options.items():  # Dynamo of torch 2.11 cannot trace __dict__.update
            setattr(self, name, value)

    def _update_flat_weights(self) -> None:
        """The weights are what the caller passed."""

    def __call__(self, input: Any, hx: Tensor | None) -> Any:
        return _forward(self, input, hx)
