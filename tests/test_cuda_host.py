# SPDX-License-Identifier: Apache-2.0
"""The host for CUDA kernels (cuda_host/): right kernels give right results, planted bugs show."""

import re
import subprocess
import sys
from pathlib import Path

import cuda_host
import pytest
import torch
from cuda_host import ORDERS, DeviceBuffer

PLANTED = Path(__file__).parent / "cuda_host" / "planted.cu"
BUGS = re.findall(r"^  (k\w+),", PLANTED.read_text(), re.MULTILINE)

pytestmark = pytest.mark.skipif(not cuda_host.available(), reason="needs Linux and g++")


@pytest.fixture(scope="module")
def library():
    return cuda_host.build(PLANTED)


@pytest.fixture(params=ORDERS, ids=lambda order: f"{order[0]}{order[1]}")
def order(request, library):
    library.set_order(*request.param)


def arange(n):
    return torch.arange(n, dtype=torch.float32) + 1


class Kernels:
    """Each method runs one kernel of planted.cu and returns its result and the right one."""

    def __init__(self, library):
        self.library = library

    def _run(self, name, inputs, expected, *sizes, bug):
        buffers = [DeviceBuffer(self.library, x, f"input {i}") for i, x in enumerate(inputs)]
        out = DeviceBuffer.unwritten(self.library, expected.shape, torch.float32, "out")
        self.library.call(f"run_{name}", *buffers, out, *sizes, BUGS.index(bug))
        return out.tensor(), expected

    def block_sum(self, bug="kNone", threads=64):
        x = arange(5 * threads)
        return self._run("block_sum", [x], x.view(5, threads).sum(1), 5, threads, bug=bug)

    def doubled(self, bug="kNone", n=77):
        return self._run("doubled", [arange(n)], 2 * arange(n), n, bug=bug)

    def shuffles(self, bug="kNone", threads=64):
        x = arange(threads)
        warps = x.view(-1, 32)
        expected = [warps[:, torch.arange(32) ^ 3], warps.sum(1, keepdim=True).expand(-1, 32)]
        return self._run("shuffles", [x], torch.stack(expected).view(2, -1), threads, bug=bug)

    def product(self, bug="kNone", K=7):
        a, b = arange(32 * K).view(32, K) % 5, arange(K * 32).view(K, 32) % 7
        return self._run("product", [a, b], a @ b, K, bug=bug)

    def rolled(self, bug="kNone"):
        x = arange(5 * 64).view(5, 64)
        return self._run("rolled", [x], x.roll(-1, 1), 5, 64, bug=bug)

    def chain(self, bug="kNone", blocks=9):
        return self._run("chain", [arange(blocks)], arange(blocks).cumsum(0), blocks, bug=bug)


KERNELS = [name for name in vars(Kernels) if not name.startswith("_")]


@pytest.fixture
def kernels(library):
    return Kernels(library)


@pytest.mark.parametrize("kernel", KERNELS)
def test_right_kernels_give_right_results_in_every_order(kernels, kernel, order):
    result, expected = getattr(kernels, kernel)()
    assert torch.equal(result, expected)


@pytest.mark.parametrize(
    "kernel, bug",
    [
        ("block_sum", "kNoBarrier"),
        ("product", "kNoBarrier"),
        ("rolled", "kNoBarrier"),
        ("rolled", "kNoLastBarrier"),
    ],
)
def test_missing_barriers_change_the_result_in_some_order(library, kernels, kernel, bug):
    wrong = []
    for order in ORDERS:
        library.set_order(*order)
        try:
            result, expected = getattr(kernels, kernel)(bug)
        except RuntimeError:
            wrong.append(order)
        else:
            wrong += [] if torch.equal(result, expected) else [order]
    assert wrong


@pytest.mark.parametrize(
    "kernel, bug",
    [
        ("block_sum", "kUninitialised"),
        ("doubled", "kUnwritten"),
        ("doubled", "kReadBeforeStart"),
    ],
)
def test_what_nobody_wrote_is_nan_in_every_order(kernels, kernel, bug, order):
    result, expected = getattr(kernels, kernel)(bug)
    assert result.isnan().any() and not expected.isnan().any()


@pytest.mark.parametrize(
    "kernel, bug, message",
    [
        (
            "block_sum",
            "kDivergentBarrier",
            r"deadlock: .*: 1 have exited .*, 63 wait in __syncthreads \(first: thread \(1,",
        ),
        ("block_sum", "kWritePastEnd", "thread .*: write 0 bytes past the end of .*shared memory"),
        ("shuffles", "kLaneExits", "deadlock: .*have exited .*5,0,0.* 31 wait in __shfl_xor"),
        ("shuffles", "kLaneAtBarrier", "deadlock: .* in __shfl_xor_sync .* 1 wait in __syncthr"),
        (
            "shuffles",
            "kLaneElsewhere",
            "lanes .* disagree .*: (__shfl_xor_sync and elsewhere|elsewhere and __shfl_xor_sync)",
        ),
        ("shuffles", "kHalfOfWarp", "thread .*: __shfl_xor_sync with a mask that lacks lanes"),
        ("doubled", "kReadPastEnd", r"read 0 bytes past the end of buffer 'input 0' .308 bytes"),
        ("doubled", "kWritePastEnd", "thread .13,0,0.: write 0 bytes past the end of buffer 'out'"),
        ("doubled", "kWriteBeforeStart", "write 4 bytes before the start of buffer 'out'"),
        ("doubled", "kDivision", r"block .* thread .0,0,0.: integer division by zero"),
        ("doubled", "kTrap", "block .* thread .*: trap"),
        ("doubled", "kAbort", "block .* thread .*: abort"),
        ("doubled", "kThrow", "exception: thrown by a kernel"),
        (
            "chain",
            "kSilent",
            r"deadlock: .* 1 wait in let_others_run \(first: thread \(0,.*7 wait in let_others_run"
            r"|deadlock: .* 7 wait in let_others_run \(first: thread \(0,",
        ),
        ("doubled", "kNull", "thread .3,0,0.: read at address 0xc, near no buffer"),
    ],
)
def test_misuse_is_reported_in_every_order(kernels, kernel, bug, message, order):
    with pytest.raises(RuntimeError, match=message):
        getattr(kernels, kernel)(bug)
    result, expected = getattr(kernels, kernel)()  # the next launch is none the worse
    assert torch.equal(result, expected)


def test_blocks_that_wait_for_a_later_one_must_be_resident(library, kernels):
    library.set_order("descending")
    with pytest.raises(RuntimeError, match=r"deadlock: block .8,0,0.: 1 wait in __syncthreads"):
        kernels.chain("kNotResident")
    library.set_order("ascending")
    result, expected = kernels.chain("kNotResident")
    assert torch.equal(result, expected)


@pytest.mark.parametrize("access", ["Read", "Write"])
def test_whole_pages_have_an_inaccessible_page_right_in_front(kernels, access):
    message = f"thread .0,0,0.: {access.lower()} 4 bytes before the start of buffer"
    with pytest.raises(RuntimeError, match=message):
        kernels.doubled(f"k{access}BeforeStart", n=1024)


def test_orders_are_as_they_say(library):
    ascending = torch.arange(160).view(4, 1, 40).expand(4, 2, 40)  # blocks, rounds, threads

    def run(*order):
        library.set_order(*order)
        out = DeviceBuffer(library, torch.zeros(321, dtype=torch.int32), "out")
        library.call("run_sequence", out, 4, 40)
        result = out.tensor()[1:].view(4, 2, 40)
        assert torch.equal(result.sort(2)[0].sort(0)[0], ascending)
        return result

    assert torch.equal(run("ascending"), ascending)
    assert torch.equal(run("descending"), 159 - ascending)
    shuffled = run("shuffled", 1)
    assert torch.equal(run("shuffled", 1), shuffled)
    assert not torch.equal(run("shuffled", 2), shuffled)
    assert not torch.equal(shuffled[:, 0], shuffled[:, 1])  # drawn anew on the way


def test_a_partial_warp_shuffles_among_its_lanes(kernels, library):
    x = arange(20)
    buffers = DeviceBuffer(library, x, "x"), DeviceBuffer(library, torch.zeros(2, 20), "out")
    library.call("run_shuffles", *buffers, 20, BUGS.index("kNone"))
    exchanged, sums = buffers[1].tensor()
    assert torch.equal(exchanged, x[torch.arange(20) ^ 3])
    assert sums.isnan().all()  # what the others would have


def test_a_deep_call_is_a_stack_overflow(library, order):
    out = DeviceBuffer.unwritten(library, [2], torch.float32, "out")
    library.call("run_deep", out, BUGS.index("kNone"))
    assert torch.equal(out.tensor(), torch.full([2], 11.0))
    with pytest.raises(RuntimeError, match=r"thread .*: stack overflow"):
        library.call("run_deep", out, BUGS.index("kStackOverflow"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_buffers_keep_every_bit_and_start_as_nan(library, dtype):
    x = torch.randn(3, 5).to(dtype)
    assert torch.equal(DeviceBuffer(library, x.t(), "x").tensor(), x.t())
    assert DeviceBuffer.unwritten(library, [3, 5], dtype, "x").tensor().isnan().all()


@pytest.mark.parametrize("size, multiple", [(48, 16), (20, 4)])
def test_buffers_are_aligned_as_their_size(library, size, multiple):
    address = library.allocate(size, "x")
    assert address % multiple == 0
    library.release(address)


def test_writes_between_shared_memory_and_its_page_are_reported(kernels):
    # The page begins 16 bytes after the start, and two threads have 8.
    message = r"^write 0 bytes past the end of buffer 'shared memory' .8 bytes"
    with pytest.raises(RuntimeError, match=message):
        kernels.block_sum("kWritePastEnd", threads=2)


def test_writes_before_a_buffer_are_reported_once(library):
    x = DeviceBuffer(library, arange(32), "x")
    out = DeviceBuffer.unwritten(library, [32], torch.float32, "out")
    with pytest.raises(RuntimeError, match=r"^write 4 bytes before the start of buffer 'out'"):
        library.call("run_doubled", x, out, 32, BUGS.index("kWriteBeforeStart"))
    library.call("run_doubled", x, out, 32, BUGS.index("kNone"))


def test_releasing_twice_is_an_error(library):
    address = library.allocate(16, "x")
    library.release(address)
    with pytest.raises(RuntimeError, match="release"):
        library.release(address)


FAULTS = """
import ctypes, faulthandler
faulthandler.enable()
import test_cuda_host as tests
try:
    tests.Kernels(tests.cuda_host.build(tests.PLANTED)).doubled("kReadPastEnd")
except RuntimeError as error:
    print(error, flush=True)
ctypes.string_at(0)
"""


def test_faults_outside_of_launches_are_left_to_others():
    process = subprocess.run(
        [sys.executable, "-c", FAULTS], cwd=PLANTED.parents[1], capture_output=True, text=True
    )
    assert "past the end" in process.stdout
    assert process.returncode < 0 and "Segmentation fault" in process.stderr
