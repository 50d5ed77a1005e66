# SPDX-License-Identifier: Apache-2.0
"""JAX: `lax.scan` under `jit`, the input's product for all steps before it."""

from typing import Any

import torch
from cases import BenchmarkCase
from torch import Tensor

from .interface import Loaded, Peer, Problem


class JaxScan(Peer):
    """In training `jax.vjp` with respect to the weights, forward and backward in one `jit`."""

    name = "jax_scan"
    packages = ("jax", "jaxlib")
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

    def floor_ulps(self, dtype: torch.dtype) -> float:
        """As of `Peer`. XLA approximates tanh, and sums gradients of 16 bits step by step."""
        return 8

    def load(self, case: BenchmarkCase, mode: str, threads: int) -> Loaded:
        """As of `Peer`."""
        import jax

        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_enable_x64", case.dtype is torch.float64)
        problem = Problem(case)
        weights = [[tuple(map(array, cell)) for cell in layer] for layer in problem.layers]
        x = array(problem.x)
        relu = case.nonlinearity == "relu"

        @jax.jit
        def infer(weights: Any, x: Any) -> Any:
            return rnn(weights, x, relu)

        @jax.jit
        def train(weights: Any, x: Any, cotangent: Any) -> Any:
            output, vjp = jax.vjp(lambda weights: rnn(weights, x, relu)[0], weights)
            return output, vjp(cotangent)[0]

        if mode == "inference":

            def step() -> Any:
                return jax.block_until_ready(infer(weights, x))

            def results() -> dict[str, Tensor]:
                output, h_n = step()
                return {"output": tensor(output), "h_n": tensor(h_n)}
        else:
            cotangent = array(problem.cotangent())

            def step() -> Any:
                return jax.block_until_ready(train(weights, x, cotangent))

            def results() -> dict[str, Tensor]:
                output, gradients = step()
                flat = [tensor(g) for layer in gradients for cell in layer for g in cell]
                names = [f"grad_{name}" for name in problem.weights]
                return {"output": tensor(output), **dict(zip(names, flat, strict=True))}

        return Loaded(step, results)


def rnn(weights: Any, x: Any, relu: bool) -> Any:
    """Return output and h_n of x (T, B, I); `weights` as of `Problem.layers`."""
    import jax
    from jax import numpy as jnp

    finals = []
    for layer in weights:
        outputs = []
        for direction, (w_ih, w_hh, b_ih, b_hh) in enumerate(layer):

            def step(h: Any, product: Any, w_hh: Any = w_hh) -> Any:
                z = product + h @ w_hh.T
                h = jax.nn.relu(z) if relu else jnp.tanh(z)
                return h, h

            h_0 = jnp.zeros((x.shape[1], w_hh.shape[0]), x.dtype)
            products = x @ w_ih.T + (b_ih + b_hh)
            h_n, output = jax.lax.scan(step, h_0, products, reverse=direction == 1)
            outputs.append(output)
            finals.append(h_n)
        x = jnp.concatenate(outputs, axis=-1) if len(outputs) > 1 else outputs[0]
    return x, jnp.stack(finals)


def array(value: Tensor) -> Any:
    """A copy in JAX's memory."""
    from jax import numpy as jnp

    return jnp.array(jnp.from_dlpack(value.contiguous()), copy=True)


def tensor(value: Any) -> Tensor:
    """A copy in PyTorch's memory."""
    return torch.from_dlpack(value).clone()
