// SPDX-License-Identifier: Apache-2.0
//
// The block walk in float, by ordinary multiply-adds. Four neighbouring lanes share two or four
// units of the layer: each holds a quarter of their weights and adds up that part of the sums.
#include <iterator>

#include "block_sizes.h"
#include "block_walk.cuh"

namespace fastrnn::cuda {

namespace {

/// Of size kBlockFfmaSizes[kSize]. kBatch: rows of the batch in a block, 1, 2 or 4.
template <int kSize, int kBatch>
class FfmaProduct {
  static constexpr BlockFfmaSizes kSizes = kBlockFfmaSizes[kSize];
  static constexpr int kLanes = 4, kUnits = kSizes.units, kLaneWeights = kSizes.lane_weights();
  static constexpr int kInRegisters = kSizes.in_registers;
  static_assert(kSizes.hidden % (8 * kUnits) == 0, "whole warps");
  static_assert(kInRegisters % 4 == 0 && kLaneWeights % 4 == 0, "read four at a time");

 public:
  using Element = float;
  static constexpr int kRows = kBatch, kThreads = kSizes.threads();
  // The sums of four lanes, dealt out among them: see deal(). Those of a single row of two units go
  // to two of the lanes; the others' row is none.
  static constexpr int kThreadRows = kBatch * kUnits <= kLanes ? 1 : kBatch * kUnits / kLanes;
  static constexpr int kRowStep = kLanes / kUnits, kThreadUnits = 1, kUnitStep = 1;
  // As in block_mma.cu.
  static constexpr int kTogether = kSizes.hidden <= 128 ? 2 : 1;
  static constexpr int kStateStride = kSizes.hidden, kStateSize = kRows * kStateStride;
  static constexpr size_t kSharedBytes = kSizes.shared_bytes(kBatch);

  __device__ __forceinline__ FfmaProduct()
      : lane_(computed_once(static_cast<int>(threadIdx.x % kLanes))),
        units_(threadIdx.x / kLanes * kUnits) {}

  __device__ __forceinline__ int row() const { return lane_ / kUnits; }
  __device__ __forceinline__ int unit() const { return units_ + lane_ % kUnits; }

  /// Forward: sums_j = sum_k s_k W[j][k]; transposed: sum_k s_k W[k][j]. Lanes take turns at groups
  /// of four k, so that their reads of s make one. Where shared memory has a part, all go by way of
  /// it: unrolled, so many loads would need more registers than there are.
  __device__ __forceinline__ void load_weights(const float* w, int H, bool transposed) {
    constexpr int kInShared = kLaneWeights - kInRegisters;
    constexpr int kTurn = kInShared > 0 ? kInShared : kLaneWeights;
    FASTRNN_UNROLL
    for (int begin = 0; begin < kInRegisters; begin += kTurn) {
      const int end = begin + kTurn < kInRegisters ? begin + kTurn : kInRegisters;
      if (kInShared > 0) store_weights(w, H, transposed, begin, end);
      FASTRNN_UNROLL
      for (int u = 0; u < kUnits; ++u) {
        FASTRNN_UNROLL
        for (int i = begin; i < end; ++i)
          w_[u][i] =
              kInShared > 0 ? place(u, i - begin)->number[i % 4] : weight(w, H, transposed, u, i);
      }
    }
    store_weights(w, H, transposed, kInRegisters, kLaneWeights);
  }

  __device__ __forceinline__ void multiply(const float* state,
                                           float (&sums)[kThreadRows][kThreadUnits]) const {
    float parts[kBatch * kUnits] = {};
    FASTRNN_UNROLL
    for (int i = 0; i < kInRegisters; i += 4) {
      Four w[kUnits];
      FASTRNN_UNROLL
      for (int u = 0; u < kUnits; ++u) {
        FASTRNN_UNROLL
        for (int c = 0; c < 4; ++c) w[u].number[c] = w_[u][i + c];
      }
      add_products(state, i, w, parts);
    }
    // Rolled, since unrolled loads would need more registers than there are; what shared memory
    // delivers to all threads together takes longer than one thread's loop.
    FASTRNN_ROLLED
    for (int i = kInRegisters; i < kLaneWeights; i += 4) {
      Four w[kUnits];
      FASTRNN_UNROLL
      for (int u = 0; u < kUnits; ++u) w[u] = *place(u, i - kInRegisters);
      add_products(state, i, w, parts);
    }
    deal(parts, sums);
  }

 private:
  struct __align__(16) Four {
    float number[4];
  };

  /// Adds to every sum the products with weights i to i + 3.
  __device__ __forceinline__ void add_products(const float* state, int i, const Four (&w)[kUnits],
                                               float (&parts)[kBatch * kUnits]) const {
    FASTRNN_UNROLL
    for (int b = 0; b < kBatch; ++b) {
      const Four s =
          *reinterpret_cast<const Four*>(state + b * kStateStride + i * kLanes + lane_ * 4);
      FASTRNN_UNROLL
      for (int u = 0; u < kUnits; ++u) {
        FASTRNN_UNROLL
        for (int c = 0; c < 4; ++c) parts[b * kUnits + u] += w[u].number[c] * s.number[c];
      }
    }
  }

  /// Adds up what four lanes have of each sum. Twice, two lanes exchange half of their sums, so
  /// that lane l ends with those numbered l, l + 4, ...; of a single sum both lanes get the whole.
  __device__ __forceinline__ void deal(float (&parts)[kBatch * kUnits],
                                       float (&sums)[kThreadRows][kThreadUnits]) const {
    int count = kBatch * kUnits;
    FASTRNN_UNROLL
    for (int bit = 1; bit < kLanes; bit *= 2) {
      const bool odd = (lane_ & bit) != 0;
      if (count == 1) parts[0] += __shfl_xor_sync(0xffffffff, parts[0], bit);
      FASTRNN_UNROLL
      for (int i = 0; i + 1 < count; i += 2) {
        const float mine = odd ? parts[i + 1] : parts[i], other = odd ? parts[i] : parts[i + 1];
        parts[i / 2] = mine + __shfl_xor_sync(0xffffffff, other, bit);
      }
      count = count > 1 ? count / 2 : 1;
    }
    FASTRNN_UNROLL
    for (int r = 0; r < kThreadRows; ++r) sums[r][0] = parts[r];
  }

  /// This lane's weight number i of its unit number u.
  __device__ __forceinline__ float weight(const float* w, int H, bool transposed, int u,
                                          int i) const {
    const int unit = units_ + u, k = i / 4 * 4 * kLanes + lane_ * 4 + i % 4;
    return unit >= H || k >= H ? 0 : transposed ? w[k * H + unit] : w[unit * H + k];
  }
  /// Weights [begin, end) of each unit to the thread's places in shared memory.
  __device__ __forceinline__ void store_weights(const float* w, int H, bool transposed, int begin,
                                                int end) const {
    FASTRNN_ROLLED
    for (int i = begin; i < end; i += 4) {
      Four loaded[kUnits];  // all in flight at the same time
      FASTRNN_UNROLL
      for (int u = 0; u < kUnits; ++u) {
        FASTRNN_UNROLL
        for (int c = 0; c < 4; ++c) loaded[u].number[c] = weight(w, H, transposed, u, i + c);
      }
      FASTRNN_UNROLL
      for (int u = 0; u < kUnits; ++u) *place(u, i - begin) = loaded[u];
    }
  }
  /// The thread's place for weight number i of a unit and the three after it; lanes read side by
  /// side.
  __device__ __forceinline__ Four* place(int u, int i) const {
    char* const start = static_cast<char*>(shared_memory()) + kSizes.state_bytes(kBatch);
    return reinterpret_cast<Four*>(start) + (i / 4 * kUnits + u) * kThreads + threadIdx.x;
  }

  const int lane_, units_;
  float w_[kUnits][kInRegisters];
};

/// By the smallest kernel for H units.
template <int kBatch, int kSize = 0>
const char* run(const RecurrenceArgs& args, Stream stream) {
  if constexpr (kSize + 1 < static_cast<int>(std::size(kBlockFfmaSizes)))
    if (args.H > kBlockFfmaSizes[kSize].hidden) return run<kBatch, kSize + 1>(args, stream);
  return run_blocks<FfmaProduct<kSize, kBatch>>(args, stream);
}

}  // namespace

const char* block_ffma(const RecurrenceArgs& args, int rows, Stream stream) {
  switch (rows) {
    case 1:
      return run<1>(args, stream);
    case 2:
      return run<2>(args, stream);
    default:
      return run<kBlockFfmaRows>(args, stream);
  }
}

}  // namespace fastrnn::cuda
