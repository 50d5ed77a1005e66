# SPDX-License-Identifier: Apache-2.0
"""The kernels of every CPU capability that this processor runs, not only of the best.

PyTorch reads ATEN_CPU_CAPABILITY once, so each capability has a process of its own.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastrnn

CAPABILITIES = ["default", "avx2", "avx512"]  # each processor runs them up to its best
TESTS = Path(__file__).parent

RUN_TESTS = """
import sys
import pytest
from fastrnn import _C
assert _C.cpu_capability() == sys.argv[1], _C.cpu_capability()
sys.exit(pytest.main(sys.argv[2:]))
"""


def run_python(code, *arguments, **variables):
    """Run `code` with the fastrnn that is under test, ATEN_CPU_CAPABILITY unset, on one thread."""
    environment = {k: v for k, v in os.environ.items() if k != "ATEN_CPU_CAPABILITY"}
    paths = [str(Path(fastrnn.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    environment["OMP_NUM_THREADS"] = "1"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=TESTS,
        env=environment | variables,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def best():
    """The best capability of this processor: PyTorch takes any that it is told, and crashes."""
    process = run_python("from fastrnn import _C; print(_C.cpu_capability())")
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


#: The tests of kernels. Not those of the grid's plans; and not float16, which the same kernels
#: compute in float32.
KERNELS = [
    "test_operators.py", "test_activations.py", "test_few_rows.py", "test_sharing.py",
    "test_products.py::test_large_layers_of_sixteen_bits_are_right",
    "test_results.py::test_nothing_beyond_the_end_of_a_row_is_read_or_written",
    "-k", "(float64 or float32 or bfloat16) and not grid",
]  # fmt: skip


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_results_and_gradients_are_right_with_every_capability(capability, best, request):
    if CAPABILITIES.index(capability) > CAPABILITIES.index(best):
        pytest.skip(f"this processor's best capability is {best}")
    markers = request.config.option.markexpr  # as here: `full` ones or not
    if capability == best and markers:
        pytest.skip(f"all other tests run with {best}")
    process = run_python(
        RUN_TESTS, capability, "-p", "no:cacheprovider", *KERNELS, "-m", markers,
        ATEN_CPU_CAPABILITY=capability,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr


def test_the_grid_takes_every_way_of_the_kernels_for_any_processor():
    process = run_python(
        RUN_TESTS, "default", "-p", "no:cacheprovider",
        "test_operators.py::test_the_grid_takes_every_way_of_the_plan",
        ATEN_CPU_CAPABILITY="default",
    )  # fmt: skip
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr


@pytest.fixture(scope="module")
def kernel_symbols():
    """(kind, name) of each symbol of the extension inside a namespace of one capability."""
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    from fastrnn import _C

    lines = subprocess.run(
        ["nm", "-C", _C.__file__], capture_output=True, check=True, text=True
    ).stdout.splitlines()
    symbols = [match.groups() for line in lines if (match := re.match(r"\w* +(\w) (.*)", line))]
    return [(kind, name) for kind, name in symbols if re.search(r"cpu::\w+_target::", name)]


def test_each_capability_up_to_the_best_has_kernels_of_its_own(kernel_symbols, best):
    found = {re.search(r"cpu::(\w+)_target::", name)[1] for _, name in kernel_symbols}
    assert found >= set(CAPABILITIES[: CAPABILITIES.index(best) + 1])


def test_no_symbol_of_the_kernels_can_replace_one_of_another_capability(kernel_symbols):
    # The linker keeps one of several weak symbols, and any file may use a global one: code for a
    # wide instruction set would run on a processor that lacks it.
    leaks = [(kind, name) for kind, name in kernel_symbols if kind.isupper() or kind in "uvw"]
    assert leaks == []
