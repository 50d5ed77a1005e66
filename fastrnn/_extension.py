# SPDX-License-Identifier: Apache-2.0
"""Loads fastrnn._C, which registers the operators, once.

A failure is kept, not raised, so that `import fastrnn` always works and `python -m fastrnn.info`
can tell what is wrong; the first use of an operator raises it.
"""

from importlib import import_module

import torch

load_error: Exception | None = None
try:
    import_module("fastrnn._C")
except ImportError as error:
    load_error = error


def require() -> None:
    """Raise why the extension is missing, if it is.

    Raises
    ------
    ImportError
        The extension was not built, or was built for another PyTorch.
    """
    if load_error is None:
        return
    raise ImportError(
        f"fastrnn._C could not be loaded: {load_error}. This is torch {torch.__version__}; build "
        "fastrnn for it with `pip install --no-build-isolation .`"
    ) from load_error
