// SPDX-License-Identifier: Apache-2.0
//
// No constant here has been measured on a GPU yet: each is an estimate, whose reason docs/cuda.md
// gives. What the estimates do not cover goes to tier 0.
#include "plan.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <optional>

#include "block_sizes.h"

namespace fastrnn::cuda {

namespace {

// Blocks that wait for a multiprocessor start the walk when others have ended it: so many walks,
// one after the other, still take less than tier 0, whose steps are bound by two launches each.
// Steps that read weights from shared memory take longer.
constexpr int64_t kMaxWaves = 8, kMaxWavesOfShared = 4;
// Below this the product of a step that tier 1 saves does not exist.
constexpr int64_t kMinSteps = 2;

// Addends or deltas in memory at a time: a part of the sequence's, so that with the kept outputs
// they stay below what nn.RNN holds, and at most so much. Products are at full speed well below
// that.
constexpr int64_t kParts = 4, kChunkBytes = 64 << 20;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t element_size(Type type) { return type == Type::kDouble ? 8 : type == Type::kFloat ? 4 : 2; }

/// FASTRNN_CUDA_TIER=0 takes tier 0 everywhere, 1 takes tier 1 wherever it can run.
const char* wanted_tier() { return std::getenv("FASTRNN_CUDA_TIER"); }

bool is_tier(const char* wanted, const char* tier) {
  return wanted != nullptr && std::strcmp(wanted, tier) == 0;
}

/// What the plan asks of an engine of tier 1.
struct EngineNeeds {
  int64_t shared_bytes;  // of a block
  int64_t max_waves;
};

EngineNeeds needs(int64_t shared_bytes, bool all_in_registers) {
  return {shared_bytes, all_in_registers ? kMaxWaves : kMaxWavesOfShared};
}

/// Of the engine for layers of H units, if there is one. In float, `rows` of the batch go to each
/// block.
std::optional<EngineNeeds> engine_for(Type type, int64_t H, int rows) {
  if (type == Type::kDouble) return std::nullopt;
  if (type == Type::kFloat) {
    for (const FfmaSizes& sizes : kFfmaSizes)
      if (H <= sizes.hidden)
        return needs(sizes.shared_bytes(rows), sizes.in_registers == sizes.lane_weights());
    return std::nullopt;
  }
  for (const MmaSizes& sizes : kMmaSizes)
    if (H <= sizes.hidden) return needs(sizes.shared_bytes(), sizes.in_registers == sizes.tiles());
  return std::nullopt;
}

}  // namespace

Plan plan_layer(const LayerShape& s, const Gpu& gpu) {
  Plan plan{};
  const auto waves = [&](int64_t rows) {
    return divide_up(divide_up(s.B, rows) * s.directions, gpu.multiprocessors);
  };
  const auto engine = [&] { return engine_for(s.type, s.H, plan.block_rows); };
  const auto fits = [&] { return engine() && engine()->shared_bytes <= gpu.shared_bytes; };
  // As few rows in a block as give all blocks a multiprocessor, or as many as fit.
  plan.block_rows = waves(1) <= 1 ? 1 : waves(2) <= 1 ? 2 : kFfmaRows;
  while (plan.block_rows > 1 && engine() && !fits()) plan.block_rows /= 2;
  const bool can = gpu.major >= 8 && s.H >= 1 && s.T <= kMaxSteps && fits();
  const int64_t rows = element_size(s.type) == 2 ? 8 : plan.block_rows;
  const bool pays = can && s.T >= kMinSteps && waves(rows) <= engine()->max_waves;
  const char* wanted = wanted_tier();
  const bool block = can && !is_tier(wanted, "0") && (pays || is_tier(wanted, "1"));
  plan.tier = block ? Tier::kBlock : Tier::kSteps;
  plan.fuse_input = block && s.I >= 1 && s.I <= kMaxFusedInput;
  const int64_t step_bytes =
      std::max<int64_t>(1, s.B * s.H * s.directions * std::max<int64_t>(4, element_size(s.type)));
  const int64_t bytes = std::min(kChunkBytes, std::max(gpu.small_bytes, s.T * step_bytes / kParts));
  plan.chunk_steps = std::clamp<int64_t>(bytes / step_bytes, 1, s.T);
  return plan;
}

}  // namespace fastrnn::cuda
