// SPDX-License-Identifier: Apache-2.0
//
// How a layer runs on a GPU: decisions from its shape and the GPU alone. Torch-free, and in
// every build: without CUDA it tells what a GPU would do.
#pragma once

#include <cstdint>

#include "kernels/recurrence.h"

namespace fastrnn::cuda {

/// One layer of a call.
struct LayerShape {
  int64_t T, B, I, H, directions;
  Type type;
};

struct Gpu {
  int major = 0;  // of the compute capability
  int multiprocessors = 0;
  int64_t shared_bytes = 0;  // that a block can have
  // For so much workspace no layer is cut into chunks.
  int64_t small_bytes = 8 << 20;
};

enum class Tier {
  kSteps = 0,  // a product by cuBLAS in each step
  kBlock = 1,  // a block of threads keeps W_hh and walks through all steps
  kGroup = 2,  // a group of blocks does
};

struct Plan {
  Tier tier;
  int block_rows;       // tier 1 in float: rows of the batch in each block
  GroupPlan groups;     // tier 2
  bool fuse_input;      // tier 1 forward: x * W_ih^T in the kernel; else one product before
  int64_t chunk_steps;  // steps whose addends, or deltas, are in memory at a time
};

Plan plan_layer(const LayerShape& shape, const Gpu& gpu);

}  // namespace fastrnn::cuda
