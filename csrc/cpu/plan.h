// SPDX-License-Identifier: Apache-2.0
//
// How a layer runs on the CPU: decisions from its shape alone, made from measurements.
#pragma once

#include <cstdint>

namespace fastrnn::cpu {

/// One layer of a call.
struct LayerShape {
  int64_t T, B, I, H, directions;
  int64_t total_rows;    // T * B, or the length of packed data
  bool packed;           // sequences of unequal length
  int64_t element_size;  // of the kernels' tensors: 2 (bfloat16), 4 or 8
  bool converts;         // 16-bit tensors: the recurrence runs in float32, a few steps at a time
  bool aten_is_faster;   // its products outrun the kernels': tiles (AMX), or no vectors of ours
};

/// Who makes a product with a weight.
enum class Maker {
  kInStep,  // the walk itself, beside the state's product and with weights in the same form
  kPanels,  // the kernels, with packed weights
  kAsIs,    // the kernels, with the weight as it lies in memory
  kAten,    // PyTorch's matrix product
};

/// Where the work that follows, or precedes, a walk is done.
enum class Sharing {
  kByRows,   // each thread does all of it for rows of its own
  kBySlabs,  // after the walk, threads share the columns
  kBeside,   // while one thread walks, the others make products of the steps that are ready
};

struct Plan {
  Maker input;         // x W_ih^T; but for kInStep, over all steps before the walk or beside it
  Maker state;         // h_{t-1} W_hh^T
  Maker delta;         // delta_{t+1} W_hh
  Maker weight_grads;  // kPanels: the kernels' outer product, which reads all as it is
  Maker input_grad;    // delta W_ih
  bool converts;       // as in LayerShape
  Sharing sharing;
  int64_t threads;        // that have enough work
  int64_t row_blocks;     // parts of the batch, each walks through time without hand-over
  int64_t column_blocks;  // slabs of each step, for the threads of a team
  int64_t chunk_steps;    // of backward: whose gradients are made before the next
  int64_t convert_steps;  // steps at a time in float32 (16-bit tensors only)
};

/// `threads`: what at::get_num_threads() says, 1 inside a parallel region.
Plan plan_layer(const LayerShape& shape, int64_t threads);

}  // namespace fastrnn::cpu
