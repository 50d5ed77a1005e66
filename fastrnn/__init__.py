# SPDX-License-Identifier: Apache-2.0
"""fastrnn: torch.nn.RNN with its whole forward and backward in one C++ extension."""

from fastrnn import functional
from fastrnn.module import RNN

__version__ = "0.1.0"

__all__ = ["RNN", "__version__", "functional"]
