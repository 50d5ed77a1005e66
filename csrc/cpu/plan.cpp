// SPDX-License-Identifier: Apache-2.0
//
// Every rule has a reason, and every constant the measurement that decided it: docs/tuning.md.
#include "plan.h"

#include <algorithm>

namespace fastrnn::cpu {

namespace {

// Both matrices of a step stay in a core's second-level cache, else one large product is faster.
constexpr int64_t kStepBytes = 1 << 20;
// One or two rows would read all of W_ih in each step for no reuse: from this many features on.
constexpr int64_t kInputToMultiply = 32;
// Packing reads and writes every weight: worth it for more rows, in all steps, than these. For few
// rows of many features it costs more than the product itself, by ATen too.
constexpr int64_t kRowsToPack = 16, kFeaturesPerRow = 8, kSmallHidden = 192;
// In one product, packing is cheaper than ATen's from this many rows on.
constexpr int64_t kRowsToPackOnce = 64;
// One or two rows read a huge W_hh as fast as it lies; backward a large one for any rows, and
// without a panel's memory, where its rows begin at cache lines.
constexpr int64_t kLargeHidden = 256, kHugeHidden = 1024, kLineBytes = 64;
// The hidden size from which ATen's product in each step outruns the kernels, where it can.
constexpr int64_t kHiddenForAten = 400;
// 16-bit sums in float32 are worth their memory where they are small, or beside so many rows.
constexpr int64_t kSmallSums = 3 << 14, kRowsPerColumn = 8;
// Multiply-adds for each thread.
constexpr int64_t kWorkPerThread = 3 << 17;
// Smaller blocks of rows leave the register tiles too empty; where W_hh is small that is still
// better than any hand-over.
constexpr int64_t kRowsPerBlock = 4, kRowsPerSmallBlock = 2;
// A team shares a step that takes longer than twice the hand-over: multiply-adds, of two rows at
// least, since one reads as much of W_hh. Each thread has so many columns.
constexpr int64_t kWorkToShare = 3 << 15, kColumnsPerSlab = 64;
// A chunk of backward: a part of the sequence where that is more than small change. With the kept
// outputs, the workspace then stays below what nn.RNN holds.
constexpr int64_t kChunks = 4, kSmallChunkBytes = 3 << 15;
// Of a 16-bit sequence in float32 at a time.
constexpr int64_t kConvertBytes = 1 << 15;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t mean_rows(const LayerShape& s) {
  return std::max<int64_t>(1, divide_up(s.total_rows, s.T));
}

/// Few rows of a large layer: the threads share the columns of weights that are read as they are.
bool is_few_rows(const LayerShape& s) {
  return s.H > kSmallHidden && s.total_rows * kFeaturesPerRow <= s.H;
}

void plan_products(const LayerShape& s, Plan& plan) {
  const bool step_by_aten = s.aten_is_faster && !s.converts && !s.packed && s.B > 2 &&
                            s.H >= kHiddenForAten && !is_few_rows(s);
  const bool packs = s.converts || (s.total_rows > kRowsToPack && !is_few_rows(s) &&
                                    !(s.B <= 2 && s.H >= kHugeHidden));
  plan.state = step_by_aten ? Maker::kAten : packs ? Maker::kPanels : Maker::kAsIs;

  const bool fits = (s.I + s.H) * s.H * s.element_size <= kStepBytes;
  const bool reuses = s.B > 2 || s.I < kInputToMultiply || s.total_rows <= kRowsToPack;
  const bool pays = !packs || s.I <= s.total_rows;
  if (s.I > 0 && (fits || s.converts) && reuses && pays && !step_by_aten)
    plan.input = Maker::kInStep;
  else if (s.converts)
    plan.input = Maker::kPanels;
  else if (s.total_rows * kFeaturesPerRow <= s.I)
    plan.input = Maker::kAsIs;
  else
    plan.input =
        s.total_rows > kRowsToPackOnce && !s.aten_is_faster ? Maker::kPanels : Maker::kAten;

  const bool pairs = s.element_size == 2;  // which lie side by side in packed weights only
  const bool aligned = s.H * s.element_size % kLineBytes == 0;
  const bool as_is =
      s.total_rows <= kRowsToPack || is_few_rows(s) ||
      (aligned && (s.B == 1 ? 2 : 1) * s.H >= kLargeHidden && (s.B <= 2 || s.H <= kHugeHidden));
  plan.delta = step_by_aten                     ? Maker::kAten
               : as_is && !pairs && !s.converts ? Maker::kAsIs
                                                : Maker::kPanels;

  const bool small = (s.I + s.H) * s.H <= kSmallSums;
  const bool own = s.packed || small || s.converts ||
                   (pairs ? s.total_rows >= kRowsPerColumn * (s.I + s.H) && !s.aten_is_faster
                          : !s.aten_is_faster);
  plan.weight_grads = own ? Maker::kPanels : Maker::kAten;
}

void plan_threads(const LayerShape& s, int64_t threads, Plan& plan) {
  const int64_t walks = s.converts ? 1 : s.directions;  // at the same time
  const int64_t work = s.total_rows * (s.I + s.H) * s.H * walks;
  plan.threads = std::clamp<int64_t>(work / kWorkPerThread, 1, threads);
  const int64_t each = std::max<int64_t>(1, plan.threads / walks);
  const int64_t rows_per_block = s.H <= kSmallHidden ? kRowsPerSmallBlock : kRowsPerBlock;
  plan.row_blocks = plan.state == Maker::kAsIs && s.H > kSmallHidden
                        ? 1  // each block would read all of a large weight
                        : std::clamp<int64_t>(s.B / rows_per_block, 1, each);
  const int64_t rows = mean_rows(s) / plan.row_blocks;
  const bool shares =
      plan.state != Maker::kAten && std::max<int64_t>(2, rows) * s.H * s.H >= kWorkToShare;
  plan.column_blocks =
      shares ? std::clamp<int64_t>(s.H / kColumnsPerSlab, 1, each / plan.row_blocks) : 1;
}

void plan_chunks(const LayerShape& s, Plan& plan) {
  const int64_t step_bytes = std::max<int64_t>(1, mean_rows(s) * s.H * s.element_size);
  const auto steps_in = [&](int64_t bytes) {
    return std::clamp<int64_t>(bytes / step_bytes, 1, s.T);
  };
  // A single chunk where delta is no larger than W_hh, whose gradient is in memory as well. What is
  // converted is in memory twice, as float32.
  const int64_t delta_bytes = s.total_rows * s.H * s.element_size, share = s.converts ? 4 : 1;
  const int64_t small_bytes = s.converts ? kSmallChunkBytes / 4 : kSmallChunkBytes;
  const bool is_small = delta_bytes <= std::max(small_bytes, s.H * s.H * s.element_size);
  plan.chunk_steps =
      is_small ? s.T : std::max(divide_up(s.T, share * kChunks), steps_in(small_bytes));
  plan.convert_steps = steps_in(kConvertBytes);
}

}  // namespace

Plan plan_layer(const LayerShape& s, int64_t threads) {
  Plan plan{};
  plan.converts = s.converts;
  plan_products(s, plan);
  plan_threads(s, threads, plan);
  const bool one_walk = s.directions * plan.row_blocks * plan.column_blocks == 1;
  const bool own = plan.weight_grads != Maker::kAten;
  if (one_walk && plan.threads > 1 && own && !s.converts)
    plan.sharing = Sharing::kBeside;
  else
    plan.sharing = own && !s.converts && s.H <= kSmallHidden && plan.column_blocks == 1
                       ? Sharing::kByRows
                       : Sharing::kBySlabs;
  const bool own_input_grad =
      own && (s.converts || plan.sharing == Sharing::kByRows || s.total_rows > kRowsToPackOnce);
  plan.input_grad = own_input_grad ? Maker::kPanels : Maker::kAten;
  plan_chunks(s, plan);
  return plan;
}

}  // namespace fastrnn::cpu
