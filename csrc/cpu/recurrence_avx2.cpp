// SPDX-License-Identifier: Apache-2.0
//
// The recurrence for AVX2 with FMA: 12 accumulators of 16 registers.
#include "recurrence.h"

#if defined(__x86_64__)

// After every include: what a header defines must not be compiled for this target.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#define FASTRNN_VECTOR_BYTES 32
#define FASTRNN_TILE_ROWS 6
#define FASTRNN_TILE_VECTORS 2

namespace fastrnn::cpu {
namespace avx2_target {
#include "recurrence.inl"
}  // namespace avx2_target

const Capability& avx2_capability() {
  static constexpr Capability capability = {"avx2", avx2_target::kKernels<float>,
                                            avx2_target::kKernels<double>};
  return capability;
}

}  // namespace fastrnn::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
