// SPDX-License-Identifier: Apache-2.0
//
// The recurrence for AVX-512: 24 accumulators of 32 registers.
#include "recurrence.h"

#if defined(__x86_64__)

// After every include: what a header defines must not be compiled for this target.
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

#define FASTRNN_VECTOR_BYTES 64
#define FASTRNN_TILE_ROWS 6
#define FASTRNN_TILE_VECTORS 4

namespace fastrnn::cpu {
namespace avx512_target {
#include "recurrence.inl"
}  // namespace avx512_target

const Capability& avx512_capability() {
  static constexpr Capability capability = {"avx512", avx512_target::kKernels<float>,
                                            avx512_target::kKernels<double>};
  return capability;
}

}  // namespace fastrnn::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
