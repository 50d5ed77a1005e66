# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime: its `RNN` operator, one for each layer."""

from typing import Any

import torch
from cases import BenchmarkCase
from torch import Tensor

from .interface import Loaded, Peer, Problem

#: Versions of the format and of the operators, that of RNN's latest change.
IR_VERSION, OPSET = 10, 22


class OnnxRuntime(Peer):
    """Inference in float32, which is all that the operator has on a CPU."""

    name = "onnx_runtime"
    packages = ("onnx", "onnxruntime")
    modes = ("inference",)
    packed = True

    def floor_ulps(self, dtype: torch.dtype) -> float:
        """As of `Peer`. Its tanh is an approximation by a quotient of polynomials."""
        return 8

    def load(self, case: BenchmarkCase, mode: str, threads: int) -> Loaded:
        """As of `Peer`."""
        import onnxruntime

        problem = Problem(case)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            model(case, problem), options, providers=["CPUExecutionProvider"]
        )
        inputs = {"x": problem.x.numpy()}
        if problem.lengths is not None:
            inputs["lengths"] = problem.lengths.int().numpy()

        def step() -> Any:
            return session.run(None, inputs)

        def results() -> dict[str, Tensor]:
            output, *finals = map(torch.from_numpy, step())
            # (T, directions, B, H)
            output = output.transpose(1, 2).flatten(2)
            return {"output": problem.output(output), "h_n": torch.cat(finals)}

        return Loaded(step, results)


def model(case: BenchmarkCase, problem: Problem) -> bytes:
    """The layers as an ONNX model, its outputs the last layer's and every layer's h_n."""
    from onnx import TensorProto, helper, numpy_helper

    nodes, constants = [], []
    directions = 2 if case.bidirectional else 1

    def constant(name: str, value: Tensor) -> str:
        constants.append(numpy_helper.from_array(value.numpy(), name))
        return name

    lengths = "lengths" if case.lengths else ""
    x = "x"
    for i, layer in enumerate(problem.layers):
        w_ih = constant(f"w_ih_{i}", torch.stack([cell[0] for cell in layer]))
        w_hh = constant(f"w_hh_{i}", torch.stack([cell[1] for cell in layer]))
        bias = constant(f"bias_{i}", torch.stack([torch.cat(cell[2:]) for cell in layer]))
        nodes.append(
            helper.make_node(
                "RNN",
                [x, w_ih, w_hh, bias, lengths],
                [f"y_{i}", f"h_{i}"],
                hidden_size=case.H,
                direction="bidirectional" if directions == 2 else "forward",
                activations=[case.nonlinearity.title()] * directions,
            )
        )
        if i + 1 < len(problem.layers):
            x = f"x_{i + 1}"
            shape = constant(f"shape_{i}", torch.tensor([0, 0, directions * case.H]))
            nodes.append(helper.make_node("Transpose", [f"y_{i}"], [f"t_{i}"], perm=[0, 2, 1, 3]))
            nodes.append(helper.make_node("Reshape", [f"t_{i}", shape], [x]))
    kind = TensorProto.FLOAT
    inputs = [helper.make_tensor_value_info("x", kind, list(problem.x.shape))]
    if lengths:
        size = list(problem.lengths.shape)
        inputs.append(helper.make_tensor_value_info("lengths", TensorProto.INT32, size))
    names = [f"y_{len(problem.layers) - 1}", *(f"h_{i}" for i in range(len(problem.layers)))]
    outputs = [helper.make_tensor_value_info(name, kind, None) for name in names]
    graph = helper.make_graph(nodes, "rnn", inputs, outputs, constants)
    versions = [helper.make_opsetid("", OPSET)]
    made = helper.make_model(graph, opset_imports=versions, ir_version=IR_VERSION)
    return made.SerializeToString()
