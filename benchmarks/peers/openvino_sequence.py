# SPDX-License-Identifier: Apache-2.0
"""OpenVINO: its `RNNSequence`, one for each layer."""

from typing import Any

import torch
from cases import BenchmarkCase
from torch import Tensor

from .interface import Loaded, Peer, Problem


class OpenVino(Peer):
    """Inference in float32."""

    name = "openvino"
    packages = ("openvino",)
    modes = ("inference",)
    packed = True

    def floor_ulps(self, dtype: torch.dtype) -> float:
        """As of `Peer`. It runs oneDNN's cells, whose tanh is an approximation."""
        return 8

    def load(self, case: BenchmarkCase, mode: str, threads: int) -> Loaded:
        """As of `Peer`."""
        import openvino

        problem = Problem(case)
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            # The default is bfloat16 where the processor has it.
            "INFERENCE_PRECISION_HINT": "f32",
        }
        compiled = openvino.Core().compile_model(model(case, problem), "CPU", settings)
        request = compiled.create_infer_request()
        # A copy: the request does not keep a shared array alive.
        x = problem.x.transpose(0, 1).contiguous().numpy()
        request.set_input_tensor(openvino.Tensor(x, shared_memory=False))

        def step() -> Any:
            # The results stay in the request's memory.
            return request.infer(share_inputs=True, share_outputs=True)

        def results() -> dict[str, Tensor]:
            step()
            found = [torch.from_numpy(o.data.copy()) for o in request.output_tensors]
            # (B, directions, T, H) and (B, directions, H)
            output = found[0].permute(2, 0, 1, 3).flatten(2)
            finals = torch.cat([h.transpose(0, 1) for h in found[1:]])
            return {"output": problem.output(output), "h_n": finals}

        return Loaded(step, results)


def model(case: BenchmarkCase, problem: Problem) -> Any:
    """The layers as a model, its outputs the last layer's and every layer's h_n."""
    import numpy as np
    import openvino
    from openvino import opset5 as ops

    T, B, I = problem.x.shape
    directions = 2 if case.bidirectional else 1
    lengths = [T] * B if problem.lengths is None else problem.lengths.tolist()
    x = parameter = ops.parameter([B, T, I], np.float32, name="x")
    finals = []
    for i, layer in enumerate(problem.layers):
        sequence = ops.rnn_sequence(
            x,
            ops.constant(np.zeros((B, directions, case.H), np.float32)),
            ops.constant(np.array(lengths, np.int32)),
            ops.constant(torch.stack([cell[0] for cell in layer]).numpy()),
            ops.constant(torch.stack([cell[1] for cell in layer]).numpy()),
            ops.constant(torch.stack([cell[2] + cell[3] for cell in layer]).numpy()),
            case.H,
            "bidirectional" if directions == 2 else "forward",
            [case.nonlinearity],
        )
        finals.append(sequence.output(1))
        if i + 1 < len(problem.layers):
            transposed = ops.transpose(sequence.output(0), np.array([0, 2, 1, 3]))
            x = ops.reshape(transposed, np.array([B, T, directions * case.H]), False)
    return openvino.Model([sequence.output(0), *finals], [parameter], "rnn")
