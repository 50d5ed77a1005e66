// SPDX-License-Identifier: Apache-2.0
//
// The sizes of the block walk's kernels. Kernels are made from them, and the plan asks what they
// take. Needs no CUDA.
#pragma once

#include <cstdint>

namespace fastrnn::cuda {

/// A kernel of block_mma.cu, for layers of up to `hidden` units.
struct BlockMmaSizes {
  int hidden;  // a multiple of 16: `tiles` of 16 units
  int own;     // tiles of units that each warp computes, a part of all; every warp reads all of s
  int in_registers;  // tiles along k whose weights registers hold; shared memory has the others'

  constexpr int tiles() const { return hidden / 16; }
  constexpr int threads() const { return 32 * tiles() / own; }
  /// Tiles of weights that pass through shared memory at a time on their way to registers.
  constexpr int staged() const { return in_registers < 8 ? in_registers : 8; }
  /// Tiles of weights in shared memory, for each tile of units.
  constexpr int places() const {
    return tiles() - in_registers > staged() ? tiles() - in_registers : staged();
  }
  /// 16 bytes more than a row of s, so that the eight rows of a fragment lie in different banks.
  constexpr int row_stride() const { return hidden + 8; }
  constexpr int state_bytes() const { return 2 * 8 * row_stride() * 2; }
  /// Shared memory of each block, which the GPU must have. A place holds 16 bytes of each lane.
  constexpr int shared_bytes() const { return state_bytes() + 16 * threads() * own * places(); }
};

/// By size. Large layers give each warp two tiles, for the traffic of s; the largest leave part of
/// the weights in shared memory.
constexpr BlockMmaSizes kBlockMmaSizes[] = {
    {32, 1, 2}, {64, 1, 4}, {128, 2, 8}, {192, 2, 12}, {256, 2, 16}, {320, 2, 9}, {384, 2, 10},
};

/// A kernel of block_ffma.cu, for layers of up to `hidden` units.
struct BlockFfmaSizes {
  int hidden;
  int units;         // that four lanes share, 2 or 4
  int in_registers;  // of the hidden / 4 weights of a unit that each lane has; shared memory has
                     // the others
  int resident;      // blocks that share a multiprocessor

  constexpr int lane_weights() const { return hidden / 4; }
  constexpr int threads() const { return hidden / units * 4; }
  constexpr int state_bytes(int rows) const { return 2 * rows * hidden * 4; }
  constexpr int shared_bytes(int rows) const {
    return state_bytes(rows) + (lane_weights() - in_registers) * units * threads() * 4;
  }
};

/// By size. Four units to a lane where it has registers for their weights: each warp reads all of
/// s, so that the fewer there are, the less is read. The largest keeps more registers for weights
/// by having fewer threads.
constexpr BlockFfmaSizes kBlockFfmaSizes[] = {
    {32, 2, 8, 8}, {64, 2, 16, 4}, {128, 4, 32, 2}, {192, 2, 48, 1}, {256, 4, 40, 1},
};
/// Most rows of the batch in a block.
constexpr int kBlockFfmaRows = 4;

}  // namespace fastrnn::cuda
