// SPDX-License-Identifier: Apache-2.0
//
// The group walk. A group of blocks shares a layer that one multiprocessor cannot hold. It owns a
// few rows of the batch. Each of its blocks keeps the weights of a few units in registers and walks
// through all steps; s travels from block to block in global memory, by way of the L2 cache.
//
// The state of a step is the output of the step before, so blocks read it there. It is its own
// signal: a warp reads what it needs again and again until nothing of it is kAwaited (see
// primitives.cuh). There is no barrier between blocks, no flag and no buffer that is used twice.
// All blocks of a launch must be resident at the same time.
//
// Who owns what, with kUnits = 32 (kTiles = 2 tiles of 16 units), kRows = 16 (kRowTiles = 2 tiles
// of 8 rows) and n blocks in a group:
//
//   The sums of a step, [B, H], in one direction (blockIdx.y). A cell is what a block computes.
//
//                        unit 0 .. 31     32 .. 63          H
//                       +---------------+---------------+-- .. --+
//     group 0, row  0   | blockIdx.x 0  | blockIdx.x 1  |        |
//                  15   |               |               |        |
//                       +---------------+---------------+-- .. --+
//     group 1, row 16   | blockIdx.x n  |  n + 1        |        |
//                  31   |               |               |        |
//                       +---------------+---------------+-- .. --+
//
//   A block multiplies s^T by its rows of W_hh (backward: W_hh^T), by tensor cores. Along k, s is
//   cut into chunks of kChunk units, 64 bytes. The warps take them in turn, kChunks each at most.
//
//       k   chunk 0   chunk 1          chunk 7   chunk 8
//          +---------+---------+- .. -+---------+---------+- ..
//          | warp 0  | warp 1  |      | warp 7  | warp 0  |
//          +---------+---------+- .. -+---------+---------+- ..
//
//   In each chunk of its warp, lane 4 g + q
//     reads 16 bytes of s, the q-th of the chunk, in row g of each tile of rows,
//     holds the weights that meet them, of units g and g + 8 of each tile of units,
//     gets sums of these units, in rows 2 q and 2 q + 1 of each tile of rows.
//   The sums of all warps meet in shared memory, parts [warp][row][unit]: one barrier per step.
//
//   Thread t adds up the parts and finishes kOutputs sums: one unit, in rows kRowStep apart.
//
//               unit 0     1    ..   31
//       row 0   t  = 0     1    ..   31
//           1       32    33    ..   63
//           7      224   225    ..  255
//           8        0     1    ..   31      kRowStep = 8
#pragma once

#include "activation.cuh"
#include "group_product.cuh"
#include "group_sizes.h"
#include "launch.cuh"
#include "walked_steps.cuh"

namespace fastrnn::cuda {

/// One thread's part of a block's walk. A thread has two roles: as a lane of a warp it multiplies
/// fragments (see mma() in primitives.cuh), and as thread t it finishes the sums of kOutputs rows
/// of one unit.
template <typename T, bool kBackward, int kTiles, int kChunks, int kRowTiles>
class GroupWalk {
 public:
  static constexpr int kThreads = 32 * kGroupWarps, kUnits = 16 * kTiles, kRows = 8 * kRowTiles;
  // Four numbers more than a row of sums, so that lanes write to different banks.
  static constexpr int kPartStride = kUnits + 4, kPartSize = kRows * kPartStride;
  static constexpr size_t kSharedBytes = (2 * kGroupWarps * kPartSize + 1) * sizeof(float);

  __device__ __forceinline__ GroupWalk(const RecurrenceArgs& args, int first_group)
      : d_(args.direction[blockIdx.y]),
        B_(static_cast<int>(args.steps.B)),
        H_(static_cast<int>(args.H)),
        activation_(args.activation),
        blocks_((H_ + kUnits - 1) / kUnits),
        unit0_(static_cast<int>(blockIdx.x % blocks_) * kUnits),
        row0_((first_group + static_cast<int>(blockIdx.x / blocks_)) * kRows),
        walk_(args.steps, d_, row0_),
        warp_(threadIdx.x / 32),
        lane_(threadIdx.x % 32),
        unit_(unit0_ + static_cast<int>(threadIdx.x % kUnits)),
        row_(row0_ + static_cast<int>(threadIdx.x / kUnits)),
        addend_(view_of(d_.addend, sizeof(Addend))),
        y_(view_of(d_.y, sizeof(T))),
        out_(view_of(d_.out, sizeof(T))),
        parts_(static_cast<float*>(shared_memory())),
        mask_(reinterpret_cast<uint32_t*>(parts_ + 2 * kGroupWarps * kPartSize)) {}

  __device__ __forceinline__ void run() {
    load_weights(static_cast<const T*>(d_.w_hh));
    load_bias();
    if (threadIdx.x == 0) *mask_ = kTf32Bits;
    __syncthreads();
    if (walk_.count > 0) now_ = moment(0);
    int before = kBackward && walk_.count > 0 ? static_cast<int>(walk_.rows_before()) : 0;
    load_inputs();
    for (int i = 0; i < walk_.count; ++i) {
      if (i + 1 < walk_.count) next_ = moment(i + 1);
      float* const parts = parts_ + i % 2 * (kGroupWarps * kPartSize);
      multiply(parts + warp_ * kPartSize, i);
      __syncthreads();
      finish(parts, before, i + 1 == walk_.count);
      before = now_.rows;
      last_ = now_;
      now_ = next_;
      if (i + 1 < walk_.count) load_inputs();
    }
    keep_state_of_idle_rows();
  }

 private:
  using Addend = std::conditional_t<kBackward, T, float>;
  static constexpr int kChunk = group_chunk(sizeof(T));
  static constexpr int kWordNumbers = 4 / static_cast<int>(sizeof(T));
  static constexpr int kRowStep = kThreads / kUnits;
  static constexpr int kOutputs = kRows > kRowStep ? kRows / kRowStep : 1;
  // Chunks of s that registers hold at once, by tiles (of a chunk and eight rows): beside the
  // weights of floats, fewer.
  static constexpr int kMostTiles = kChunks * kTiles == 16 ? 2 : 8;
  static constexpr int kAtOnce =
      sizeof(T) == 2 || kChunks * kRowTiles <= kMostTiles ? kChunks : kMostTiles / kRowTiles;
  static_assert(kChunks % kAtOnce == 0);
  // So many tiles at most are read again and again while none is there; of more, the first chunk's.
  static constexpr int kMostInVain = 4;

  /// A tile's sums in parts, where tiles are few: an mma waits for the one before that adds to the
  /// same part.
  struct Sums {
    static constexpr int kParts = sizeof(T) == 4            ? 1
                                  : kTiles * kRowTiles == 1 ? 4
                                  : kTiles * kRowTiles == 2 ? 2
                                                            : 1;
    float sum[kParts][4];

    __device__ __forceinline__ float total(int k) const {
      float result = sum[0][k];
      FASTRNN_UNROLL
      for (int p = 1; p < kParts; ++p) result += sum[p][k];
      return result;
    }
  };

  /// A sequence: bytes to the next position (a step, or in packed data a row) and to the next row.
  struct View {
    char* data;
    int64_t stride, row_stride;

    template <typename Number>
    __device__ __forceinline__ Number* at(int64_t position, int row) const {
      return reinterpret_cast<Number*>(data + position * stride + row * row_stride);
    }
  };

  /// A step: its place in every sequence, and how many rows of the batch are alive.
  struct Moment {
    int64_t position = 0;
    int rows = 0;
  };

  __device__ __forceinline__ View view_of(const Sequence& s, int64_t bytes) const {
    return {static_cast<char*>(s.data), (walk_.packed() ? s.row_stride : s.step_stride) * bytes,
            s.row_stride * bytes};
  }

  __device__ __forceinline__ Moment moment(int i) const {
    const int64_t t = walk_.step(i);
    return {walk_.packed() ? walk_.steps.first_row[t] : t, static_cast<int>(walk_.rows(t))};
  }

  /// The thread's output number j.
  __device__ __forceinline__ int row(int j) const { return row_ + j * kRowStep; }
  __device__ __forceinline__ bool has(int j, int rows) const {
    return unit_ < H_ && row(j) < rows && row(j) < row0_ + kRows;
  }

  /// The words of W that meet the words of s which this lane's group of four reads: of s a lane has
  /// four that follow one another, and which of W's columns is called k is free.
  __device__ __forceinline__ void load_weights(const T* w) {
    FASTRNN_UNROLL
    for (int c = 0; c < kChunks; ++c) {
      FASTRNN_UNROLL
      for (int m = 0; m < kTiles; ++m) {
        FASTRNN_UNROLL
        for (int half = 0; half < 2; ++half) {
          FASTRNN_UNROLL
          for (int i = 0; i < 4; ++i) {
            const int unit = unit0_ + 16 * m + lane_ / 4 + 8 * (i % 2);
            const int column = chunk_begin(c) + (2 * half + i / 2) * kWordNumbers;
            w_[c][m][half].word[i] = TileProduct<T>::prepared(weight(w, unit, column));
          }
        }
      }
    }
  }
  /// Forward: W[unit][column ...]; backward: W[column ...][unit].
  __device__ __forceinline__ uint32_t weight(const T* w, int unit, int column) const {
    if (unit >= H_ || column >= H_) return 0;
    const int64_t across = kBackward ? H_ : 1;
    const T* const first =
        w + (kBackward ? int64_t{column} * H_ + unit : int64_t{unit} * H_ + column);
    uint32_t word = bits_of(first[0]);
    if (kWordNumbers == 2) word |= bits_of(first[across]) << 16;
    return word;
  }
  /// The first of the units of s that this lane reads of its warp's chunk c.
  __device__ __forceinline__ int chunk_begin(int c) const {
    return (warp_ + c * kGroupWarps) * kChunk + lane_ % 4 * (4 * kWordNumbers);
  }

  __device__ __forceinline__ void load_bias() {
    bias_ = 0;
    if (!kBackward && d_.b_ih != nullptr && unit_ < H_)
      bias_ = to_float(static_cast<const T*>(d_.b_ih)[unit_]) +
              to_float(static_cast<const T*>(d_.b_hh)[unit_]);
  }

  /// What this thread's outputs of the step now_ are made of; loaded while blocks wait.
  __device__ __forceinline__ void load_inputs() {
    FASTRNN_UNROLL
    for (int j = 0; j < kOutputs; ++j) {
      const bool here = has(j, now_.rows);
      addends_[j] = here && d_.addend.data != nullptr
                        ? addend_.template at<const Addend>(now_.position, row(j))[unit_]
                        : Addend{};
      if (kBackward) ys_[j] = here ? y_.template at<const T>(now_.position, row(j))[unit_] : T{};
    }
  }

  /// Where this lane reads s of its rows before the step now_; null: zeros.
  struct Sources {
    const char* row[kRowTiles];
    unsigned awaited = 0;  // rows that another block writes
  };

  __device__ __forceinline__ Sources sources(int i) const {
    Sources from;
    FASTRNN_UNROLL
    for (int r = 0; r < kRowTiles; ++r) {
      const int row = row0_ + 8 * r + lane_ / 4;
      from.row[r] = nullptr;
      if (row >= now_.rows) continue;
      if (i > 0 && row < last_.rows) {
        from.row[r] = out_.template at<const char>(last_.position, row);
        from.awaited |= 1u << r;
      } else if (d_.state != nullptr) {
        from.row[r] = static_cast<const char*>(d_.state) + int64_t{row} * H_ * int64_t{sizeof(T)};
      }
    }
    return from;
  }

  /// This warp's part of the sums of all units and rows, into `part` [kRows][kPartStride].
  __device__ __forceinline__ void multiply(float* part, int i) const {
    // Read in each step: else the compiler would compute all that hangs on it once, for all steps.
    const uint32_t mask = sizeof(T) == 4 ? *static_cast<const volatile uint32_t*>(mask_) : 0;
    const Sources from = sources(i);
    Sums sums[kTiles][kRowTiles] = {};
    FASTRNN_UNROLL
    for (int begin = 0; begin < kChunks; begin += kAtOnce) {
      Words s[kAtOnce][kRowTiles];
      receive(from, begin, s);
      warp_sync();
      FASTRNN_UNROLL
      for (int k = 0; k < 2 * kAtOnce; ++k) {
        FASTRNN_UNROLL
        for (int m = 0; m < kTiles; ++m) {
          const TileProduct<T> weights(w_[begin + k / 2][m][k % 2], mask);
          FASTRNN_UNROLL
          for (int r = 0; r < kRowTiles; ++r) {
            const uint32_t* const words = s[k / 2][r].word + 2 * (k % 2);
            weights.add_product(sums[m][r].sum, k, {words[0], words[1]});
          }
        }
      }
    }
    FASTRNN_UNROLL
    for (int m = 0; m < kTiles; ++m) {
      FASTRNN_UNROLL
      for (int r = 0; r < kRowTiles; ++r) {
        FASTRNN_UNROLL
        for (int k = 0; k < 4; ++k)
          part[(8 * r + lane_ % 4 * 2 + k % 2) * kPartStride + 16 * m + lane_ / 4 + k / 2 * 8] =
              sums[m][r].total(k);
      }
    }
  }

  /// The chunks of s from `begin` on, as soon as all of them are there. Only the first of many are
  /// read again and again while nothing is there: who reads much in vain keeps others waiting.
  __device__ __forceinline__ void receive(const Sources& from, int begin,
                                          Words (&s)[kAtOnce][kRowTiles]) const {
    constexpr int kFirst = kAtOnce * kRowTiles > kMostInVain ? 1 : kAtOnce;
    receive<0, kFirst>(from, begin, s);
    if (kFirst < kAtOnce) receive<kFirst, kAtOnce>(from, begin, s);
  }
  template <int kBegin, int kEnd>
  __device__ __forceinline__ void receive(const Sources& from, int begin,
                                          Words (&s)[kAtOnce][kRowTiles]) const {
    const auto for_each = [&](const auto& f) {
      FASTRNN_UNROLL
      for (int c = kBegin; c < kEnd; ++c) {
        FASTRNN_UNROLL
        for (int r = 0; r < kRowTiles; ++r) f(c, r);
      }
    };
    for_each([&](int c, int r) { s[c][r] = read(from.row[r], begin + c); });
    bool complete;
    do {
      complete = true;
      for_each([&](int c, int r) {
        if ((from.awaited & 1u << r) == 0 || !is_awaited(s[c][r])) return;
        if (complete) let_others_run();
        complete = false;
        s[c][r] = read(from.row[r], begin + c);
      });
    } while (!complete);
  }
  __device__ __forceinline__ Words read(const char* row, int c) const {
    if (row == nullptr || chunk_begin(c) >= H_) return {};
    Words words;
    load_fresh(row + chunk_begin(c) * static_cast<int>(sizeof(T)), words.word);
    return words;
  }
  /// Whether any number in it has not been written yet.
  static __device__ __forceinline__ bool is_awaited(const Words& words) {
    uint32_t found = 0;
    FASTRNN_UNROLL
    for (int i = 0; i < 4; ++i) {
      const uint32_t word = words.word[i];
      if (kWordNumbers == 1)
        found |= word == kAwaited<T>;
      else
        found |= (~word - 0x00010001u) & word & 0x80008000u;  // a half of it is kAwaited
    }
    return found != 0;
  }

  /// Adds up the parts of this thread's outputs, activates and writes them.
  __device__ __forceinline__ void finish(const float* parts, int before, bool is_last) {
    FASTRNN_UNROLL
    for (int j = 0; j < kOutputs; ++j) {
      if (!has(j, now_.rows)) continue;
      const float* const mine = parts + (row(j) - row0_) * kPartStride + (unit_ - unit0_);
      float sum = to_float(addends_[j]) + bias_;
      FASTRNN_UNROLL
      for (int w = 0; w < kGroupWarps; ++w) sum += mine[w * kPartSize];
      const int64_t place = int64_t{row(j)} * H_ + unit_;  // in [B, H]
      if (kBackward && d_.grad_h_n != nullptr && row(j) >= before)
        sum += to_float(static_cast<const T*>(d_.grad_h_n)[place]);
      const float y = kBackward ? to_float(ys_[j]) : 0.0f;
      const T s = not_awaited(from_float<T>(activate<T, kBackward>(activation_, sum, y)));
      store_fresh(out_.template at<T>(now_.position, row(j)) + unit_, s);
      walked_ |= 1u << j;
      if (d_.final_state != nullptr && (is_last || row(j) >= next_.rows))
        static_cast<T*>(d_.final_state)[place] = s;
    }
  }

  /// Rows that were not alive in any of the steps.
  __device__ __forceinline__ void keep_state_of_idle_rows() const {
    if (d_.final_state == nullptr) return;
    FASTRNN_UNROLL
    for (int j = 0; j < kOutputs; ++j) {
      if (!has(j, B_) || (walked_ & 1u << j) != 0) continue;
      const int64_t place = int64_t{row(j)} * H_ + unit_;
      static_cast<T*>(d_.final_state)[place] =
          d_.state != nullptr ? static_cast<const T*>(d_.state)[place] : T{};
    }
  }

  const RecurrenceDirection& d_;
  const int B_;
  const int H_;
  const Activation activation_;
  const int blocks_, unit0_;  // of the group; the first unit of this block
  const int row0_;            // the group's first row of the batch
  const WalkedSteps walk_;
  const int warp_, lane_;
  const int unit_, row_;  // of this thread's outputs, and of the first of them
  const View addend_, y_, out_;
  float* const parts_;    // in shared memory, two of [kGroupWarps][kRows][kPartStride], ...
  uint32_t* const mask_;  // ... and kTf32Bits
  Moment last_, now_, next_;
  unsigned walked_ = 0;  // outputs that were alive once
  float bias_;           // b_ih + b_hh
  Addend addends_[kOutputs];
  T ys_[kOutputs];
  Words w_[kChunks][kTiles][2];
};

template <typename T, bool kBackward, int kTiles, int kChunks, int kRowTiles>
__global__ void __launch_bounds__(32 * kGroupWarps, 1)
    group_walk(const __grid_constant__ RecurrenceArgs args, int first_group) {
  GroupWalk<T, kBackward, kTiles, kChunks, kRowTiles>(args, first_group).run();
}

/// `groups` of so many blocks at a time, as many as are resident at the same time.
template <typename T, int kTiles, int kChunks, int kRowTiles>
const char* run_groups(const RecurrenceArgs& args, int64_t blocks, int64_t groups, Stream stream) {
  using Kernel = GroupWalk<T, false, kTiles, kChunks, kRowTiles>;
  const int64_t all = (args.steps.B + Kernel::kRows - 1) / Kernel::kRows;
  LaunchShape shape;
  shape.blocks_y = args.directions;
  shape.threads = Kernel::kThreads;
  shape.shared_bytes = Kernel::kSharedBytes;
  shape.resident = true;
  const auto kernel = args.backward ? group_walk<T, true, kTiles, kChunks, kRowTiles>
                                    : group_walk<T, false, kTiles, kChunks, kRowTiles>;
  for (int64_t first = 0; first < all; first += groups) {
    const int64_t count = all - first < groups ? all - first : groups;
    shape.blocks_x = static_cast<unsigned>(count * blocks);
    if (const char* error = launch(kernel, shape, stream, args, static_cast<int>(first)))
      return error;
  }
  return nullptr;
}

}  // namespace fastrnn::cuda
