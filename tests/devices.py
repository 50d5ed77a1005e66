# SPDX-License-Identifier: Apache-2.0
"""The devices that tests run on: the CPU and, under the marker `gpu`, a CUDA GPU.

A test that takes the fixture `device` runs on both. What only a GPU has is tested in test_gpu_*.py.
"""

import pytest
import torch

from fastrnn import _extension


def why_not():
    if not torch.cuda.is_available():
        return "no CUDA GPU here"
    if not _extension.C.build_info()["cuda"]:
        return "the extension was not built with CUDA"
    return ""


needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(bool(why_not()), reason=why_not() or "none")]
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
