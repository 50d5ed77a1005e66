# SPDX-License-Identifier: Apache-2.0
"""C++ of the benchmarks, compiled when it is needed."""

import hashlib
import os
import subprocess
from pathlib import Path

BUILD = Path(__file__).resolve().parents[1] / "build" / "benchmarks"


def library(source: Path, *options: str, key: str = "") -> Path:
    """A source as a shared library, compiled if there is none of this text yet.

    Parameters
    ----------
    source : Path
        The C++ file.
    *options : str
        Further arguments of g++.
    key : str
        Whatever else the result depends on: included files, versions, the processor.

    Returns
    -------
    Path
        The library.
    """
    text = source.read_text(encoding="utf-8") + "".join(options) + key
    path = BUILD / f"{source.stem}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        command = ["g++", "-std=c++17", "-fPIC", "-shared", str(source), *options]
        subprocess.run([*command, "-o", str(unfinished)], check=True, capture_output=True)
        unfinished.replace(path)
    return path
