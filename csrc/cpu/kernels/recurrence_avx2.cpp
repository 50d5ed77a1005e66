// SPDX-License-Identifier: Apache-2.0
//
// The recurrence for AVX2 with FMA: 12 accumulators of 16 registers.
#include "recurrence.h"

#if defined(__x86_64__)

#include <immintrin.h>

// After every include: what a header defines must not be compiled for this target.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,prfchw"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,prfchw")
#endif

#define FASTRNN_VECTOR_BYTES 32
#define FASTRNN_TILE_ROWS 6
#define FASTRNN_TILE_VECTORS 2
#define FASTRNN_TERMS 64
#define FASTRNN_MASKED_LOAD

namespace fastrnn::cpu {
namespace avx2_target {
namespace {

// The first `count` elements at p, the other lanes zero: the processor does not touch their memory.
inline __m256 masked_load(const float* p, int64_t count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane));
}
inline __m256d masked_load(const double* p, int64_t count) {
  const __m256i lane = _mm256_setr_epi64x(0, 1, 2, 3);
  return _mm256_maskload_pd(p, _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), lane));
}

}  // namespace

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
