# SPDX-License-Identifier: Apache-2.0
"""The folders under csrc/ keep to their rules."""

import re

import pytest
from sources import CSRC, code, included

TORCH = re.compile(r'^\s*#\s*include\s*[<"](torch|ATen|c10|caffe2|pybind11)/', re.MULTILINE)
KERNELS = sorted(CSRC.glob("*/kernels"))


def files_with_torch(folder):
    """Files below the folder, or included by one of them, that include a header of PyTorch."""
    files = {f.resolve() for p in folder.rglob("*") if p.is_file() for f in included(p)}
    return sorted(f.name for f in files if TORCH.search(code(f)))


@pytest.mark.parametrize("folder", KERNELS, ids=lambda path: path.parent.name)
def test_kernels_include_no_header_of_pytorch(folder):
    assert files_with_torch(folder) == []


def test_the_folders_of_kernels_are_found():
    assert CSRC / "cuda" / "kernels" in KERNELS
    assert all([*folder.iterdir()] for folder in KERNELS)


@pytest.mark.parametrize(
    "files, guilty",
    [
        ({"a.cu": "#include <torch/library.h>"}, ["a.cu"]),
        ({"a.inl": '# include "ATen/Parallel.h"'}, ["a.inl"]),
        ({"below/a.h": "#include <pybind11/stl.h>"}, ["a.h"]),
        ({"a.cu": '#include "b.h"', "b.h": '#include "c.h"', "c.h": "#include <c10/a.h>"}, ["c.h"]),
        ({"a.cu": '#include "../b.h"', "../b.h": "#include <ATen/ATen.h>"}, ["b.h"]),
        ({"a.cu": "// #include <torch/all.h>", "b.h": "/*\n#include <c10/a.h>\n*/"}, []),
        ({"../host.cpp": "#include <ATen/ATen.h>"}, []),  # host code may
    ],
    ids=str,
)
def test_headers_of_pytorch_are_found(tmp_path, files, guilty):
    folder = tmp_path / "kernels"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    assert files_with_torch(folder) == guilty
