// SPDX-License-Identifier: Apache-2.0
//
// Every PTX instruction of the project and everything else that a host compiler lacks, each behind
// a function with a twin for the emulator of tests/cuda_host. Kernels are C++ over these functions.
// Includes no torch header.
#pragma once

#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#define FASTRNN_UNROLL _Pragma("unroll")
#define FASTRNN_UNROLL_4 _Pragma("unroll 4")
#define FASTRNN_ROLLED _Pragma("unroll 1")
#else
#include <cmath>
#include <cstring>

#include "cuda_host.h"
#include "numbers.h"
#define FASTRNN_UNROLL
#define FASTRNN_UNROLL_4
#define FASTRNN_ROLLED
#define __grid_constant__
#endif

namespace fastrnn::cuda {

/// 16-bit floats as they lie in memory.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ double to_float(double value) { return value; }

__device__ __forceinline__ float float_of(uint32_t bits) {
#ifdef __CUDACC__
  return __uint_as_float(bits);
#else
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
#endif
}

__device__ __forceinline__ float to_float(BFloat16 value) {
  return float_of(static_cast<uint32_t>(value.bits) << 16);
}

__device__ __forceinline__ float to_float(Half value) {
#ifdef __CUDACC__
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#else
  return cuda_host::half_to_float(value.bits);
#endif
}

__device__ __forceinline__ uint32_t bits_of(Half value) { return value.bits; }
__device__ __forceinline__ uint32_t bits_of(BFloat16 value) { return value.bits; }
__device__ __forceinline__ uint32_t bits_of(float value) {
#ifdef __CUDACC__
  return __float_as_uint(value);
#else
  uint32_t result;
  std::memcpy(&result, &value, sizeof result);
  return result;
#endif
}

template <typename T>
__device__ __forceinline__ T from_bits(uint32_t bits) {
  if constexpr (std::is_same_v<T, float>)
    return float_of(bits);
  else
    return {static_cast<uint16_t>(bits)};
}

/// To the nearest, ties to even.
template <typename T>
__device__ __forceinline__ T from_float(float value);

template <typename T>
__device__ __forceinline__ T from_float(double value) {
  return value;
}

template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}

template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float value) {
#ifdef __CUDACC__
  BFloat16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
#else
  return {cuda_host::float_to_bfloat16(value)};
#endif
}

template <>
__device__ __forceinline__ Half from_float<Half>(float value) {
#ifdef __CUDACC__
  Half result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
#else
  return {cuda_host::float_to_half(value)};
#endif
}

/// tanh, as exact as results of type T need: to a few units of rounding, in float16 to a sixteenth
/// and in bfloat16 to less than one, since its own rounding is four times as coarse as tanh.approx.
template <typename T>
__device__ __forceinline__ float tanh_for(float x) {
#ifdef __CUDACC__
  return tanhf(x);
#else
  return std::tanh(x);
#endif
}

template <typename T>
__device__ __forceinline__ double tanh_for(double x) {
#ifdef __CUDACC__
  return tanh(x);
#else
  return std::tanh(x);
#endif
}

/// tanhf would branch, by lane.
template <>
__device__ __forceinline__ float tanh_for<Half>(float x) {
#ifdef __CUDACC__
  // tanh |x| = 1 - 2 / (e^(2 |x|) + 1), which cancels near 0: there x - x^3/3 + 2 x^5/15
  float power, inverse;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(fabsf(x) * 2.885390082f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(power + 1));
  const float large = copysignf(1 - 2 * inverse, x), square = x * x;
  const float small = x + x * square * (square * 0.133333333f - 0.333333333f);
  return fabsf(x) < 0.25f ? small : large;
#else
  return std::tanh(x);
#endif
}

template <>
__device__ __forceinline__ float tanh_for<BFloat16>(float x) {
#ifdef __CUDACC__
  float result;
  asm("tanh.approx.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return std::tanh(x);
#endif
}

/// `value`, which stays in a register. Without this the compiler computes what does not change
/// again in each turn of a loop, down to reading the thread's number, to use fewer registers.
template <typename T>
__device__ __forceinline__ T computed_once(T value) {
  static_assert(std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "one register or two");
#ifdef __CUDACC__
  if constexpr (sizeof(T) == 8)
    asm volatile("" : "+l"(value));
  else
    asm volatile("" : "+r"(value));
#endif
  return value;
}

/// The same of a pointer, which must be to device memory: the compiler still knows that it is, and
/// so which instructions read and write there.
template <typename T>
__device__ __forceinline__ T* computed_once(T* value) {
#ifdef __CUDACC__
  return static_cast<T*>(__cvta_global_to_generic(computed_once(__cvta_generic_to_global(value))));
#else
  return value;
#endif
}

/// The block's dynamic shared memory.
__device__ __forceinline__ void* shared_memory() {
#ifdef __CUDACC__
  extern __shared__ uint4 fastrnn_shared_memory[];
  return fastrnn_shared_memory;
#else
  return cuda_host::shared_memory();
#endif
}

/// Reads 16 bytes, at a multiple of 16, that another block may be writing, from where all blocks
/// see the same, and at each call again. Each number is what it was at some time: PTX does not
/// promise that of numbers of 16 bits within words of 32, but GPUs read and write them so.
__device__ __forceinline__ void load_fresh(const void* data, uint32_t (&words)[4]) {
#ifdef __CUDACC__
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "l"(__cvta_generic_to_global(data))
               : "memory");
#else
  if (reinterpret_cast<uintptr_t>(data) % sizeof words != 0) cuda_host::fail("misaligned read");
  std::memcpy(words, data, sizeof words);
#endif
}

/// Writes what other blocks read so.
template <typename T>
__device__ __forceinline__ void store_fresh(T* to, T value) {
#ifdef __CUDACC__
  if constexpr (sizeof(T) == 4)
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(to)),
                 "r"(bits_of(value))
                 : "memory");
  else
    asm volatile("st.relaxed.gpu.global.u16 [%0], %1;" ::"l"(__cvta_generic_to_global(to)),
                 "h"(static_cast<uint16_t>(bits_of(value)))
                 : "memory");
#else
  *to = value;
#endif
}

/// In a loop that waits for other blocks: on a GPU they run anyway.
__device__ __forceinline__ void let_others_run() {
#ifndef __CUDACC__
  cuda_host::let_others_run();
#endif
}

/// The lanes of a warp go on together.
__device__ __forceinline__ void warp_sync() {
#ifdef __CUDACC__
  __syncwarp();
#endif
}

/// TF32 numbers are floats of which only these bits are set.
constexpr uint32_t kTf32Bits = 0xffffe000u;

#ifndef __CUDACC__
/// What mma.sync computes, from the operands of all lanes: add(sum, a, b) adds the products of the
/// numbers in a word of each.
template <typename F>
inline void mma_on_host(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                        const F& add) {
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

/// Words of two numbers of type T.
template <typename T>
inline void mma_of_pairs_on_host(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_on_host(d, a, b, [](float& sum, uint32_t x, uint32_t y) {
    for (int shift = 0; shift < 32; shift += 16)
      sum += to_float(from_bits<T>(x >> shift)) * to_float(from_bits<T>(y >> shift));
  });
}

inline void mma_tf32_on_host(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const uint32_t set = a[0] | a[1] | a[2] | a[3] | b[0] | b[1];
  if ((set & ~kTf32Bits) != 0) cuda_host::fail("numbers that are not TF32");
  mma_on_host(d, a, b,
              [](float& sum, uint32_t x, uint32_t y) { sum += float_of(x) * float_of(y); });
}
#endif

// The instructions are volatile, so that none moves into a branch which not all lanes take.

#define FASTRNN_MMA(shape_and_types, d, a, b)                                     \
  asm volatile("mma.sync.aligned." shape_and_types                                \
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                   \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

/// d += a b for a [16, 16] and b [16, 8] that the warp's lanes hold, sums in float. With
/// g = lane / 4 and q = lane % 4, a lane holds
///   a: (g, 2q..2q+1), (g+8, same), (g, 2q+8..2q+9), (g+8, same)
///   b: (2q..2q+1, g), (2q+8..2q+9, g)
///   d: (g, 2q), (g, 2q+1), (g+8, 2q), (g+8, 2q+1)
__device__ __forceinline__ void mma(Half, float (&d)[4], const uint32_t (&a)[4],
                                    const uint32_t (&b)[2]) {
#ifdef __CUDACC__
  FASTRNN_MMA("m16n8k16.row.col.f32.f16.f16.f32", d, a, b);
#else
  mma_of_pairs_on_host<Half>(d, a, b);
#endif
}

__device__ __forceinline__ void mma(BFloat16, float (&d)[4], const uint32_t (&a)[4],
                                    const uint32_t (&b)[2]) {
#ifdef __CUDACC__
  FASTRNN_MMA("m16n8k16.row.col.f32.bf16.bf16.f32", d, a, b);
#else
  mma_of_pairs_on_host<BFloat16>(d, a, b);
#endif
}

/// Names mma() of TF32 numbers.
struct Tf32 {};

/// d += a b for a [16, 8] and b [8, 8] of TF32 numbers. A lane holds
///   a: (g, q), (g+8, q), (g, q+4), (g+8, q+4)     b: (q, g), (q+4, g)     d: as above
__device__ __forceinline__ void mma(Tf32, float (&d)[4], const uint32_t (&a)[4],
                                    const uint32_t (&b)[2]) {
#ifdef __CUDACC__
  FASTRNN_MMA("m16n8k8.row.col.f32.tf32.tf32.f32", d, a, b);
#else
  mma_tf32_on_host(d, a, b);
#endif
}

#undef FASTRNN_MMA

}  // namespace fastrnn::cuda
