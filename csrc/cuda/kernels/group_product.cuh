// SPDX-License-Identifier: Apache-2.0
//
// What a warp of the group walk multiplies: a tile of W by words of s, in each type.
#pragma once

#include "primitives.cuh"

namespace fastrnn::cuda {

/// Four words of 32 bits: what a lane reads at once.
struct __align__(16) Words {
  uint32_t word[4];
};

/// How a tile of W, words of type T that a lane holds, is multiplied by words of s. A word is two
/// 16-bit numbers, or a float.
template <typename T>
class TileProduct {
 public:
  __device__ __forceinline__ TileProduct(const Words& w, uint32_t) : w_(w) {}
  /// The product number k goes to one of the parts of the sums.
  template <int kParts>
  __device__ __forceinline__ void add_product(float (&sums)[kParts][4], int k,
                                              const uint32_t (&s)[2]) const {
    mma(T{}, sums[k % kParts], w_.word, s);
  }
  static __device__ __forceinline__ uint32_t prepared(uint32_t bits) { return bits; }

 private:
  const Words& w_;
};

/// Floats as sums of two TF32 numbers each: w s = w_high s_high + w_high s_low + w_low s_high,
/// which leaves out 2^-22 of it. W is taken apart in each step anew: registers do not hold both
/// parts. Tensor cores cut off what does not fit into a sum: each product begins at zero, and
/// ordinary additions, which round, make the long sums.
template <>
class TileProduct<float> {
 public:
  /// `mask` is kTf32Bits, but the compiler must not know.
  __device__ __forceinline__ TileProduct(const Words& w, uint32_t mask)
      : mask_(mask), half_((0u - mask) >> 1) {
    FASTRNN_UNROLL
    for (int i = 0; i < 4; ++i) split(w.word[i], high_[i], finite_[i], low_[i]);
  }

  template <int kParts>
  __device__ __forceinline__ void add_product(float (&sums)[kParts][4], int,
                                              const uint32_t (&s)[2]) const {
    uint32_t high[2], low[2], finite[2];
    FASTRNN_UNROLL
    for (int i = 0; i < 2; ++i) split(prepared(s[i]), high[i], finite[i], low[i]);
    float product[4] = {};
    mma(Tf32{}, product, low_, finite);
    mma(Tf32{}, product, finite_, low);
    mma(Tf32{}, product, high_, high);
    FASTRNN_UNROLL
    for (int i = 0; i < 4; ++i) sums[0][i] += product[i];
  }

  /// Infinity and NaN as rounding leaves them: it would carry a NaN of many ones into the sign.
  static __device__ __forceinline__ uint32_t prepared(uint32_t bits) {
    return (bits & ~kSign) > kInfinity ? kInfinity | kInfinity >> 1 : bits;
  }

 private:
  static constexpr uint32_t kInfinity = 0x7f800000u, kSign = 0x80000000u;

  /// Infinity has no low part, nor does it meet those of the other factor: of any sign, they would
  /// make NaN of it.
  __device__ __forceinline__ void split(uint32_t bits, uint32_t& high, uint32_t& finite,
                                        uint32_t& low) const {
    high = rounded(bits);
    const bool is_finite = (high & kInfinity) != kInfinity;
    finite = is_finite ? high : 0;
    low = is_finite ? rounded(bits_of(float_of(bits) - float_of(high))) : 0;
  }
  /// To the nearest TF32 number.
  __device__ __forceinline__ uint32_t rounded(uint32_t bits) const {
    return (bits + half_) & mask_;
  }

  const uint32_t mask_, half_;  // the bits of a TF32 number, and half of its last one
  uint32_t high_[4], finite_[4], low_[4];
};

}  // namespace fastrnn::cuda
