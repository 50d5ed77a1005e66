// SPDX-License-Identifier: Apache-2.0
//
// How a layer runs on a GPU: decisions from its shape and the GPU alone. Torch-free.
#pragma once

#include <cstdint>

#include "recurrence.h"

namespace fastrnn::cuda {

/// One layer of a call.
struct LayerShape {
  int64_t T, B, H, directions;
  Type type;
};

struct Gpu {
  int major = 8, minor = 0;  // compute capability
  int multiprocessors = 108;
  int64_t shared_bytes = 163 << 10;  // that a block can have
  // Addends or deltas in memory at a time; large products are at full speed well below that.
  int64_t chunk_bytes = 64 << 20;
};

enum class Tier {
  kSteps = 0,  // a product by ATen in each step
  kBlock = 1,  // a block of threads keeps W_hh and walks through all steps
};

struct Plan {
  Tier tier;
  int block_rows;       // tier 1 in float: rows of the batch in each block
  int64_t chunk_steps;  // steps whose addends, or deltas, are in memory at a time
};

Plan plan_layer(const LayerShape& shape, const Gpu& gpu);

}  // namespace fastrnn::cuda
