// SPDX-License-Identifier: Apache-2.0
//
// The block walk in 16 bits, by tensor cores. Per step and block, sums^T [H, 8] = W^T [H, H] s^T
// [H, 8]: the weights are the mma's first operand, whose registers are loaded once, and eight rows
// of the batch its second, so that one row costs what eight do.
#include <iterator>

#include "block_sizes.h"
#include "block_walk.cuh"

namespace fastrnn::cuda {

namespace {

/// What a lane holds of an mma's first operand.
struct __align__(16) Fragment {
  uint32_t pair[4];
};

/// Of size kBlockMmaSizes[kSize].
template <typename T, int kSize>
class MmaProduct {
  static constexpr BlockMmaSizes kSizes = kBlockMmaSizes[kSize];
  static constexpr int kTiles = kSizes.tiles(), kOwn = kSizes.own;
  static constexpr int kInRegisters = kSizes.in_registers, kStaged = kSizes.staged();
  static constexpr int kPlaces = kSizes.places();
  static_assert(kTiles % kOwn == 0);

 public:
  using Element = T;
  static constexpr int kRows = 8, kThreads = kSizes.threads();
  static constexpr int kThreadRows = 2, kRowStep = 1, kThreadUnits = 2 * kOwn, kUnitStep = 8;
  // The product of a small layer ends before a load from the L2 cache would; that of a large one
  // does not, and leaves few registers.
  static constexpr int kTogether = kTiles <= 8 ? 2 : 1;
  static constexpr int kStateStride = kSizes.row_stride(), kStateSize = kRows * kStateStride;
  static constexpr size_t kSharedBytes = kSizes.shared_bytes();

  __device__ __forceinline__ MmaProduct()
      : lane_(computed_once(static_cast<int>(threadIdx.x % 32))),
        warp_(threadIdx.x / 32),
        operand_(computed_once(lane_ / 4 * kStateStride + lane_ % 4 * 2)) {}

  // As mma() in primitives.cuh deals out its sums: lane 4 g + q has rows 2 q and 2 q + 1 of units g
  // and g + 8 of each of its warp's tiles.
  __device__ __forceinline__ int row() const { return lane_ % 4 * 2; }
  __device__ __forceinline__ int unit() const { return warp_ * kOwn * 16 + lane_ / 4; }

  /// Forward: sums_j = sum_k s_k W[j][k]; transposed: sum_k s_k W[k][j]. All go by way of this
  /// lane's places in shared memory: unrolled, the loads would need more registers than there are.
  __device__ __forceinline__ void load_weights(const T* w, int H, bool transposed) {
    FASTRNN_UNROLL
    for (int begin = 0; begin < kInRegisters; begin += kStaged) {
      const int end = begin + kStaged < kInRegisters ? begin + kStaged : kInRegisters;
      store_fragments(w, H, transposed, begin, end);
      FASTRNN_UNROLL
      for (int m = 0; m < kOwn; ++m) {
        FASTRNN_UNROLL
        for (int k = begin; k < end; ++k) w_[m][k] = *place(m, k - begin);
      }
    }
    store_fragments(w, H, transposed, kInRegisters, kTiles);
  }

  __device__ __forceinline__ void multiply(const T* state,
                                           float (&sums)[kThreadRows][kThreadUnits]) const {
    // Several sums for each tile: an mma waits for the one before it that adds to the same.
    constexpr int kSums = kOwn == 1 && kTiles >= 4 ? 4 : 2;
    float parts[kOwn][kSums][4] = {};
    FASTRNN_UNROLL
    for (int k = 0; k < kTiles; ++k) {
      const T* const s = state + operand_ + 16 * k;
      const uint32_t operand[2] = {pair_at(s), pair_at(s + 8)};
      FASTRNN_UNROLL
      for (int m = 0; m < kOwn; ++m) {
        if (k < kInRegisters)
          mma(T{}, parts[m][k % kSums], w_[m][k < kInRegisters ? k : 0].pair, operand);
        else
          mma(T{}, parts[m][k % kSums], place(m, k - kInRegisters)->pair, operand);
      }
    }
    FASTRNN_UNROLL
    for (int i = 0; i < 4 * kOwn; ++i) {
      float& sum = sums[i % 2][i / 2];
      sum = parts[i / 4][0][i % 4];
      FASTRNN_UNROLL
      for (int p = 1; p < kSums; ++p) sum += parts[i / 4][p][i % 4];
    }
  }

 private:
  static __device__ __forceinline__ uint32_t pair_at(const T* s) {
    return *reinterpret_cast<const uint32_t*>(s);
  }

  static __device__ __forceinline__ uint32_t weight(const T* w, int H, bool transposed, int unit,
                                                    int column) {
    if (unit >= H || column >= H) return 0;
    return (transposed ? w[column * H + unit] : w[unit * H + column]).bits;
  }

  /// This lane's part of the weights of its warp's tiles, along k's tiles [begin, end).
  __device__ __forceinline__ void store_fragments(const T* w, int H, bool transposed, int begin,
                                                  int end) const {
    for (int m = 0; m < kOwn; ++m) {
      FASTRNN_UNROLL_4
      for (int k = begin; k < end; ++k) {
        Fragment loaded;
        FASTRNN_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int unit = (warp_ * kOwn + m) * 16 + lane_ / 4 + 8 * (i % 2);
          const int column = 16 * k + lane_ % 4 * 2 + 8 * (i / 2);
          loaded.pair[i] = weight(w, H, transposed, unit, column) |
                           weight(w, H, transposed, unit, column + 1) << 16;
        }
        *place(m, k - begin) = loaded;
      }
    }
  }
  __device__ __forceinline__ Fragment* place(int m, int k) const {
    char* const start = static_cast<char*>(shared_memory()) + kSizes.state_bytes();
    return reinterpret_cast<Fragment*>(start) + ((warp_ * kOwn + m) * kPlaces + k) * 32 + lane_;
  }

  const int lane_, warp_;
  const int operand_;  // where this lane's part of an mma's second operand begins in s
  Fragment w_[kOwn][kInRegisters];
};

/// By the smallest kernel for H units.
template <typename T, int kSize = 0>
const char* run(const RecurrenceArgs& args, Stream stream) {
  if constexpr (kSize + 1 < static_cast<int>(std::size(kBlockMmaSizes)))
    if (args.H > kBlockMmaSizes[kSize].hidden) return run<T, kSize + 1>(args, stream);
  return run_blocks<MmaProduct<T, kSize>>(args, stream);
}

}  // namespace

const char* block_mma(const RecurrenceArgs& args, Stream stream) {
  return args.type == Type::kHalf ? run<Half>(args, stream) : run<BFloat16>(args, stream);
}

}  // namespace fastrnn::cuda
