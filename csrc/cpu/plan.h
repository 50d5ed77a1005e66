// SPDX-License-Identifier: Apache-2.0
//
// How a layer runs on the CPU: decisions from its shape alone, made from measurements.
#pragma once

#include <cstdint>

namespace fastrnn::cpu {

/// One layer of a call. `total_rows` is T * B, or the length of packed data.
struct LayerShape {
  int64_t T, B, I, H, total_rows, directions;
  int64_t element_size;   // of the type computed in: 4 or 8
  bool converts = false;  // 16-bit tensors, computed in float32
};

struct Plan {
  bool fuse_input;         // x * W_ih^T inside the step; else one product over all steps before
  bool pack_weights;       // into panels, in forward; else products with the weights as they are
  bool parallel;           // parts run side by side; else one after the other
  int64_t row_blocks;      // parts of the batch, each walks through time without hand-over
  bool own_outer_product;  // weight gradients by our kernel; else by ATen's matrix product
  int64_t forward_steps;   // steps per chunk of the forward workspace (16-bit tensors only)
  int64_t backward_steps;  // steps per chunk of the backward workspace
};

/// `threads`: what at::get_num_threads() says, 1 inside a parallel region.
Plan plan_layer(const LayerShape& shape, int64_t threads);

}  // namespace fastrnn::cpu
