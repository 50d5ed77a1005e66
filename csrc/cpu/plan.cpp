// SPDX-License-Identifier: Apache-2.0
//
// The reasons behind each constant are the measurements in docs/design.md.
#include "plan.h"

#include <algorithm>

#include "recurrence.h"

namespace fastrnn::cpu {

namespace {

// Both matrices must stay in a core's second-level cache, else one large product is faster; so it
// is for one or two long sequences of this many features. (A product whose operands have to be
// converted is not.) Fewer features than these are packed whatever W_hh is: dot products of so few
// terms are dear.
constexpr int64_t kFusedBytes = 1 << 20, kInputToMultiply = 32, kInputToPack = 16;
// A part of the batch smaller than this leaves the register tiles too empty; for small W_hh that is
// still better than any hand-over.
constexpr int64_t kRowsPerBlock = 4, kRowsPerSmallBlock = 2, kSmallHidden = 192;
// Threads share a step where it takes twice as long as handing the state over in each step
// (multiply-adds, or, with one or two rows, elements of W_hh that are read: there a thread that
// walks alone mostly has products made beside it), and there are so many columns for each.
constexpr int64_t kWorkToShare = 1 << 16, kElementsToShare = 3 << 14, kColumnsPerBlock = 64;
// Up to these sizes gradients are ours in every type and on any processor: sums in float32 are
// small there, and parts of the batch bring more than ATen's products.
constexpr int64_t kOuterHidden = 128, kOuterInput = 256;
// Larger ones of converted layers have sums in float32, worth their memory beside so many rows for
// each of their columns.
constexpr int64_t kRowsPerColumn = 4;
// Packing reads and writes every weight once: too dear for few rows, but next to nothing for a tiny
// layer. One or two rows read a large W_hh nearly as fast without that: it pays only for more rows
// in all, in forward while the second-level cache holds it, in backward where its rows do not begin
// at cache lines, so that vectors lie across two.
constexpr int64_t kRowsToPack = 16, kTinyHidden = 8;
constexpr int64_t kBatchToPack = 2, kHiddenToPack = 256, kRowsToPackForFew = 64,
                  kBytesToPackForFew = 1 << 20, kLineBytes = 64;
// Rows that a packed weight has to serve before it is cheaper: in all steps, than one that is read
// as it is, above kSmallHidden; in one product, than ATen's. The hidden size from which 16-bit
// matrix instructions in ATen's product outweigh all else.
constexpr int64_t kRowsToPackLarge = 128, kRowsToPackOnce = 64, kHiddenFor16Bit = 400;
// For few rows of many features packing costs more than the product itself, by ATen too.
constexpr int64_t kFeaturesPerRow = 8, kFewRows = 32;
// Multiply-adds below which a second thread costs more than it brings; fewer, if each thread has so
// many rows that register tiles are full.
constexpr int64_t kWorkPerThread = 1 << 19, kWorkOfFullTiles = 3 << 17, kRowsOfFullTiles = 12;
// The same for parts of the batch in backward, each of which has tensors of its own; larger layers
// gain nothing by them.
constexpr int64_t kWorkPerBatchPart = 1 << 20, kBatchPartHidden = 192;
// Chunks of backward: large enough for the products over them to run at full speed, and a part of
// the sequence only, where that is more than small change: with the kept outputs, the workspace
// then stays below what nn.RNN holds.
constexpr int64_t kChunkBytes = 4 << 20, kSmallBytes = 3 << 15, kParts = 4;
// Smaller panels are too little memory to give up the speed of packing for; one row gains little by
// it anyway.
constexpr int64_t kLargePanelBytes = 1 << 20, kHiddenToPackForOne = 128;
// The part of a 16-bit sequence that is in float32 at a time: of the outputs, and at most.
constexpr int64_t kConvertParts = 8, kConvertBytes = 1 << 16;

// Layers, or a walk and the products before it, side by side: rows of the first part, a tile, for
// which all wait; and so many larger ones, since each costs half a microsecond besides. All layers'
// packed weights are in memory at once then: no more than so many times the outputs. A first
// layer's product with more features than this, of H, is made before by all threads.
constexpr int64_t kFirstRows = 6, kPartsOfStage = 12;
constexpr int64_t kPanelsPerOutput = 4, kWideInput = 2;
// Parts whose weight gradients are made beside the walk: of so many multiply-adds, since each reads
// and writes all sums, and so many at most.
constexpr int64_t kWorkPerPart = 1 << 19, kGradientParts = 16;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t mean_rows(const LayerShape& s) {
  return std::max<int64_t>(1, divide_up(s.total_rows, s.T));
}

/// The parts of the sequence that backward, and conversion, have in memory at a time.
void plan_chunks(const LayerShape& s, Plan& plan) {
  const bool is_16bit = s.converts || s.element_size == 2;
  const int64_t step_bytes = std::max<int64_t>(1, mean_rows(s) * s.H * s.element_size);
  const auto steps_in = [&](int64_t bytes) {
    return std::clamp<int64_t>(bytes / step_bytes, 1, s.T);
  };
  // Gradients of a first chunk are in memory beside the packed W_hh of a second one. So a single
  // chunk where delta is smaller than that, else parts of the sequence.
  // Packed sequences may have previous states gathered, as much again as delta; chunks that are
  // converted have all their tensors in memory twice.
  const int64_t delta_bytes = s.total_rows * s.H * s.element_size;
  const bool converted = s.converts && plan.own_gradients,
             gathers = s.packed && !plan.own_gradients;
  const int64_t parts = converted ? 4 * kParts : gathers ? 2 * kParts : kParts;
  const int64_t small_bytes = converted ? kSmallBytes / 8 : kSmallBytes;
  const int64_t chunk = is_16bit ? s.T : steps_in(kChunkBytes / s.side_by_side());
  if (delta_bytes <= std::max(small_bytes, s.w_hh_bytes()))
    plan.backward_steps = s.T;
  else
    plan.backward_steps =
        std::min(chunk, std::max<int64_t>(divide_up(s.T, parts), steps_in(small_bytes)));
  const int64_t convert_bytes =
      std::clamp(delta_bytes / 2 / kConvertParts, kConvertBytes / 2, kConvertBytes);
  plan.convert_steps = s.converts ? steps_in(convert_bytes) : s.T;
}

}  // namespace

Plan plan_layer(const LayerShape& s, int64_t threads) {
  Plan plan{};
  plan.converts = s.converts;
  const bool few_in_large = !s.converts && s.B <= kBatchToPack && s.H >= kHiddenToPack;
  plan.pack_weights =
      s.converts || (s.H <= kTinyHidden && s.I <= s.total_rows) ||
      (few_in_large ? s.total_rows >= kRowsToPackForFew && s.w_hh_bytes() <= kBytesToPackForFew
                    : s.total_rows > kRowsToPack);
  // Few rows would read all of W_ih in each step, and one larger than the output is not worth
  // packing.
  const bool reuses_input_weight = s.B > kBatchToPack || s.I < kInputToMultiply;
  const bool large_16bit = s.tile_products && s.H >= kHiddenFor16Bit;
  const bool fits = (s.I + s.H) * s.H * s.element_size <= kFusedBytes;
  plan.fuse_input = s.I > 0 && (fits || s.converts) && !large_16bit &&
                    (plan.pack_weights ? reuses_input_weight && s.I <= s.total_rows
                                       : reuses_input_weight || s.total_rows <= kRowsToPack);
  plan.pack_input_weights = plan.fuse_input && (plan.pack_weights || s.I < kInputToPack);
  const bool few_rows = !plan.fuse_input && !s.converts && s.B > kBatchToPack &&
                        s.H > kSmallHidden && s.state_rows <= kRowsToPackLarge;
  plan.own_input_product =
      !plan.fuse_input && !s.converts && !large_16bit && s.total_rows * kFeaturesPerRow <= s.I;
  const bool reads_as_is =
      few_rows && s.B <= kFewRows && s.B * kFeaturesPerRow <= s.H && !large_16bit;
  plan.backward_step_products =
      !s.packed && s.B > kBatchToPack && (large_16bit || (s.baseline && few_rows));
  plan.step_products = plan.backward_step_products && !reads_as_is;
  if (reads_as_is) plan.pack_weights = false;
  plan.own_products =
      !s.converts && !s.tile_products && !s.baseline && s.total_rows > kRowsToPackOnce;
  const bool small = s.H <= kOuterHidden && s.I <= kOuterInput,
             has_many = s.total_rows >= kRowsPerColumn * (s.I + s.H);
  plan.own_gradients = small || (s.converts ? has_many : s.element_size > 2 && !s.baseline);

  const int64_t together = s.side_by_side();
  const int64_t work = s.total_rows * (s.I + s.H) * s.H * together;
  const int64_t with_full_tiles =
      std::min(work / kWorkOfFullTiles, mean_rows(s) / kRowsOfFullTiles);
  const int64_t useful_threads =
      std::clamp<int64_t>(std::max(work / kWorkPerThread, with_full_tiles), 1, threads);
  const int64_t rows_per_block = s.H <= kSmallHidden ? kRowsPerSmallBlock : kRowsPerBlock;
  // Parts of few rows would each read all of a large weight.
  plan.row_blocks =
      reads_as_is ? 1
                  : std::clamp<int64_t>(std::min(useful_threads / together, s.B / rows_per_block),
                                        1, threads);
  plan.column_blocks = 1;
  const int64_t rows = mean_rows(s) / plan.row_blocks;
  const int64_t elements = s.H * s.H;
  if (!plan.step_products &&
      (rows <= 2 && !s.converts ? elements >= kElementsToShare
                                : std::max<int64_t>(2, rows) * elements >= kWorkToShare))
    plan.column_blocks = std::clamp<int64_t>(
        std::min(useful_threads / (plan.row_blocks * together), s.H / kColumnsPerBlock), 1,
        kMaxTeam);
  plan.parallel = useful_threads > 1;
  const bool by_rows = plan.own_gradients && s.H <= kBatchPartHidden && plan.column_blocks == 1 &&
                       !(s.converts && (s.packed || !small));
  plan.batch_parts = by_rows
                         ? std::clamp<int64_t>(
                               std::min(s.B / rows_per_block, work / kWorkPerBatchPart), 1, threads)
                         : 1;

  // Parts of the batch write rows that are apart, which ATen's product could not.
  plan.own_input_gradient =
      plan.own_gradients && (small || s.converts || plan.own_products || plan.batch_parts > 1);

  plan_chunks(s, plan);
  const bool walks_alone = together * plan.row_blocks * plan.column_blocks * plan.batch_parts == 1;
  plan.gradient_steps = s.T;
  if (plan.parallel && walks_alone && plan.own_gradients && !s.converts)
    plan.gradient_steps =
        divide_up(s.T, std::clamp<int64_t>(work / kWorkPerPart, 1, kGradientParts));

  const bool across_lines = s.B <= kBatchToPack && s.total_rows >= kRowsToPackForFew &&
                            s.H * s.element_size % kLineBytes != 0;
  // A panel is in memory beside the gradients where these are made beside the walk, and where more
  // than one chunk is walked: there it may be larger than a chunk's delta.
  const bool one_beside = plan.gradient_steps < s.T && s.B == 1 && s.H >= kHiddenToPackForOne;
  const bool outweighs_chunk = !s.converts && s.w_hh_bytes() >= kLargePanelBytes &&
                               s.total_rows > s.H && s.total_rows < kParts * s.H;
  // Of bfloat16 the kernels multiply pairs only in packed weights.
  plan.backward_packs = s.element_size == 2
                            ? s.total_rows > kRowsToPack
                            : across_lines || (plan.pack_weights && !few_in_large && !few_rows &&
                                               !one_beside && !outweighs_chunk);
  return plan;
}

StackPlan plan_stack(const LayerShape& first, int64_t layers, int64_t threads) {
  const StackPlan by_layers{1, first.T, first.T, false};
  if (threads == 1 || first.directions == 2 || first.converts) return by_layers;
  LayerShape layer = first;
  if (layers > 1) layer.I = first.H;
  const Plan plan = plan_layer(layer, threads);
  if (plan.step_products || plan.row_blocks * plan.column_blocks > 1) return by_layers;
  StackPlan stack;
  stack.multiplies_first = plan.own_products && first.I <= kWideInput * first.H;
  // Products of so few rows are ATen's, or ours by columns: not by parts of the sequence.
  if (!plan.fuse_input && first.total_rows <= kRowsToPackOnce) return by_layers;
  if (layers > 1 && layer.I + first.H > kPanelsPerOutput * first.total_rows) return by_layers;
  // Stages: each layer's walk, and its product, if that is not in the walk or made before.
  const bool first_multiplies = stack.multiplies_first && !plan_layer(first, threads).fuse_input;
  const int64_t stages = layers + (plan.fuse_input ? 0 : layers - 1) + first_multiplies;
  const int64_t work = first.total_rows * (layer.I + first.H) * first.H;
  stack.threads = std::min({threads, stages, work / kWorkPerThread});
  if (stack.threads <= 1) return by_layers;
  stack.first_steps = divide_up(kFirstRows, mean_rows(first));
  stack.steps = std::max(stack.first_steps, divide_up(first.T, kPartsOfStage));
  return stack;
}

}  // namespace fastrnn::cpu
