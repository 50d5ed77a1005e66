// SPDX-License-Identifier: Apache-2.0
//
// Every PTX instruction of the project, and everything else that a host compiler lacks, each behind
// a function. Kernels are C++ over these functions. Without nvcc their twins take their place,
// which the emulator of tests/cuda_host brings.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

#ifndef __CUDACC__
#include "cuda_host.h"
#endif

namespace fastrnn::cuda {

// ---- Numbers --------------------------------------------------------------------------------

/// 16-bit floats as they lie in memory.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
/// TF32 numbers are floats of which only kTf32Bits are set. Tf32 names their products.
struct Tf32 {};
constexpr uint32_t kTf32Bits = 0xffffe000u;

__device__ __forceinline__ float float_of(uint32_t bits) { return std::bit_cast<float>(bits); }

__device__ __forceinline__ uint32_t bits_of(Half value) { return value.bits; }
__device__ __forceinline__ uint32_t bits_of(BFloat16 value) { return value.bits; }
__device__ __forceinline__ uint32_t bits_of(float value) { return std::bit_cast<uint32_t>(value); }

template <typename T>
__device__ __forceinline__ T from_bits(uint32_t bits) {
  if constexpr (std::is_same_v<T, float>)
    return float_of(bits);
  else
    return {static_cast<uint16_t>(bits)};
}

__device__ __forceinline__ float to_float(Half value);  // one instruction
__device__ __forceinline__ float to_float(BFloat16 value) {
  return float_of(static_cast<uint32_t>(value.bits) << 16);
}
__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ double to_float(double value) { return value; }

/// To the nearest, ties to even. Of 16-bit types it is one instruction.
template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <typename T>
__device__ __forceinline__ T from_float(double value) {
  return value;
}

/// tanh, as exact as results of type T need: to a few units of rounding, in float16 to a sixteenth
/// and in bfloat16 to less than one, since its own rounding is four times as coarse as tanh.approx.
template <typename T>
__device__ __forceinline__ float tanh_for(float x) {
  return tanhf(x);
}
template <typename T>
__device__ __forceinline__ double tanh_for(double x) {
  return tanh(x);
}

// ---- Numbers that blocks hand to one another ------------------------------------------------

/// Blocks of a group read in global memory what others write there. There is no flag and no fence:
/// each number is its own signal. This is kAwaited, all bits set, until it is written. That is
/// right because
///
/// - the fill with kAwaited is a kernel of its own before the launch on the same stream, so every
///   thread sees it;
/// - one thread writes each number, once, and never as kAwaited (a NaN: see not_awaited()). So a
///   number has two values in its life, and who reads another one than kAwaited has read the final
///   one. A thread's reads of one place never go back in time;
/// - a thread computes with the numbers that it has read itself, and with nothing else that another
///   block writes. So no order between different numbers is needed, and relaxed accesses do;
/// - they are strong accesses of the scope of the GPU: a plain load might be moved out of the loop
///   that waits, or be served by the L1 cache, which is not told of other blocks' writes.
///
/// One point PTX does not promise: a load of 32-bit words reads numbers of 16 bits that are written
/// one by one. GPUs read and write them so that each is what it was at some time.
template <typename T>
constexpr uint32_t kAwaited = sizeof(T) == 4 ? 0xffffffffu : 0xffffu;

/// A NaN of other bits in place of what kAwaited is.
template <typename T>
__device__ __forceinline__ T not_awaited(T value) {
  return bits_of(value) == kAwaited<T> ? from_bits<T>(kAwaited<T> >> 1) : value;
}

}  // namespace fastrnn::cuda

#ifndef __CUDACC__
#include "twins.h"
#else

#define FASTRNN_UNROLL _Pragma("unroll")
#define FASTRNN_UNROLL_4 _Pragma("unroll 4")
#define FASTRNN_ROLLED _Pragma("unroll 1")

namespace fastrnn::cuda {

/// Reads 16 bytes of such numbers, at a multiple of 16, at each call again.
__device__ __forceinline__ void load_fresh(const void* data, uint32_t (&words)[4]) {
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "l"(__cvta_generic_to_global(data))
               : "memory");
}

/// Writes one.
template <typename T>
__device__ __forceinline__ void store_fresh(T* to, T value) {
  if constexpr (sizeof(T) == 4)
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(to)),
                 "r"(bits_of(value))
                 : "memory");
  else
    asm volatile("st.relaxed.gpu.global.u16 [%0], %1;" ::"l"(__cvta_generic_to_global(to)),
                 "h"(static_cast<uint16_t>(bits_of(value)))
                 : "memory");
}

/// In a loop that waits for other blocks: on a GPU they run anyway.
__device__ __forceinline__ void let_others_run() {}

// ---- Conversions and tanh -------------------------------------------------------------------

__device__ __forceinline__ float to_float(Half value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
}

template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float value) {
  BFloat16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
}

template <>
__device__ __forceinline__ Half from_float<Half>(float value) {
  Half result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
}

/// tanhf would branch, by lane.
template <>
__device__ __forceinline__ float tanh_for<Half>(float x) {
  // tanh |x| = 1 - 2 / (e^(2 |x|) + 1), which cancels near 0: there x - x^3/3 + 2 x^5/15
  float power, inverse;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(fabsf(x) * 2.885390082f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(power + 1));
  const float large = copysignf(1 - 2 * inverse, x), square = x * x;
  const float small = x + x * square * (square * 0.133333333f - 0.333333333f);
  return fabsf(x) < 0.25f ? small : large;
}

template <>
__device__ __forceinline__ float tanh_for<BFloat16>(float x) {
  float result;
  asm("tanh.approx.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// ---- Registers, shared memory, warps --------------------------------------------------------

/// `value`, which stays in a register. Without this the compiler computes what does not change
/// again in each turn of a loop, down to reading the thread's number, to use fewer registers.
template <typename T>
__device__ __forceinline__ T computed_once(T value) {
  static_assert(std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "one register or two");
  if constexpr (sizeof(T) == 8)
    asm volatile("" : "+l"(value));
  else
    asm volatile("" : "+r"(value));
  return value;
}

/// The same of a pointer, which must be to device memory: the compiler still knows that it is, and
/// so which instructions read and write there.
template <typename T>
__device__ __forceinline__ T* computed_once(T* value) {
  return static_cast<T*>(__cvta_global_to_generic(computed_once(__cvta_generic_to_global(value))));
}

/// The block's dynamic shared memory.
__device__ __forceinline__ void* shared_memory() {
  extern __shared__ uint4 fastrnn_shared_memory[];
  return fastrnn_shared_memory;
}

/// The lanes of a warp go on together.
__device__ __forceinline__ void warp_sync() { __syncwarp(); }

// ---- Tensor cores ---------------------------------------------------------------------------

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
  FASTRNN_MMA("m16n8k16.row.col.f32.f16.f16.f32", d, a, b);
}

__device__ __forceinline__ void mma(BFloat16, float (&d)[4], const uint32_t (&a)[4],
                                    const uint32_t (&b)[2]) {
  FASTRNN_MMA("m16n8k16.row.col.f32.bf16.bf16.f32", d, a, b);
}

/// d += a b for a [16, 8] and b [8, 8] of TF32 numbers. A lane holds
///   a: (g, q), (g+8, q), (g, q+4), (g+8, q+4)     b: (q, g), (q+4, g)     d: as above
__device__ __forceinline__ void mma(Tf32, float (&d)[4], const uint32_t (&a)[4],
                                    const uint32_t (&b)[2]) {
  FASTRNN_MMA("m16n8k8.row.col.f32.tf32.tf32.f32", d, a, b);
}

#undef FASTRNN_MMA

}  // namespace fastrnn::cuda

#endif
