// SPDX-License-Identifier: Apache-2.0
//
// Twins of the functions of csrc/cuda/kernels/primitives.cuh that need nvcc. They stand here
// because only the emulator runs them. What each has to do is said there.
#pragma once

#include <cmath>
#include <cstring>

#include "cuda_host.h"
#include "numbers.h"

#define FASTRNN_UNROLL
#define FASTRNN_UNROLL_4
#define FASTRNN_ROLLED

namespace fastrnn::cuda {

inline void load_fresh(const void* data, uint32_t (&words)[4]) {
  if (reinterpret_cast<uintptr_t>(data) % sizeof words != 0) cuda_host::fail("misaligned read");
  std::memcpy(words, data, sizeof words);
}

template <typename T>
void store_fresh(T* to, T value) {
  *to = value;
}

inline void let_others_run() { cuda_host::let_others_run(); }

inline float to_float(Half value) { return cuda_host::half_to_float(value.bits); }

template <>
inline BFloat16 from_float<BFloat16>(float value) {
  return {cuda_host::float_to_bfloat16(value)};
}

template <>
inline Half from_float<Half>(float value) {
  return {cuda_host::float_to_half(value)};
}

/// As exact as that of floats.
template <>
inline float tanh_for<Half>(float x) {
  return tanhf(x);
}
template <>
inline float tanh_for<BFloat16>(float x) {
  return tanhf(x);
}

template <typename T>
T computed_once(T value) {
  static_assert(std::is_pointer_v<T> || std::is_integral_v<T>);
  return value;
}

inline void* shared_memory() { return cuda_host::shared_memory(); }

inline void warp_sync() {}

/// What mma() computes, from the operands of all lanes: add(sum, a, b) adds the products of the
/// numbers in a word of each.
template <typename F>
void mma_of_words(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const F& add) {
  struct Operands {
    uint32_t a[4], b[2];
  } mine, all[32];
  std::memcpy(mine.a, a, sizeof a);
  std::memcpy(mine.b, b, sizeof b);
  cuda_host::warp_gather(mine, all, "mma");
  const int lane = cuda_host::place->lane;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
    float sum = 0;
    for (int half = 0; half < 2; ++half)
      for (int q = 0; q < 4; ++q)
        add(sum, all[row % 8 * 4 + q].a[row / 8 + 2 * half], all[column * 4 + q].b[half]);
    d[i] += sum;
  }
}

/// Of Half or BFloat16, two in a word.
template <typename T>
void mma(T, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_of_words(d, a, b, [](float& sum, uint32_t x, uint32_t y) {
    for (int shift = 0; shift < 32; shift += 16)
      sum += to_float(from_bits<T>(x >> shift)) * to_float(from_bits<T>(y >> shift));
  });
}

inline void mma(Tf32, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const uint32_t set = a[0] | a[1] | a[2] | a[3] | b[0] | b[1];
  if ((set & ~kTf32Bits) != 0) cuda_host::fail("numbers that are not TF32");
  mma_of_words(d, a, b,
               [](float& sum, uint32_t x, uint32_t y) { sum += float_of(x) * float_of(y); });
}

}  // namespace fastrnn::cuda
