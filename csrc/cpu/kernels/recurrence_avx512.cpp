// SPDX-License-Identifier: Apache-2.0
//
// The recurrence for AVX-512: 24 accumulators of 32 registers.
#include "recurrence.h"

#if defined(__x86_64__)

#include <immintrin.h>

// After every include: what a header defines must not be compiled for this target.
#if defined(__clang__)
#pragma clang attribute push(                                                      \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prfchw"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prfchw")
#endif

#define FASTRNN_VECTOR_BYTES 64
#define FASTRNN_TILE_ROWS 6
#define FASTRNN_TILE_VECTORS 4
#define FASTRNN_TERMS 64
#define FASTRNN_MASKED_LOAD

namespace fastrnn::cpu {
namespace avx512_target {
namespace {

// The first `count` elements at p, the other lanes zero: the processor does not touch their memory.
inline __m512 masked_load(const float* p, int64_t count) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
}
inline __m512d masked_load(const double* p, int64_t count) {
  return _mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1), p);
}

}  // namespace

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
