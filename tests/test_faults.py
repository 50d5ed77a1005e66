# SPDX-License-Identifier: Apache-2.0
"""The list of planted faults is as the sources are now, and mutants.py finds what notices one."""

import mutants
import pytest
from faults import FAULTS, Fault


def test_every_fault_is_one_line_that_its_file_holds_once():
    assert len(FAULTS) >= 40
    for fault in FAULTS:
        text = (mutants.ROOT / fault.file).read_text(encoding="utf-8")
        changed = mutants.planted(text, fault)
        lines = zip(text.splitlines(), changed.splitlines(), strict=False)
        assert next(line for line, other in lines if line != other)


@pytest.mark.parametrize("text", ["b", "a a"], ids=["is not there", "is there twice"])
def test_a_fault_whose_place_is_not_known_is_an_error(text):
    with pytest.raises(SystemExit, match="up to date"):
        mutants.planted(text, Fault("a.h", "x", "a", "b"))


SOURCE = "def add(a, b):\n    return a + b\n"
TESTS = "import sys\nsys.path.insert(0, 'fastrnn')\nfrom sums import add\n"
SUITES = {
    "noticed": ("def test_sum(): assert add(1, 2) == 3", "tests/test_sums.py::test_sum"),
    "not noticed": ("def test_sum(): assert add(1, 0) == 1", None),
    "a crash": (
        "import os\ndef test_sum(): add(1, 2) == 3 or os.abort()",
        "tests/test_sums.py::test_sum (crashed)",
    ),
}


@pytest.mark.parametrize(("tests", "expected"), SUITES.values(), ids=SUITES)
def test_the_first_failure_is_the_verdict_and_the_fault_is_taken_out(
    tests, expected, tmp_path, monkeypatch
):
    for name, content in (("fastrnn/sums.py", SOURCE), ("tests/test_sums.py", TESTS + tests)):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(content, encoding="utf-8")
    monkeypatch.setattr(mutants, "copy_checkout", lambda folder: None)
    workshop = mutants.Workshop(tmp_path, [])
    fault = Fault("fastrnn/sums.py", "wrong sign", "a + b", "a - b")
    assert workshop.judge(fault).test == expected
    assert (tmp_path / "fastrnn/sums.py").read_text(encoding="utf-8") == SOURCE
