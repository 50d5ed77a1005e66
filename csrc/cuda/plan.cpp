// SPDX-License-Identifier: Apache-2.0
//
// docs/cuda.md gives each constant's reason, and says which are estimates. What they do not cover
// is left to the steps walk.
#include "plan.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <optional>

#include "kernels/block_sizes.h"
#include "kernels/group_sizes.h"

namespace fastrnn::cuda {

namespace {

// Blocks that wait for a multiprocessor start when others have ended. So many waves of blocks, one
// after the other, still take less than the steps walk, which needs two launches in each step.
// Steps that read weights from shared memory take longer.
constexpr int64_t kMaxWaves = 8, kMaxWavesOfShared = 4;
// Groups of blocks that do not fit on the GPU together run in so many launches at most, in 16 bits
// and in float, whose products of single steps take longer.
constexpr int64_t kMaxGroupLaunches = 1, kMaxGroupLaunchesInFloat = 2;
// A single step has no product with W_hh that the block and the group walk could save.
constexpr int64_t kMinSteps = 2;

// Addends or deltas in memory at a time: a part of the sequence's, so that with the kept outputs
// they stay below what nn.RNN holds, and at most so much. Products are at full speed well below
// that.
constexpr int64_t kParts = 4, kChunkBytes = 64 << 20;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t element_size(Type type) { return type == Type::kDouble ? 8 : type == Type::kFloat ? 4 : 2; }

/// Whether FASTRNN_CUDA_WALK asks for this walk: it is taken wherever it can run.
bool is_wanted(Walk walk) {
  const char* const wanted = std::getenv("FASTRNN_CUDA_WALK");
  return wanted != nullptr && std::strcmp(wanted, name_of(walk)) == 0;
}

/// What the plan asks of a kernel of the block walk.
struct BlockNeeds {
  int64_t shared_bytes;  // of a block
  int64_t max_waves;
  int64_t resident;  // blocks that share a multiprocessor
};

BlockNeeds needs(int64_t shared_bytes, bool all_in_registers, int64_t resident) {
  return {shared_bytes, all_in_registers ? kMaxWaves : kMaxWavesOfShared, resident};
}

/// Of the kernel for layers of H units, if there is one. In float, `rows` of the batch go to each
/// block.
std::optional<BlockNeeds> block_for(Type type, int64_t H, int rows) {
  if (type == Type::kDouble) return std::nullopt;
  if (type == Type::kFloat) {
    for (const BlockFfmaSizes& sizes : kBlockFfmaSizes)
      if (H <= sizes.hidden)
        return needs(sizes.shared_bytes(rows), sizes.in_registers == sizes.lane_weights(),
                     sizes.resident);
    return std::nullopt;
  }
  for (const BlockMmaSizes& sizes : kBlockMmaSizes)
    if (H <= sizes.hidden)
      return needs(sizes.shared_bytes(), sizes.in_registers == sizes.tiles(), /*resident=*/1);
  return std::nullopt;
}

/// How groups walk through a layer, and in how many launches.
struct Groups {
  GroupPlan plan;
  int64_t launches;
};

/// The first in the table that runs in one launch, else the one of the fewest.
template <int kCount>
std::optional<Groups> groups_of(const GroupSizes (&table)[kCount], const LayerShape& s,
                                const Gpu& gpu) {
  std::optional<Groups> best;
  for (int size = 0; size < kCount; ++size) {
    const GroupSizes& sizes = table[size];
    if (s.H > sizes.hidden || (best && sizes.hidden > table[best->plan.size].hidden)) continue;
    const int64_t at_a_time = gpu.multiprocessors / (sizes.blocks(s.H) * s.directions);
    if (at_a_time == 0) continue;
    for (int tiles = sizes.least_row_tiles; tiles <= sizes.most_row_tiles; tiles *= 2) {
      const GroupPlan plan{size, tiles, at_a_time};
      const int64_t launches = divide_up(divide_up(s.B, plan.rows()), at_a_time);
      if (!best || launches < best->launches) best = {plan, launches};
    }
  }
  return best;
}

std::optional<Groups> groups_for(const LayerShape& s, const Gpu& gpu) {
  const int64_t item = element_size(s.type);
  const bool aligned = s.H >= 1 && s.H * item % kGroupAlignment == 0;
  if (item == 8 || !aligned || s.B > kMaxGroupRows) return std::nullopt;
  return item == 2 ? groups_of(kGroupSizes16, s, gpu) : groups_of(kGroupSizes32, s, gpu);
}

}  // namespace

const char* name_of(Walk walk) {
  return walk == Walk::kSteps ? "steps" : walk == Walk::kBlock ? "block" : "group";
}

Plan plan_layer(const LayerShape& s, const Gpu& gpu) {
  Plan plan{};
  const auto block = [&] { return block_for(s.type, s.H, plan.block_rows); };
  const auto waves = [&](int64_t rows) {
    const int64_t resident = block() ? block()->resident : 1;
    return divide_up(divide_up(s.B, rows) * s.directions, gpu.multiprocessors * resident);
  };
  const auto fits = [&] { return block() && block()->shared_bytes <= gpu.shared_bytes; };
  // As few rows in a block as let all blocks run at the same time, or as many as fit.
  plan.block_rows = waves(1) <= 1 ? 1 : waves(2) <= 1 ? 2 : kBlockFfmaRows;
  while (plan.block_rows > 1 && block() && !fits()) plan.block_rows /= 2;
  const bool can = gpu.major >= 8 && s.T <= kMaxSteps;
  const bool can_block = can && s.H >= 1 && fits();
  const int64_t rows = element_size(s.type) == 2 ? 8 : plan.block_rows;
  const bool block_pays = can_block && s.T >= kMinSteps && waves(rows) <= block()->max_waves;
  const std::optional<Groups> groups = can ? groups_for(s, gpu) : std::nullopt;
  const bool groups_pay =
      groups && s.T >= kMinSteps &&
      groups->launches <= (s.type == Type::kFloat ? kMaxGroupLaunchesInFloat : kMaxGroupLaunches);
  if (is_wanted(Walk::kSteps))
    plan.walk = Walk::kSteps;
  else if (is_wanted(Walk::kGroup) && groups)
    plan.walk = Walk::kGroup;
  else if (block_pays || (is_wanted(Walk::kBlock) && can_block))
    plan.walk = Walk::kBlock;
  else
    plan.walk = groups_pay ? Walk::kGroup : Walk::kSteps;
  if (groups) plan.groups = groups->plan;
  plan.fuse_input = plan.walk == Walk::kBlock && s.I >= 1 && s.I <= kMaxFusedInput;
  const int64_t step_bytes =
      std::max<int64_t>(1, s.B * s.H * s.directions * std::max<int64_t>(4, element_size(s.type)));
  const int64_t bytes = std::min(kChunkBytes, std::max(gpu.small_bytes, s.T * step_bytes / kParts));
  plan.chunk_steps = std::clamp<int64_t>(bytes / step_bytes, 1, s.T);
  return plan;
}

}  // namespace fastrnn::cuda
