// SPDX-License-Identifier: Apache-2.0
//
// Tier 1 in 16 bits, on tensor cores. Per step and block, sums^T [H, 8] = W^T [H, H] s^T [H, 8]:
// the weights are the mma's first operand, whose registers are loaded once, and eight rows of the
// batch its second, so that one row costs what eight do.
#include "block_recurrence.cuh"

namespace fastrnn::cuda {

namespace {

/// kTiles: H in tiles of 16. kOwn: tiles of 16 units that each warp computes; its other warps read
/// the same s again, so larger layers give two to each.
template <typename T, int kTiles, int kOwn>
class MmaEngine {
 public:
  using Element = T;
  static constexpr int kRows = 8, kElements = 4 * kOwn;
  static constexpr int kThreads = 32 * ((kTiles + kOwn - 1) / kOwn);
  // The product of a small layer ends before a load from the L2 cache would.
  static constexpr int kDepth = kTiles > 8 ? 2 : 4;
  // 16 bytes more than a row, so that the eight rows of a fragment lie in different banks.
  static constexpr int kStride = 16 * kTiles + 8, kStateSize = kRows * kStride;

  static __device__ __forceinline__ int state_index(int row, int unit) {
    return row * kStride + unit;
  }

  __device__ __forceinline__ MmaEngine() : lane_(threadIdx.x % 32), warp_(threadIdx.x / 32) {}

  // Element e of a thread: see mma() in primitives.cuh.
  __device__ __forceinline__ int row(int e) const { return lane_ % 4 * 2 + e % 2; }
  __device__ __forceinline__ int unit(int e) const {
    return (warp_ * kOwn + e / 4) * 16 + lane_ / 4 + 8 * (e % 4 / 2);
  }
  __device__ __forceinline__ bool owns(int e) const {
    return kTiles % kOwn == 0 || warp_ * kOwn + e / 4 < kTiles;
  }

  /// Forward: sums_j = sum_k s_k W[j][k]; transposed: sum_k s_k W[k][j].
  __device__ __forceinline__ void load_weights(const T* w, int H, bool transposed) {
    FASTRNN_UNROLL
    for (int m = 0; m < kOwn; ++m) {
      FASTRNN_UNROLL
      for (int k = 0; k < kTiles; ++k) {
        FASTRNN_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int unit = (warp_ * kOwn + m) * 16 + lane_ / 4 + 8 * (i % 2);
          const int column = 16 * k + lane_ % 4 * 2 + 8 * (i / 2);
          const auto weight = [&](int c) -> uint32_t {
            if (unit >= H || c >= H) return 0;
            return (transposed ? w[c * H + unit] : w[unit * H + c]).bits;
          };
          w_[m][k][i] = weight(column) | weight(column + 1) << 16;
        }
      }
    }
  }

  __device__ __forceinline__ void multiply(const T* state, float (&sums)[kElements]) const {
    // Several sums for each tile: an mma waits for the one before it that adds to the same.
    constexpr int kSums = kTiles < 2 ? 1 : kOwn == 1 && kTiles >= 4 ? 4 : 2;
    float parts[kOwn][kSums][4] = {};
    FASTRNN_UNROLL
    for (int k = 0; k < kTiles; ++k) {
      const T* const s = state + lane_ / 4 * kStride + 16 * k + lane_ % 4 * 2;
      const uint32_t fragment[2] = {pair_at(s), pair_at(s + 8)};
      FASTRNN_UNROLL
      for (int m = 0; m < kOwn; ++m) mma(T{}, parts[m][k % kSums], w_[m][k], fragment);
    }
    FASTRNN_UNROLL
    for (int e = 0; e < kElements; ++e) {
      sums[e] = parts[e / 4][0][e % 4];
      FASTRNN_UNROLL
      for (int p = 1; p < kSums; ++p) sums[e] += parts[e / 4][p][e % 4];
    }
  }

 private:
  static __device__ __forceinline__ uint32_t pair_at(const T* s) {
    return *reinterpret_cast<const uint32_t*>(s);
  }

  const int lane_, warp_;
  uint32_t w_[kOwn][kTiles][4];
};

template <typename T>
const char* run(const RecurrenceArgs& args, Stream stream) {
  if (args.H <= 32) return run_block_recurrence<MmaEngine<T, 2, 1>>(args, stream);
  if (args.H <= 64) return run_block_recurrence<MmaEngine<T, 4, 1>>(args, stream);
  if (args.H <= 128) return run_block_recurrence<MmaEngine<T, 8, 2>>(args, stream);
  if (args.H <= 192) return run_block_recurrence<MmaEngine<T, 12, 2>>(args, stream);
  return run_block_recurrence<MmaEngine<T, 16, 2>>(args, stream);
}

}  // namespace

const char* mma_recurrence(const RecurrenceArgs& args, Stream stream) {
  return args.type == Type::kHalf ? run<Half>(args, stream) : run<BFloat16>(args, stream);
}

}  // namespace fastrnn::cuda
