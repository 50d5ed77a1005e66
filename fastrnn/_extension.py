# SPDX-License-Identifier: Apache-2.0
"""Loads fastrnn._C, which registers the operators, once.

A failure is kept and not raised, so `import fastrnn` always works and `python -m fastrnn.info` can
tell what is wrong. The first use of the extension raises it.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch


class _Missing:
    """Stands for the extension that could not be loaded."""

    def __getattr__(self, name: str) -> Any:
        raise ImportError(
            f"fastrnn._C could not be loaded: {load_error}. This is torch {torch.__version__} and "
            f"the fastrnn in {_FOLDER}: build it with `pip install --no-build-isolation --editable "
            ".` in its checkout or, if another is installed, start Python in another folder"
        ) from load_error


_FOLDER = Path(__file__).parent


def _load() -> Any:
    """Import the extension; ImportError also if it has other sources or is for another torch."""
    extension = import_module("fastrnn._C")
    file = Path(str(extension.__file__))
    if not file.parent.samefile(_FOLDER):
        raise ImportError(f"{file} was built from other sources")
    built = extension.build_info()["torch"]
    if built.split(".")[:2] != torch.__version__.split(".")[:2]:
        raise ImportError(f"it was built for torch {built}")
    return extension


load_error: ImportError | None = None
C: Any = _Missing()
try:
    C = _load()
except ImportError as error:
    load_error = error
