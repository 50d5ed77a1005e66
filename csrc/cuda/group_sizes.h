// SPDX-License-Identifier: Apache-2.0
//
// The sizes of tier 2's kernels: they are made from them, and the plan asks what they take. Needs
// no CUDA.
#pragma once

#include <cstdint>

namespace fastrnn::cuda {

/// A kernel of group_recurrence.cuh for layers of up to `hidden` units.
struct GroupSizes {
  int hidden;
  int tiles;          // of 16 units that each block of a group computes
  int max_row_tiles;  // of 8 rows of the batch that a group can take: their state is in registers

  constexpr int units() const { return 16 * tiles; }
  /// Blocks of a group for H units.
  constexpr int64_t blocks(int64_t H) const { return (H + units() - 1) / units(); }
};

constexpr int kGroupWarps = 8;
/// Units of s that four lanes read together, 16 bytes each. H is a multiple of what one reads.
constexpr int group_chunk(int element_size) { return 64 / element_size; }

/// By size, in 16 bits and in float. Weights take 32, 64 or 128 registers of a thread, of 255.
constexpr GroupSizes kGroupSizes16[] = {{512, 2, 4}, {1024, 2, 4}, {2048, 1, 2}};
constexpr GroupSizes kGroupSizes32[] = {{512, 1, 4}, {1024, 1, 2}, {2048, 1, 1}};

}  // namespace fastrnn::cuda
