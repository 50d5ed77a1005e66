# SPDX-License-Identifier: Apache-2.0
"""What fastrnn is compared with, besides torch.nn.RNN; every one is optional.

A new peer is a class in a file of its own and one entry in `PEERS`.
"""

from .interface import Peer
from .jax_scan import JaxScan
from .onednn import OneDnn
from .onnx_runtime import OnnxRuntime
from .openvino_sequence import OpenVino
from .torch_loops import CompiledLoop, ScriptLoop
from .torch_modules import CompiledNnRnn, FastRnn, NnRnn, NnRnnCell

#: By name, in the order of the table's columns.
PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        FastRnn(),
        NnRnn(),
        NnRnnCell(),
        ScriptLoop(),
        CompiledNnRnn(),
        CompiledLoop(),
        JaxScan(),
        OnnxRuntime(),
        OpenVino(),
        OneDnn(),
    )
}
