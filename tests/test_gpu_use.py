# SPDX-License-Identifier: Apache-2.0
"""On a GPU: streams, waiting, memory, tensors that 32 bits cannot index.

Contract: work is queued on the current stream and nowhere else, memory comes from PyTorch's
allocator, nothing waits for the GPU, and a training step needs no more memory than nn.RNN's.
"""

import threading
from dataclasses import replace

import pytest
import torch
from devices import needs_gpu
from pairs import tensor
from test_gpu_results import CLASSES, DEVICE
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fastrnn
from fastrnn import testing
from fastrnn.testing import Case

pytestmark = needs_gpu

MEGABYTE, GIGABYTE = 2**20, 2**30
#: Cycles for which a stream sleeps: some ten milliseconds; several hundred.
A_WHILE, LONG = 20_000_000, 400_000_000

#: One per kind of work: few steps, so that no queue of kernels is ever full.
USES = {
    "small": (Case(7, 5, 3, 64, 2, hx=True), torch.float32),
    "large": (Case(7, 16, 33, 512, hx=True), torch.float32),
    "double": (Case(5, 9, 6, 40, hx=True, batch_first=True), torch.float64),
    "bfloat16": (Case(9, 9, 20, 256, bidirectional=True, hx=True), torch.bfloat16),
    "float16": (Case(7, 130, 20, 384, nonlinearity="relu", hx=True), torch.float16),
    "two features": (Case(9, 6, 2, 96, bidirectional=True, hx=True), torch.float32),
    "weights in shared memory": (Case(7, 6, 20, 200, hx=True), torch.float32),
    "packed": (Case(0, 0, 5, 65, 2, True, hx=True, lengths=(9, 3, 1, 7)), torch.float32),
    "packed 16 bits": (Case(0, 0, 5, 128, hx=True, lengths=(4, 6, 5)), torch.bfloat16),
}
every_use = pytest.mark.parametrize("use", USES.values(), ids=USES)


class Work:
    """A module on the GPU, and arguments and slopes that lie there, to be used again and again."""

    def __init__(self, case, dtype, cls=fastrnn.RNN):
        self.case = case
        self.module = case.module(cls, dtype).to(DEVICE)
        inputs, hx = case.arguments(dtype)
        given = pack_sequence(inputs, enforce_sorted=False) if case.lengths else inputs[0]
        self.given = given.to(DEVICE)
        self.hx = None if hx is None else hx.to(DEVICE).requires_grad_()
        self.data = tensor(self.given).detach().requires_grad_()
        with torch.no_grad():
            self.slopes = [torch.randn_like(tensor(t)) for t in self.module(self.given, self.hx)]

    def leaves(self):
        return [self.data, *([] if self.hx is None else [self.hx]), *self.module.parameters()]

    def changing(self):
        """What differs from call to call: data, hx, and the gradients that come back."""
        return [self.data, *([] if self.hx is None else [self.hx]), *self.slopes]

    def fill(self, values):
        with torch.no_grad():
            for t, value in zip(self.changing(), values, strict=True):
                t.copy_(value)

    def draw(self, seed):
        generator = torch.Generator(DEVICE).manual_seed(seed)
        return [torch.randn(t.shape, generator=generator, device=DEVICE).to(t.dtype)
                for t in self.changing()]  # fmt: skip

    def input(self):
        packed = isinstance(self.given, PackedSequence)
        return self.given._replace(data=self.data) if packed else self.data

    def infer(self):
        with torch.no_grad():
            return [tensor(t) for t in self.module(self.input(), self.hx)]

    def train(self):
        results = [tensor(t) for t in self.module(self.input(), self.hx)]
        return [*results, *torch.autograd.grad(results, self.leaves(), self.slopes)]


MODES = {"inference": Work.infer, "training": Work.train}
every_mode = pytest.mark.parametrize("perform", MODES.values(), ids=MODES)


class TestStreams:
    @every_mode
    @every_use
    def test_a_call_reads_what_its_own_stream_wrote_just_before(self, use, perform):
        work, side = Work(*use), torch.cuda.Stream()
        expected = perform(work)
        values = [t.detach().clone() for t in work.changing()]
        work.fill([torch.full_like(t, float("nan")) for t in values])
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(A_WHILE)
            work.fill(values)
            results = perform(work)
        torch.cuda.current_stream().wait_stream(side)
        assert all(map(torch.equal, results, expected))

    @every_mode
    @every_use
    def test_memory_may_be_taken_again_as_soon_as_the_call_returns(self, use, perform):
        work, side = Work(*use), torch.cuda.Stream()
        expected = perform(work)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            other = Work(*use)
            other.fill([t.detach() for t in work.changing()])
            torch.cuda._sleep(A_WHILE)
            results = perform(other)
            del other
            junk = [torch.full((n,), 255, dtype=torch.uint8, device=DEVICE)
                    for n in (2**k for k in range(9, 24))]  # fmt: skip
        torch.cuda.current_stream().wait_stream(side)
        assert all(map(torch.equal, results, expected))
        del junk

    @every_mode
    @pytest.mark.parametrize(
        "pair", [("large", "large"), ("small", "packed"), ("large", "float16")]
    )
    def test_two_streams_at_once(self, pair, perform):
        works = [Work(*USES[name]) for name in pair]
        expected = [perform(work) for work in works]
        streams = [torch.cuda.Stream() for _ in works]
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
        found = []
        for _ in range(10):
            for i, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    found.append((i, perform(works[i])))
        for stream in streams:
            torch.cuda.current_stream().wait_stream(stream)
        assert all(all(map(torch.equal, results, expected[i])) for i, results in found)

    def test_several_threads_with_a_stream_each(self):
        works = [Work(*USES[name]) for name in ("large", "small", "packed", "bfloat16")]
        expected = [work.train() for work in works]
        torch.cuda.synchronize()
        found, barrier = [], threading.Barrier(len(works))

        def train(i):
            stream = torch.cuda.Stream()
            barrier.wait()
            with torch.cuda.stream(stream):
                for _ in range(5):
                    found.append((i, works[i].train()))
            stream.synchronize()

        threads = [threading.Thread(target=train, args=(i,)) for i in range(len(works))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 5 * len(works)
        assert all(all(map(torch.equal, results, expected[i])) for i, results in found)


class TestWaiting:
    @every_mode
    @every_use
    def test_pytorch_sees_no_wait(self, use, perform):
        work = Work(*use)
        torch.cuda.set_sync_debug_mode("error")
        try:
            perform(work)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @every_mode
    @every_use
    def test_a_call_returns_while_the_gpu_is_busy_with_what_came_before(self, use, perform):
        work = Work(*use)
        before, again = perform(work), perform(work)
        del again  # kernels are loaded, memory is in the allocator's cache
        torch.cuda.synchronize()
        slept = torch.cuda.Event()
        torch.cuda._sleep(LONG)
        slept.record()
        results = perform(work)
        assert not slept.query(), "the call waited for the GPU"
        assert all(map(torch.equal, results, before))


def peak(cls, case, dtype, perform):
    """Bytes that a call needs at most, besides its arguments."""
    work = Work(case, dtype, cls)
    perform(work)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    perform(work)
    return torch.cuda.max_memory_allocated() - before


FOOTPRINTS = [
    Case(256, 64, 128, 256),
    Case(200, 16, 512, 512, 2),
    Case(128, 64, 64, 128, 2, bidirectional=True, batch_first=True),
    Case(0, 0, 128, 256, lengths=tuple(range(65, 193, 2))),
    Case(64, 256, 64, 1024),
]


class TestMemory:
    @every_mode
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("case", FOOTPRINTS, ids=str)
    def test_a_call_needs_no_more_than_nn_rnns(self, case, dtype, perform):
        ours, theirs = (peak(cls, case, dtype, perform) for cls in CLASSES)
        allowed = theirs + 2 * MEGABYTE
        assert ours <= allowed, f"{ours / MEGABYTE:.1f} MiB, nn.RNN {theirs / MEGABYTE:.1f} MiB"

    @every_mode
    @every_use
    def test_repeated_calls_need_no_more_memory_than_one(self, use, perform):
        work, levels = Work(*use), []
        for _ in range(24):
            perform(work)
            levels.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
        assert len(set(levels[3:])) == 1


def free_memory():
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


BIG = Case(5000, 4096, 1, 128)
SMALL_STATE = replace(BIG, I=128, H=16)


@pytest.mark.parametrize("case", [BIG, SMALL_STATE, replace(BIG, batch_first=True)], ids=str)
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_the_end_of_a_tensor_that_32_bits_cannot_index_is_that_of_a_slice(mode, case):
    needed = (30 if mode == "inference" else 60) * GIGABYTE
    if free_memory() < needed:
        pytest.skip(f"less than {needed // GIGABYTE} GiB of the GPU's memory are free")
    assert case.T * case.B * max(case.H, case.I) > 2**31
    module = case.module(fastrnn.RNN, torch.bfloat16).to(DEVICE).requires_grad_(False)
    order = slice(None, None, -1 if case.batch_first else 1)
    sequences = (slice(None), slice(-64, None))[order]
    end = (slice(-9, None), slice(-64, None))[order]
    x = torch.randn(*(case.T, case.B)[order], case.I, device=DEVICE, dtype=torch.bfloat16)
    pieces = []
    for given in (x, x[sequences].contiguous()):
        given.requires_grad_(mode == "training")
        output, h_n = module(given)
        found = [output[end].detach().clone(), h_n[:, -64:].detach().clone()]
        if mode == "training":
            slope = torch.ones((), device=DEVICE, dtype=output.dtype).expand_as(output)
            found.append(torch.autograd.grad(output, given, slope)[0][end].clone())
        del output, h_n
        pieces.append(found)
    for ours, right in zip(*pieces, strict=True):
        error = testing.relative_error(ours.double(), right.double())
        assert error < 4 * torch.finfo(torch.bfloat16).eps


def test_the_plan_knows_what_this_gpu_has():
    facts = torch.cuda.get_device_properties(DEVICE)
    room = facts.shared_memory_per_block_optin
    walks = {
        H: fastrnn._C.cuda_plan(512, 16, 8, H, element_size=2)["walk"] for H in (256, 320, 384)
    }
    assert walks == {
        256: "block",
        320: "block" if room >= 125 << 10 else "group",
        384: "block" if room >= 185 << 10 else "group",
    }
    plan = fastrnn._C.cuda_plan(512, 2 * facts.multi_processor_count + 1, 8, 128)
    assert (plan["walk"], plan["rows"]) == ("block", 2)
