# SPDX-License-Identifier: Apache-2.0
"""The class RNN: parameters, initialisation, state and repr are nn.RNN's; forward calls functional.

It derives from RNNBase and not from nn.RNN, because torch.compile breaks its graph at every
instance of nn.RNN.
"""

from operator import is_
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastrnn import functional
from fastrnn._stock import MODES

_NONLINEARITIES = {mode: nonlinearity for nonlinearity, mode in MODES.items()}


class RNN(torch.nn.RNNBase):
    r"""Multi-layer Elman RNN, a drop-in replacement of `torch.nn.RNN`.

    ``h_t = tanh(x_t W_ihᵀ + b_ih + h_{t-1} W_hhᵀ + b_hh)``, or relu in place of tanh.

    Parameters
    ----------
    input_size, hidden_size : int
        Features of the input, ``I``, and of the hidden state, ``H``.
    num_layers : int
        Layers stacked on one another, ``L``.
    nonlinearity : {'tanh', 'relu'}
    bias : bool
        Whether there are ``b_ih`` and ``b_hh``.
    batch_first : bool
        Input and output are ``(B, T, features)`` instead of ``(T, B, features)``; the hidden state
        stays ``(L*D, B, H)``.
    dropout : float
        Probability of zeroing an output between layers in training.
    bidirectional : bool
        A second direction, from the end of the sequence: ``D`` is 2 instead of 1.
    device, dtype
        Of the parameters.

    Attributes
    ----------
    weight_ih_l{k} : Parameter, ``(H, I)``, or ``(H, D*H)`` above the first layer
    weight_hh_l{k} : Parameter, ``(H, H)``
    bias_ih_l{k}, bias_hh_l{k} : Parameter, ``(H)``
        With ``_reverse`` appended for the second direction. All drawn from U(-1/√H, 1/√H), in the
        order and with the draws of `torch.nn.RNN`.

    Raises
    ------
    ValueError, TypeError
        As `torch.nn.RNN` does.

    Examples
    --------
    >>> rnn = fastrnn.RNN(10, 20, num_layers=2)
    >>> output, h_n = rnn(torch.randn(5, 3, 10))
    >>> output.shape, h_n.shape
    (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **unknown: NoReturn,  # to a type checker, none
    ) -> None:
        if "proj_size" in unknown:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        if unknown:
            raise TypeError(f"RNN got an unexpected keyword argument '{next(iter(unknown))}'")
        # Not hashable or not known: the same error.
        mode = MODES.get(nonlinearity) if isinstance(nonlinearity, str) else None
        if mode is None:
            raise ValueError(
                f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'."
                + (" The fourth argument is nonlinearity, the fifth bias."
                   if isinstance(nonlinearity, bool) else "")
            )  # fmt: skip
        self.nonlinearity = nonlinearity
        super().__init__(
            mode,
            input_size,
            hidden_size,
            num_layers=num_layers,
            bias=bias,
            batch_first=batch_first,
            dropout=dropout,
            bidirectional=bidirectional,
            device=device,
            dtype=dtype,
        )
        if not isinstance(num_layers, bool):
            self.num_layers = int(num_layers)  # NumPy's integers are none to the operator

    def forward(self, input: Any, hx: Tensor | None = None) -> tuple[Any, Tensor]:
        """Run the recurrence over `input`.

        Parameters
        ----------
        input : Tensor or PackedSequence
            ``(T, B, I)``, ``(B, T, I)`` with ``batch_first``, ``(T, I)`` unbatched, or packed.
        hx : Tensor, optional
            Initial state ``(L*D, B, H)``, unbatched ``(L*D, H)``; zeros if absent.

        Returns
        -------
        output : Tensor or PackedSequence
            Every step of the last layer: ``D*H`` features in the layout of `input`.
        h_n : Tensor
            Every layer's final state, shaped as `hx`.

        Raises
        ------
        ValueError, RuntimeError, TypeError, IndexError
            As `torch.nn.RNN` does, with a hint what to change.
        ImportError
            The extension could not be loaded.
        """
        nonlinearity = _NONLINEARITIES.get(self.mode)
        if nonlinearity is None:
            raise AssertionError(f"mode must be RNN_TANH or RNN_RELU, got {self.mode}")
        return functional.rnn(
            input,
            self._current_weights(),
            hx,
            nonlinearity=nonlinearity,
            num_layers=self.num_layers,
            bias=self.bias,
            batch_first=self.batch_first,
            dropout=self.dropout,
            training=self.training,
            bidirectional=self.bidirectional,
        )

    def flatten_parameters(self) -> None:
        """Leave every weight where it lies, since the kernels read it there.

        Kept so that code written for `torch.nn.RNN` runs. On a GPU without kernels PyTorch's path
        computes, and the parameters move into one buffer for cuDNN as `torch.nn.RNN`'s do.
        """
        weight = self._flat_weights[0] if self._flat_weights else None
        if (
            isinstance(weight, Tensor)
            and weight.is_cuda
            and torch.cuda.is_available()  # fake tensors are on a GPU where there is none
            and not functional._is_fused_device(weight.device)
        ):
            super().flatten_parameters()

    def _current_weights(self) -> list[Any]:
        """The weights as they are now, in nn.RNN's flat order: those that nn.RNN would take.

        Its own way takes microseconds. It is not needed where its flat weights are the parameters:
        not where they were replaced by something else (by weights that were parametrized, pruned,
        adapted by a subclass, ...) or the parameters by others. Of a compiled call these are known.
        """
        parameters = self._parameters
        try:
            weights = [parameters[name] for name in self._flat_weights_names]
            if all(map(is_, weights, self._flat_weights)) or torch.compiler.is_compiling():
                return weights
        except KeyError:
            pass
        self._update_flat_weights()
        return self._flat_weights
