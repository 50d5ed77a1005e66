// SPDX-License-Identifier: Apache-2.0
//
// The reasons behind each constant are the measurements in docs/design.md.
#include "plan.h"

#include <algorithm>

namespace fastrnn::cpu {

namespace {

// Both matrices must stay in a core's second-level cache, else one large product is faster.
constexpr int64_t kFusedBytes = 1 << 20;
// A part of the batch smaller than this leaves the register tiles half empty.
constexpr int64_t kRowsPerBlock = 8;
// Up to these sizes our outer product is as fast as a product that packs; above, its rows alias in
// the first-level cache.
constexpr int64_t kOuterHidden = 128, kOuterInput = 256;
// Packing reads and writes every weight once: too dear for few rows. A single sequence reads W_hh
// at the speed of the cache that holds it, packed or not.
constexpr int64_t kRowsToPack = 16, kBatchToPack = 2, kHiddenToPack = 256;
// Multiply-adds below which a second thread costs more than it brings.
constexpr int64_t kWorkPerThread = 1 << 19;
// Workspace for one chunk of steps: large enough for the products over it to run at full speed.
constexpr int64_t kChunkBytes = 4 << 20;

}  // namespace

Plan plan_layer(const LayerShape& s, int64_t threads) {
  Plan plan{};
  const int64_t weight_bytes = (s.I + s.H) * s.H * s.element_size;
  plan.fuse_input = weight_bytes <= kFusedBytes;

  plan.pack_weights = s.total_rows > kRowsToPack && (s.B > kBatchToPack || s.H < kHiddenToPack);
  plan.own_outer_product = s.H <= kOuterHidden && s.I <= kOuterInput;

  const int64_t work = s.total_rows * (s.I + s.H) * s.H * s.directions;
  const int64_t useful_threads = std::clamp<int64_t>(work / kWorkPerThread, 1, threads);
  plan.row_blocks =
      std::clamp<int64_t>(std::min(useful_threads / s.directions, s.B / kRowsPerBlock), 1, threads);
  plan.parallel = useful_threads > 1;

  const int64_t mean_rows = std::max<int64_t>(1, s.total_rows / std::max<int64_t>(1, s.T));
  const int64_t step_bytes = mean_rows * s.H * s.directions * s.element_size;
  plan.backward_steps = std::clamp<int64_t>(kChunkBytes / std::max<int64_t>(1, step_bytes), 1, s.T);
  plan.forward_steps = s.converts ? plan.backward_steps : s.T;
  return plan;
}

}  // namespace fastrnn::cpu
