// SPDX-License-Identifier: Apache-2.0
//
// The recurrence for the baseline of the platform (SSE2 on x86-64, NEON on AArch64).
#include "recurrence.h"

#define FASTRNN_VECTOR_BYTES 16
#define FASTRNN_TILE_ROWS 4
#define FASTRNN_TILE_VECTORS 2
#define FASTRNN_TERMS 16

namespace fastrnn::cpu {
namespace default_target {
#include "recurrence.inl"
}  // namespace default_target

const Capability& default_capability() {
  static constexpr Capability capability = {"default", default_target::kKernels<float>,
                                            default_target::kKernels<double>};
  return capability;
}

}  // namespace fastrnn::cpu
