# SPDX-License-Identifier: Apache-2.0
"""Runtimes of graphs, for inference: ONNX Runtime and OpenVINO."""

from typing import Any

import torch
from cases import BenchmarkCase
from torch import Tensor

from .interface import Loaded, Peer, Problem

#: Versions of the format and of the operators, that of RNN's latest change.
IR_VERSION, OPSET = 10, 22


class OnnxRuntime(Peer):
    """Its `RNN` operator, one for each layer; on a CPU it has inference in float32 alone."""

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
            onnx_model(case, problem), options, providers=["CPUExecutionProvider"]
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


def onnx_model(case: BenchmarkCase, problem: Problem) -> bytes:
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


class OpenVino(Peer):
    """Its `RNNSequence`, one for each layer: inference in float32."""

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
        compiled = openvino.Core().compile_model(openvino_model(case, problem), "CPU", settings)
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


def openvino_model(case: BenchmarkCase, problem: Problem) -> Any:
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
