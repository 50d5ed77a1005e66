// SPDX-License-Identifier: Apache-2.0
//
// bfloat16 by the instructions of avx512_bf16: loads widen to float32, stores round to nearest, and
// a lane multiplies two pairs of numbers and adds both to a float32. Part of recurrence.inl.

namespace {

template <>
constexpr int64_t kDepth<BFloat16> = 2;

typedef uint16_t Halves __attribute__((vector_size(32)));

FASTRNN_INLINE Vec<float> widen(Halves halves) {
  return (Vec<float>)(__builtin_convertvector(halves, Bits<float>) << 16);
}
FASTRNN_INLINE Halves narrow(Vec<float> v) { return (Halves)_mm512_cvtneps_pbh((__m512)v); }

template <>
FASTRNN_INLINE Vec<float> load<BFloat16>(const BFloat16* p) {
  Halves halves;
  __builtin_memcpy(&halves, p, sizeof(halves));
  return widen(halves);
}

template <>
FASTRNN_INLINE Vec<float> load_tail<BFloat16>(const BFloat16* p, int64_t count) {
  return widen((Halves)_mm256_maskz_loadu_epi16((1u << count) - 1, p));
}

template <>
FASTRNN_INLINE void store<BFloat16>(BFloat16* p, Vec<float> v) {
  const Halves halves = narrow(v);
  __builtin_memcpy(p, &halves, sizeof(halves));
}

template <>
FASTRNN_INLINE void store_tail<BFloat16>(BFloat16* p, Vec<float> v, int64_t count) {
  _mm256_mask_storeu_epi16(p, (1u << count) - 1, (__m256i)narrow(v));
}

template <>
struct WeightsOf<BFloat16> {
  using type = __m512bh;
};

FASTRNN_INLINE __m512bh load_weights(const BFloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }

FASTRNN_INLINE __m512bh load_end(const BFloat16* p, int64_t K, int64_t count) {
  return (__m512bh)_mm512_maskz_loadu_epi16((1u << count) - 1, p + K - count);
}

FASTRNN_INLINE void side_by_side(const BFloat16* rows, int64_t row_stride, BFloat16* out) {
  Halves first, second;
  __builtin_memcpy(&first, rows, sizeof(first));
  __builtin_memcpy(&second, rows + row_stride, sizeof(second));
  const Bits<float> pairs = __builtin_convertvector(first, Bits<float>) |
                            __builtin_convertvector(second, Bits<float>) << 16;
  __builtin_memcpy(out, &pairs, sizeof(pairs));
}

FASTRNN_INLINE __m512bh load_terms(const BFloat16* p) {
  int32_t pair;
  __builtin_memcpy(&pair, p, sizeof(pair));
  return (__m512bh)_mm512_set1_epi32(pair);
}
FASTRNN_INLINE __m512bh load_term(const BFloat16* p) {
  return (__m512bh)_mm512_set1_epi32(p->bits);
}

template <typename T>
FASTRNN_INLINE void add_terms(Vec<float>& sum, __m512bh terms, __m512bh weights) {
  sum = (Vec<float>)_mm512_dpbf16_ps((__m512)sum, terms, weights);
}

}  // namespace
