# SPDX-License-Identifier: Apache-2.0
"""How layers run on GPUs: the plan is in every build, and asks for no GPU if one is described."""

import pytest
import torch

from fastrnn import _C


def gpu(major, multiprocessors, shared_kib):
    return {
        "major": major, "multiprocessors": multiprocessors, "shared_bytes": shared_kib << 10,
    }  # fmt: skip


H100, A100, RTX_3090 = gpu(9, 132, 227), gpu(8, 108, 163), gpu(8, 82, 99)
TURING = gpu(7, 72, 64)


@pytest.fixture(autouse=True)
def no_walk_is_chosen(monkeypatch):
    monkeypatch.delenv("FASTRNN_CUDA_WALK", raising=False)


def plan(gpu, T, B, H, directions=1, dtype=torch.float32, I=8):
    return _C.cuda_plan(T, B, I, H, directions, dtype.itemsize, **gpu)


@pytest.mark.parametrize(
    "gpu, dtype, sizes, walk, rows",
    [
        # GPU, dtype, (T, B, H, directions), walk, rows of the batch in each block or group
        (H100, torch.float32, (512, 1, 128, 1), "block", 1),
        (H100, torch.float32, (512, 4 * 132, 64, 1), "block", 1),  # small blocks share one
        (H100, torch.float32, (512, 2 * 132, 128, 1), "block", 1),
        (H100, torch.float32, (512, 2 * 132 + 1, 128, 1), "block", 2),
        (H100, torch.float32, (512, 2 * 132, 128, 2), "block", 2),
        (H100, torch.float32, (512, 600, 128, 1), "block", 4),
        (H100, torch.float32, (512, 8 * 4 * 2 * 132, 128, 1), "block", 4),
        (H100, torch.float32, (512, 8 * 4 * 2 * 132 + 1, 128, 1), "steps", 4),
        (H100, torch.float32, (512, 133, 192, 1), "block", 2),
        (H100, torch.float32, (512, 16, 256, 1), "block", 1),
        (H100, torch.float32, (512, 16, 257, 1), "steps", 1),  # rows not at 16 bytes
        (H100, torch.float32, (512, 16, 260, 1), "group", 8),
        (H100, torch.float32, (512, 64, 512, 1), "group", 16),
        (H100, torch.float32, (512, 256, 512, 1), "group", 16),  # two launches
        (H100, torch.float32, (512, 257, 512, 1), "steps", 2),
        (H100, torch.float32, (512, 8, 2048, 1), "group", 8),
        (H100, torch.float32, (512, 1, 2052, 1), "steps", 1),
        (RTX_3090, torch.float32, (512, 16, 255, 1), "block", 1),
        (H100, torch.float32, (512, 4 * 4 * 132, 193, 1), "block", 4),  # weights in shared memory
        (H100, torch.float32, (512, 4 * 4 * 132 + 1, 193, 1), "steps", 4),
        (RTX_3090, torch.float32, (512, 164, 193, 1), "block", 1),  # another row does not fit
        (RTX_3090, torch.float32, (512, 4 * 82, 256, 1), "block", 1),
        (RTX_3090, torch.float32, (512, 4 * 82 + 1, 256, 1), "steps", 1),
        (RTX_3090, torch.float32, (512, 164, 192, 1), "block", 2),
        (H100, torch.float32, (1, 16, 64, 1), "steps", 1),
        (H100, torch.float32, (1, 16, 512, 1), "steps", 1),
        (H100, torch.float64, (512, 16, 64, 1), "steps", 1),
        (H100, torch.float64, (512, 16, 512, 1), "steps", 1),
        (H100, torch.float16, (512, 16, 384, 1), "block", 1),
        (H100, torch.bfloat16, (512, 16, 385, 1), "steps", 1),
        (H100, torch.bfloat16, (512, 16, 392, 1), "group", 8),
        (H100, torch.bfloat16, (512, 64, 512, 1), "group", 8),
        (H100, torch.bfloat16, (512, 64, 512, 2), "group", 16),
        (H100, torch.bfloat16, (512, 256, 512, 1), "group", 32),
        (H100, torch.bfloat16, (512, 128, 1024, 1), "group", 32),
        (H100, torch.bfloat16, (512, 129, 1024, 1), "steps", 1),
        (H100, torch.bfloat16, (512, 16, 2048, 1), "group", 16),
        (H100, torch.bfloat16, (512, 16, 2048, 2), "steps", 1),  # more blocks than multiprocessors
        (A100, torch.bfloat16, (512, 16, 512, 1), "group", 8),
        (H100, torch.float16, (512, 8 * 8 * 132, 256, 1), "block", 4),
        (H100, torch.float16, (512, 4 * 8 * 132, 257, 1), "block", 4),
        (H100, torch.float16, (512, 4 * 8 * 132 + 1, 257, 1), "steps", 4),
        (A100, torch.bfloat16, (512, 16, 320, 1), "block", 1),
        (A100, torch.bfloat16, (512, 16, 321, 1), "steps", 1),
        (RTX_3090, torch.bfloat16, (512, 16, 256, 1), "block", 1),
        (RTX_3090, torch.bfloat16, (512, 16, 257, 1), "steps", 1),
        (TURING, torch.float16, (512, 16, 64, 1), "steps", 1),
        (TURING, torch.float16, (512, 16, 512, 1), "steps", 1),
    ],
)
def test_the_walk_and_the_rows_of_a_block(gpu, dtype, sizes, walk, rows):
    found = plan(gpu, *sizes, dtype)
    assert (found["walk"], found["rows"]) == (walk, rows)


def test_the_walk_can_be_chosen_where_it_can_run(monkeypatch):
    def walks(*shapes):
        return [plan(H100, *sizes)["walk"] for sizes in shapes]

    monkeypatch.setenv("FASTRNN_CUDA_WALK", "block")
    assert walks((1, 16, 64), (9, 99999, 64), (9, 16, 257)) == ["block", "block", "steps"]
    monkeypatch.setenv("FASTRNN_CUDA_WALK", "group")
    found = walks((1, 16, 64), (9, 9999, 512), (9, 16, 257), (9, 16, 63))
    assert found == ["group", "group", "steps", "block"]
    monkeypatch.setenv("FASTRNN_CUDA_WALK", "steps")
    assert walks((512, 16, 64)) == ["steps"]


def test_chunks_hold_a_quarter_of_the_sums_but_8_to_64_mib():
    def steps(*sizes):
        return plan(H100, *sizes)["chunk_steps"]

    assert steps(128, 64, 256) == 128  # 8 MiB
    assert steps(512, 64, 256) == 128
    assert steps(1024, 64, 256) == steps(1024, 64, 256, 1, torch.float16) == 256
    assert steps(10000, 64, 256) == 1024
    assert steps(10000, 64, 256, 2) == steps(10000, 64, 256, 1, torch.float64) == 512
    assert steps(10, 1 << 20, 64) == 1


def test_the_input_is_multiplied_in_the_kernels_of_the_block_walk_up_to_two_features():
    fused = [plan(H100, 9, 1, 64, I=I)["fuse_input"] for I in range(4)]
    assert fused == [False, True, True, False]
    assert not plan(H100, 1, 1, 64, I=1)["fuse_input"]


@pytest.mark.parametrize(
    "sizes", [(0, 1, 1, 1), (1, -1, 1, 1), (1, 1, 1, 1, 3), (1, 1, 1, 1, 1, 1)]
)
def test_a_plan_is_made_for_possible_sizes_only(sizes):
    with pytest.raises(ValueError, match="cuda_plan"):
        _C.cuda_plan(*sizes, **H100)


@pytest.mark.parametrize(
    "fact", [{"multiprocessors": 0}, {"multiprocessors": -1}, {"major": -1}, {"shared_bytes": -1}]
)
def test_a_plan_is_made_for_possible_gpus_only(fact):
    with pytest.raises(ValueError, match=r"cuda_plan: multiprocessors .*major and shared_bytes"):
        _C.cuda_plan(1, 1, 1, 1, **H100 | fact)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_must_be_described():
    for described in ({}, {"major": 9}):
        with pytest.raises(RuntimeError, match=r"cuda_plan: .*; describe one by"):
            _C.cuda_plan(1, 1, 1, 1, **described)
