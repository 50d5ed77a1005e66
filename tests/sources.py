# SPDX-License-Identifier: Apache-2.0
"""The C++ and CUDA sources as text: what they include, and their code without comments."""

import re
from pathlib import Path

CSRC = Path(__file__).resolve().parents[1] / "csrc"


def included(path):
    """The file and all files of the project that it includes, under whatever condition."""
    files, rest = [], [Path(path)]
    while rest:
        file = rest.pop()
        files.append(file)
        names = re.findall(r'^\s*#\s*include\s*"([^"]+)"', file.read_text("utf-8"), re.MULTILINE)
        nearby = [folder / name for name in names for folder in (file.parent, CSRC)]
        new = {p.resolve() for p in nearby if p.exists()} - {p.resolve() for p in files + rest}
        rest += sorted(new)
    return files


def code(path):
    """The text without comments."""
    return re.sub(r"//.*|/\*[\s\S]*?\*/", "", path.read_text(encoding="utf-8"))
