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
// Rows that a large packed W_hh has to serve before it is cheaper than ATen's product in each step.
constexpr int64_t kRowsToPackLarge = 256;
// Multiply-adds below which a second thread costs more than it brings.
constexpr int64_t kWorkPerThread = 1 << 19;
// Chunks of backward: large enough for the products over them to run at full speed, and not above
// half of the sequence where that is more than small change: with the kept outputs, the workspace
// then stays below what nn.RNN holds.
constexpr int64_t kChunkBytes = 4 << 20, kSmallBytes = 1 << 16;
// The part of a 16-bit sequence that is in float32 at a time.
constexpr int64_t kConvertBytes = 1 << 17;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

Plan plan_layer(const LayerShape& s, int64_t threads) {
  Plan plan{};
  const int64_t weight_bytes = (s.I + s.H) * s.H * s.element_size;
  plan.fuse_input = weight_bytes <= kFusedBytes;
  plan.step_products = !plan.fuse_input && !s.converts && !s.packed && s.B > kBatchToPack &&
                       s.state_rows <= kRowsToPackLarge;
  plan.pack_weights =
      s.converts || (s.total_rows > kRowsToPack && (s.B > kBatchToPack || s.H < kHiddenToPack));
  plan.own_outer_product = !s.converts && s.H <= kOuterHidden && s.I <= kOuterInput;
  plan.converts = s.converts;

  const int64_t together = s.converts ? 1 : s.directions;
  const int64_t work = s.total_rows * (s.I + s.H) * s.H * together;
  const int64_t useful_threads = std::clamp<int64_t>(work / kWorkPerThread, 1, threads);
  plan.row_blocks =
      std::clamp<int64_t>(std::min(useful_threads / together, s.B / kRowsPerBlock), 1, threads);
  plan.parallel = useful_threads > 1;

  const int64_t mean_rows = std::max<int64_t>(1, divide_up(s.total_rows, s.T));
  const int64_t step_bytes = std::max<int64_t>(1, mean_rows * s.H * s.element_size);
  const auto steps_in = [&](int64_t bytes) {
    return std::clamp<int64_t>(bytes / step_bytes, 1, s.T);
  };
  // What is smaller than the packed W_hh, which is freed before the gradients are made, is free.
  const int64_t half =
      std::max(divide_up(s.T, 2), steps_in(std::max(kSmallBytes, s.H * s.H * s.element_size)));
  // The sums of 16-bit gradients are rounded after every chunk: no more than two.
  plan.backward_steps = s.converts ? half : std::min(half, steps_in(kChunkBytes / together));
  plan.convert_steps = s.converts ? steps_in(kConvertBytes) : s.T;
  return plan;
}

}  // namespace fastrnn::cpu
