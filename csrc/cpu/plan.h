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
  int64_t state_rows;    // those of them with a previous state: all with hx, else all but B
  bool packed;           // sequences of unequal length
  int64_t element_size;  // of the kernels' tensors: 2 (bfloat16), 4 or 8
  bool converts;         // 16-bit tensors: the recurrence runs in float32, a few steps at a time
  bool tile_products;    // not converted: ATen multiplies in tiles (AMX), outrunning the kernels
  bool baseline;         // the kernels are those for any processor: ATen's products outrun them

  int64_t w_hh_bytes() const { return H * H * element_size; }
  /// Directions that walk at the same time.
  int64_t side_by_side() const { return converts ? 1 : directions; }
};

struct Plan {
  bool fuse_input;         // x * W_ih^T inside the step; else one product over all steps before
  bool own_input_product;  // that product by our kernel for few rows
  bool own_products;       // products over many rows by our kernels, packed; else by ATen
  bool step_products;  // ATen's product with W_hh in each step, the kernels only add and activate
  bool backward_step_products;  // the same in backward
  bool pack_weights;            // into panels; else they are read as they are
  bool pack_input_weights;      // the same for W_ih, where x is read in the step
  bool backward_packs;          // the same for W_hh in backward
  bool converts;            // 16-bit tensors: one direction after the other, parts of it in float32
  bool parallel;            // parts run at the same time; else one after the other
  int64_t row_blocks;       // parts of the batch, each walks through time without hand-over
  int64_t column_blocks;    // threads that share each of those parts' steps, a part of H each
  int64_t batch_parts;      // that go through all of backward side by side; 1: chunk by chunk
  bool own_gradients;       // of weights by our kernels; else ATen's matrix products
  bool own_input_gradient;  // the same of the input
  int64_t backward_steps;   // steps per chunk of the backward workspace
  int64_t gradient_steps;   // of parts whose weight gradients are made beside the walk; T: after it
  int64_t convert_steps;    // steps at a time in float32 (16-bit tensors only)
};

/// `threads`: what at::get_num_threads() says, 1 inside a parallel region.
Plan plan_layer(const LayerShape& shape, int64_t threads);

/// How layers in one direction run, one or a stack, that have neither rows nor columns for two
/// threads.
struct StackPlan {
  int64_t threads;        // that have stages of all layers' work; 1: layer by layer
  int64_t first_steps;    // of the first part of the sequence that passes from stage to stage
  int64_t steps;          // of a part at most
  bool multiplies_first;  // the first layer's product with the input is a stage too
};

/// `first`: of `layers` layers; the others have H features.
StackPlan plan_stack(const LayerShape& first, int64_t layers, int64_t threads);

}  // namespace fastrnn::cpu
