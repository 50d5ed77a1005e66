# SPDX-License-Identifier: Apache-2.0
"""The recurrence by hand: one hidden unit, the inputs 1 to 9, weights that anyone can check.

    h_t = tanh(2 x_t + 4 + 3 h_{t-1} + 5),   h_0 = 0

Prints plain Python, torch.nn.RNN and fastrnn.RNN side by side, step by step. With weights as large
as these tanh is 1 to nine digits at once; to see a state grow, try 0.1, 0.5, 0 and 0.
"""

import math
import sys
from collections.abc import Callable

import torch

import fastrnn

W_IH, W_HH, B_IH, B_HH = 2.0, 3.0, 4.0, 5.0
INPUTS = range(1, 10)


def by_hand() -> list[float]:
    states, h = [], 0.0
    for x in INPUTS:
        h = math.tanh(W_IH * x + B_IH + W_HH * h + B_HH)
        states.append(h)
    return states


def by_module(kind: Callable[..., torch.nn.RNNBase]) -> list[float]:
    rnn = kind(1, 1, 1)  # input_size, hidden_size, num_layers
    with torch.no_grad():
        parameters = (rnn.weight_ih_l0, rnn.weight_hh_l0, rnn.bias_ih_l0, rnn.bias_hh_l0)
        for parameter, value in zip(parameters, (W_IH, W_HH, B_IH, B_HH), strict=True):
            parameter.fill_(value)
        x = torch.tensor(INPUTS, dtype=torch.float32).reshape(9, 1)
        output, _ = rnn(x, torch.zeros(1, 1))
    return output[:, 0].tolist()


def main() -> int:
    columns = {
        "by hand": by_hand(),
        "torch.nn.RNN": by_module(torch.nn.RNN),
        "fastrnn.RNN": by_module(fastrnn.RNN),
    }
    print(f"{'t':>2} {'x':>2} " + " ".join(f"{name:>18}" for name in columns))
    for t, (x, *states) in enumerate(zip(INPUTS, *columns.values(), strict=True), start=1):
        print(f"{t:>2} {x:>2} " + " ".join(f"{h:>18.15f}" for h in states))
    hand, *modules = columns.values()
    worst = max(abs(a - b) for column in modules for a, b in zip(hand, column, strict=True))
    print(f"largest difference from the hand calculation: {worst:.1e} (float32: 1.2e-07)")

    print("\nThe same with integers, torch.arange(1, 10).reshape(9, 1):")
    try:
        fastrnn.RNN(1, 1, 1)(torch.arange(1, 10).reshape(9, 1))
    except ValueError as error:
        print(f"  ValueError: {error}")
    return 0 if worst <= torch.finfo(torch.float32).eps else 1


if __name__ == "__main__":
    sys.exit(main())
