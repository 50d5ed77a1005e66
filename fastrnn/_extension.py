# SPDX-License-Identifier: Apache-2.0
"""Loads fastrnn._C, which registers the operators, once.

A failure is kept, not raised, so that `import fastrnn` always works and `python -m fastrnn.info`
can tell what is wrong; the first use of anything in the extension raises it.
"""

from importlib import import_module
from typing import Any

import torch


class _Missing:
    """Stands for the extension that could not be loaded."""

    def __getattr__(self, name: str) -> Any:
        raise ImportError(
            f"fastrnn._C could not be loaded: {load_error}. This is torch {torch.__version__}; "
            "build fastrnn for it with `pip install --no-build-isolation .`"
        ) from load_error


load_error: Exception | None = None
C: Any = _Missing()
try:
    C = import_module("fastrnn._C")
except ImportError as error:
    load_error = error
