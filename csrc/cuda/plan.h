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

/// Who walks through the steps: see recurrence.h.
enum class Walk {
  kSteps,  // the host: a product by cuBLAS and a kernel in each step
  kBlock,  // a block of threads, which keeps W_hh
  kGroup,  // a group of blocks, which share W_hh
};

/// "steps", "block" or "group".
const char* name_of(Walk walk);

struct Plan {
  Walk walk;
  int block_rows;       // block walk in float: rows of the batch in each block
  GroupPlan groups;     // group walk
  bool fuse_input;      // block walk, forward: x * W_ih^T in the kernel; else one product before
  int64_t chunk_steps;  // steps whose addends, or deltas, are in memory at a time
};

Plan plan_layer(const LayerShape& shape, const Gpu& gpu);

}  // namespace fastrnn::cuda
