// SPDX-License-Identifier: Apache-2.0
//
// The sizes of the group walk's kernels. Kernels are made from them, and the plan asks what they
// take. Needs no CUDA.
#pragma once

#include <cstdint>

namespace fastrnn::cuda {

/// Kernels of group_mma.cu for layers of up to `hidden` units. A group takes 1, 2 or 4
/// tiles of 8 rows of the batch.
struct GroupSizes {
  int hidden;
  int tiles;  // of 16 units that each block of a group computes
  int least_row_tiles, most_row_tiles;

  constexpr int units() const { return 16 * tiles; }
  /// Blocks of a group for H units.
  constexpr int64_t blocks(int64_t H) const { return (H + units() - 1) / units(); }
};

constexpr int kGroupWarps = 8;
/// Units of s that four lanes read together, 16 bytes each. H is a multiple of what one reads.
constexpr int group_chunk(int element_size) { return 64 / element_size; }

/// In 16 bits and in float, by `hidden`, then by tiles: more of them for large batches, since every
/// block of a group reads all of the group's state. Weights take 32 to 128 registers of a thread,
/// of 255, the state up to 64.
constexpr GroupSizes kGroupSizes16[] = {{512, 2, 1, 4}, {1024, 2, 1, 4}, {2048, 1, 1, 2}};
constexpr GroupSizes kGroupSizes32[] = {
    {512, 1, 1, 2}, {512, 2, 2, 2}, {1024, 1, 1, 1}, {1024, 2, 2, 2}, {2048, 1, 1, 1}};

/// Which kernel, for how many rows of the batch in a group, and how many groups at the same time.
struct GroupPlan {
  int size;  // in the table of the type
  int row_tiles;
  int64_t at_a_time;

  constexpr int rows() const { return 8 * row_tiles; }
};

}  // namespace fastrnn::cuda
