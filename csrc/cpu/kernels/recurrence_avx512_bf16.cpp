// SPDX-License-Identifier: Apache-2.0
//
// The recurrence in bfloat16, for processors with AVX-512 and avx512_bf16.
#include "recurrence.h"

#if defined(__x86_64__)

#include <immintrin.h>

// After every include: what a header defines must not be compiled for this target.
#if defined(__clang__)
#pragma clang attribute push(                                                                 \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,prfchw"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,prfchw")
#endif

#define FASTRNN_VECTOR_BYTES 64
#define FASTRNN_TILE_ROWS 6
#define FASTRNN_TILE_VECTORS 4
#define FASTRNN_TERMS 64
#define FASTRNN_BFLOAT16

namespace fastrnn::cpu {
namespace avx512_bf16_target {
#include "recurrence.inl"
}  // namespace avx512_bf16_target

const Kernels<BFloat16>& avx512_bf16_kernels() {
  static constexpr Kernels<BFloat16> kernels = avx512_bf16_target::kKernels<BFloat16>;
  return kernels;
}

}  // namespace fastrnn::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
