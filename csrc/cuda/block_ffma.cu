// SPDX-License-Identifier: Apache-2.0
//
// Tier 1 in float, by ordinary multiply-adds. Four neighbouring lanes share two units of the layer:
// each holds a quarter of their weights and adds up that part of the sums.
#include "block_recurrence.cuh"

namespace fastrnn::cuda {

namespace {

/// kHidden: H, rounded up. kBatch: rows of the batch in a block.
template <int kHidden, int kBatch>
class FfmaEngine {
 public:
  using Element = float;
  static constexpr int kRows = kBatch, kLanes = 4, kUnits = 2;
  // The 2 * kBatch sums of four lanes, dealt out among them; of a single row, to two of them.
  static constexpr int kThreadRows = kBatch <= 2 ? 1 : kBatch / 2, kRowStep = 2;
  static constexpr int kThreadUnits = 1, kUnitStep = 1;
  static constexpr int kThreads = kHidden / kUnits * kLanes;
  static constexpr int kDepth = kHidden > 128 ? 3 : 4;  // registers are few there
  static constexpr int kStateStride = kHidden, kStateSize = kRows * kHidden;
  static constexpr size_t kSharedBytes = 2 * kStateSize * sizeof(float);

  __device__ __forceinline__ FfmaEngine()
      : lane_(computed_once(static_cast<int>(threadIdx.x % kLanes))),
        units_(threadIdx.x / kLanes * kUnits) {}

  __device__ __forceinline__ int row() const { return lane_ / 2; }
  __device__ __forceinline__ int unit() const { return units_ + lane_ % 2; }

  /// Forward: sums_j = sum_k s_k W[j][k]; transposed: sum_k s_k W[k][j]. Lanes take turns at groups
  /// of four k, so that their reads of s make one.
  __device__ __forceinline__ void load_weights(const float* w, int H, bool transposed) {
    FASTRNN_UNROLL
    for (int u = 0; u < kUnits; ++u) {
      FASTRNN_UNROLL
      for (int i = 0; i < kPart; ++i) {
        const int unit = units_ + u, k = i / 4 * 4 * kLanes + lane_ * 4 + i % 4;
        w_[u][i] = unit >= H || k >= H ? 0 : transposed ? w[k * H + unit] : w[unit * H + k];
      }
    }
  }

  __device__ __forceinline__ void multiply(const float* state,
                                           float (&sums)[kThreadRows][kThreadUnits]) const {
    float parts[kBatch][kUnits] = {};
    FASTRNN_UNROLL
    for (int i = 0; i < kPart; i += 4) {
      FASTRNN_UNROLL
      for (int b = 0; b < kBatch; ++b) {
        const Four s = *reinterpret_cast<const Four*>(state + b * kHidden + i * kLanes + lane_ * 4);
        FASTRNN_UNROLL
        for (int u = 0; u < kUnits; ++u) {
          FASTRNN_UNROLL
          for (int c = 0; c < 4; ++c) parts[b][u] += w_[u][i + c] * s.number[c];
        }
      }
    }
    FASTRNN_UNROLL
    for (int b = 0; b < kBatch; ++b) {
      FASTRNN_UNROLL
      for (int u = 0; u < kUnits; ++u) {
        parts[b][u] += __shfl_xor_sync(0xffffffff, parts[b][u], 1);
        parts[b][u] += __shfl_xor_sync(0xffffffff, parts[b][u], 2);
      }
    }
    FASTRNN_UNROLL
    for (int r = 0; r < kThreadRows; ++r) {
      const int b = 2 * r, other = kBatch > 1 ? b + 1 : b;
      const float first = lane_ % 2 == 0 ? parts[b][0] : parts[b][1];
      const float second = lane_ % 2 == 0 ? parts[other][0] : parts[other][1];
      sums[r][0] = lane_ < 2 ? first : second;
    }
  }

 private:
  static constexpr int kPart = kHidden / kLanes;  // weights of a unit in each lane
  struct __align__(16) Four {
    float number[4];
  };

  const int lane_, units_;
  float w_[kUnits][kPart];
};

template <int kBatch>
const char* run(const RecurrenceArgs& args, Stream stream) {
  if (args.H <= 32) return run_block_recurrence<FfmaEngine<32, kBatch>>(args, stream);
  if (args.H <= 64) return run_block_recurrence<FfmaEngine<64, kBatch>>(args, stream);
  if (args.H <= 128) return run_block_recurrence<FfmaEngine<128, kBatch>>(args, stream);
  return run_block_recurrence<FfmaEngine<192, kBatch>>(args, stream);
}

}  // namespace

const char* ffma_recurrence(const RecurrenceArgs& args, int rows, Stream stream) {
  switch (rows) {
    case 1:
      return run<1>(args, stream);
    case 2:
      return run<2>(args, stream);
    default:
      return run<4>(args, stream);
  }
}

}  // namespace fastrnn::cuda
