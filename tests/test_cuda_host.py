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

    def block_sum(self, bug="kNone"):
        x = arange(5 * 64)
        return self._run("block_sum", [x], x.view(5, 64).sum(1), 5, 64, bug=bug)

    def doubled(self, bug="kNone", n=77):
        return self._run("doubled", [arange(n)], 2 * arange(n), n, bug=bug)

    def shuffles(self, bug="kNone", threads=64):
        x = arange(threads) * torch.tensor([1.0, -1.0, -1.0, 1.0]).repeat(threads // 4)
        warps = x.view(-1, 32)
        lane = torch.arange(32)
        down = torch.where(lane % 16 < 14, lane + 2, lane)
        expected = [
            warps[:, lane ^ 3],
            warps[:, lane // 8 * 8 + 3],
            warps[:, torch.where(lane >= 2, lane - 2, lane)],
            warps[:, down],
            warps.sum(1, keepdim=True).expand(-1, 32),
            torch.full_like(warps, 116),
        ]
        return self._run("shuffles", [x], torch.stack(expected).view(6, -1), threads, bug=bug)

    def product(self, bug="kNone", K=7):
        a, b = arange(32 * K).view(32, K) % 5, arange(K * 32).view(K, 32) % 7
        return self._run("product", [a, b], a @ b, K, bug=bug)

    def halves(self, bug="kNone"):
        x = arange(128)
        return self._run("halves", [x], x + x.roll(64), 128, bug=bug)

    def cluster_exchange(self, bug="kNone"):
        x = arange(8)
        expected = x.view(2, 4).sum(1, keepdim=True) + torch.tensor([1.0, 2.0, 3.0, 0.0])
        return self._run("cluster_exchange", [x], expected.view(-1), 8, 4, bug=bug)

    def hand_over(self, bug="kNone"):
        x = arange(5 * 32).view(5, 32)
        return self._run("hand_over", [x], x.roll(-1, 1), 5, bug=bug)

    def remote_store(self, bug="kNone"):
        x = arange(3 * 32)
        expected = x.view(3, 16, 2).roll(1, 0).flip(2).reshape(-1)
        return self._run("remote_store", [x], expected, 3, 32, bug=bug)

    def pipeline(self, bug="kNone", columns=41):
        # 32 threads, so 128 columns; the padding of the rows must not be read.
        x = arange(6 * 44).view(6, 44)
        expected = torch.zeros(128)
        expected[:columns] = x[:, :columns].sum(0)
        return self._run("pipeline", [x], expected, 6, columns, 32, bug=bug)

    def grid_sum(self, bug="kNone", cooperative=True):
        x = arange(6)
        expected = sum((x + step).sum() for step in range(4)).expand(6)
        counter = DeviceBuffer(self.library, torch.zeros(1, dtype=torch.int32), "counter")
        partial = DeviceBuffer.unwritten(self.library, [2, 6], torch.float32, "partial")
        out = DeviceBuffer.unwritten(self.library, [6], torch.float32, "out")
        self.library.call(
            "run_grid_sum", DeviceBuffer(self.library, x, "x"), partial, out, counter, 4, 6,
            cooperative, BUGS.index(bug),
        )  # fmt: skip
        return out.tensor(), expected

    def read_and_allow(self, bug="kNone"):
        state = torch.zeros(3, dtype=torch.int32)
        return self._run("read_and_allow", [state], arange(9) - 1, 9, bug=bug)


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
        ("halves", "kNoBarrier"),
        ("cluster_exchange", "kNoBarrier"),
        ("cluster_exchange", "kNoFirstBarrier"),
        ("cluster_exchange", "kNoLastBarrier"),
        ("hand_over", "kNoWait"),
        ("read_and_allow", "kNoBarrier"),
        ("remote_store", "kNoWait"),
        ("grid_sum", "kNoWait"),
        ("grid_sum", "kNoLastBarrier"),
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
        ("pipeline", "kNoWait"),
        ("pipeline", "kWaitForTooFew"),
    ],
)
def test_what_nobody_wrote_is_nan_in_every_order(kernels, kernel, bug, order):
    result, expected = getattr(kernels, kernel)(bug)
    assert result.isnan().any() and not expected.isnan().any()


@pytest.mark.parametrize(
    "kernel, bug, message",
    [
        ("block_sum", "kDivergentBarrier", "deadlock: .*: 1 have exited .*, 63 wait at barrier 0"),
        ("halves", "kDivergentBarrier", r"deadlock: .* 63 wait at barrier 2 \(first: thread \(1,"),
        ("halves", "kPartOfWarp", "only a part of a warp"),
        ("shuffles", "kLaneExits", "deadlock: .*have exited .*5,0,0.* 31 wait in __shfl_xor"),
        ("shuffles", "kLaneAtBarrier", "deadlock: .* 1 wait at barrier 0 .* in __shfl_xor_sync"),
        (
            "shuffles",
            "kLaneElsewhere",
            "lanes .* disagree .*: __shfl_(xor.* and .*up|up.* and .*xor)_",
        ),
        ("hand_over", "kTooFewArrivals", "endless polling: .* 64 poll"),
        ("remote_store", "kTooFewBytes", "endless polling: .* 32 poll"),
        ("remote_store", "kTooManyArrivals", "more arrivals at an mbarrier than its count"),
        ("pipeline", "kSourceChanges", "source of a cp_async changed before the wait"),
        ("doubled", "kReadPastEnd", r"read 0 bytes past the end of buffer 'input 0' .308 bytes"),
        ("doubled", "kWritePastEnd", "thread .13,0,0.: write 0 bytes past the end of buffer 'out'"),
        ("doubled", "kWriteBeforeStart", "write 4 bytes before the start of buffer 'out'"),
        ("doubled", "kDivision", r"block .* thread .0,0,0.: integer division by zero"),
        ("doubled", "kTrap", "block .* thread .*: trap"),
        ("doubled", "kAbort", "block .* thread .*: abort"),
        ("doubled", "kThrow", "exception: thrown by a kernel"),
        ("doubled", "kNull", "thread .3,0,0.: read at address 0xc, near no buffer"),
    ],
)
def test_misuse_is_reported_in_every_order(kernels, kernel, bug, message, order):
    with pytest.raises(RuntimeError, match=message):
        getattr(kernels, kernel)(bug)
    result, expected = getattr(kernels, kernel)()  # the next launch is none the worse
    assert torch.equal(result, expected)


@pytest.mark.parametrize("access", ["Read", "Write"])
def test_whole_pages_have_an_inaccessible_page_right_in_front(kernels, access):
    message = f"thread .0,0,0.: {access.lower()} 4 bytes before the start of buffer"
    with pytest.raises(RuntimeError, match=message):
        kernels.doubled(f"k{access}BeforeStart", n=1024)


def test_orders_are_as_they_say(library):
    def run(*order):
        library.set_order(*order)
        out = DeviceBuffer(library, torch.zeros(161, dtype=torch.int32), "out")
        library.call("run_sequence", out, 4, 40)
        assert sorted(out.tensor()[1:].tolist()) == list(range(160))
        return out.tensor()[1:].tolist()

    assert run("ascending") == list(range(160))
    assert run("descending") == list(range(159, -1, -1))
    assert run("shuffled", 1) == run("shuffled", 1) != run("shuffled", 2)


def test_shared_memory_of_an_exited_block_is_inaccessible(kernels, library):
    library.set_order("ascending")
    with pytest.raises(
        RuntimeError, match=r"read at byte 16 of .*shared.*, whose block has exited"
    ):
        kernels.cluster_exchange("kNoLastBarrier")


def test_blocks_that_wait_for_one_another_need_a_cooperative_launch(kernels, order):
    with pytest.raises(RuntimeError, match=r"endless polling: .* 63 wait at barrier 0"):
        kernels.grid_sum(cooperative=False)


def test_a_partial_warp_shuffles_among_its_lanes(kernels, library):
    x = arange(20)
    buffers = DeviceBuffer(library, x, "x"), DeviceBuffer(library, torch.zeros(6, 20), "out")
    library.call("run_shuffles", *buffers, 20, 0)
    assert torch.equal(buffers[1].tensor()[2], torch.cat([x[:2], x[:18]]))


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


@pytest.mark.parametrize("size, alignment, multiple", [(48, 1, 16), (20, 1, 4), (20, 256, 256)])
def test_buffers_are_aligned_as_their_size_or_as_asked_for(library, size, alignment, multiple):
    address = library.allocate(size, "x", alignment)
    assert address % multiple == 0
    library.release(address)


def test_writes_between_an_aligned_buffer_and_its_page_are_reported(library):
    x = DeviceBuffer(library, arange(32), "x")
    out = DeviceBuffer.unwritten(library, [32], torch.float32, "out", alignment=4096)
    with pytest.raises(RuntimeError, match=r"^write 0 bytes past the end of buffer 'out'"):
        library.call("run_doubled", x, out, 32, BUGS.index("kWritePastEnd"))
    library.call("run_doubled", x, out, 32, BUGS.index("kNone"))  # reported once


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
