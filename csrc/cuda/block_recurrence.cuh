// SPDX-License-Identifier: Apache-2.0
//
// Tier 1: one block of threads keeps W_hh in registers and walks through all steps with a few rows
// of the batch. Blocks never talk to one another; the batch is split over the multiprocessors.
//
// An Engine is the product s W of one step: it says which of the sums [rows, H] each thread gets
// (its "elements") and reads s from shared memory. What surrounds the product is here, the same for
// all engines and for forward and backward: each thread loads the addends of its elements some
// steps ahead, adds and activates, writes s for the next step to the other one of two buffers, and
// to the output. One barrier per step.
#pragma once

#include <type_traits>

#include "activation.cuh"
#include "launch.cuh"

namespace fastrnn::cuda {

/// The walk of one block: which steps, and which of its rows are alive at them.
struct Walk {
  const Steps& steps;
  int count, first, stride;  // how many steps; the first one, 1 or -1 to the next

  __device__ __forceinline__ Walk(const Steps& s, const RecurrenceDirection& d, int64_t row)
      : steps(s), stride(d.descending ? -1 : 1) {
    // Rows are sorted by length: the steps at which the block's first row is alive are [0, alive).
    int64_t alive = d.end;
    if (s.first_row != nullptr) {
      int64_t low = d.begin, high = d.end;
      while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (rows(middle) > row)
          low = middle + 1;
        else
          high = middle;
      }
      alive = low;
    }
    count = static_cast<int>(alive > d.begin ? alive - d.begin : 0);
    first = static_cast<int>(d.descending ? alive - 1 : d.begin);
  }

  __device__ __forceinline__ int64_t step(int i) const { return first + i * stride; }
  /// Rows of the batch that are alive at step t.
  __device__ __forceinline__ int64_t rows(int64_t t) const {
    return steps.first_row != nullptr ? steps.first_row[t + 1] - steps.first_row[t] : steps.B;
  }
  /// Of those, how many were alive at the step walked before step t.
  __device__ __forceinline__ int64_t rows_before(int64_t t) const {
    const int64_t before = t - stride;
    return before < 0 || before >= steps.T ? 0 : rows(before);
  }
  /// Row `row` of step t.
  template <typename T>
  __device__ __forceinline__ T* at(const Sequence& s, int64_t t, int64_t row) const {
    const int64_t offset = steps.first_row != nullptr ? (steps.first_row[t] + row) * s.row_stride
                                                      : t * s.step_stride + row * s.row_stride;
    return static_cast<T*>(s.data) + offset;
  }
};

/// One thread's part of a block's walk. An element is one of its sums, of a row and a unit.
/// kFeatures: x is given in place of addends, and has so many features at most; else 0.
template <class Engine, bool kBackward, int kFeatures>
class BlockRecurrence {
 public:
  __device__ __forceinline__ explicit BlockRecurrence(const RecurrenceArgs& args)
      : args_(args),
        d_(blockIdx.y == 0 ? args.direction[0] : args.direction[1]),
        row0_(static_cast<int64_t>(blockIdx.x) * Engine::kRows),
        I_(static_cast<int>(args.I)),
        H_(static_cast<int>(args.H)),
        walk_(args.steps, d_, row0_),
        state_(static_cast<Element*>(shared_memory())) {}

  __device__ __forceinline__ void run() {
    engine_.load_weights(static_cast<const Element*>(d_.w_hh), H_, /*transposed=*/kBackward);
    fill_state();
    load_bias();
    load_input_weights();
    Inputs inputs[kDepth];
    FASTRNN_UNROLL
    for (int i = 0; i < kDepth; ++i) load(i, inputs[i]);
    __syncthreads();
    for (int base = 0; base < walk_.count; base += kDepth) {
      FASTRNN_UNROLL
      for (int i = 0; i < kDepth; ++i) {
        if (base + i >= walk_.count) break;
        step(walk_.step(base + i), (kDepth % 2 == 0 ? i : base + i) % 2, inputs[i]);
        load(base + i + kDepth, inputs[i]);
        __syncthreads();
      }
    }
    store_final_state();
  }

 private:
  using Element = typename Engine::Element;
  using Addend = std::conditional_t<kBackward, Element, float>;
  static constexpr int kElements = Engine::kElements, kDepth = Engine::kDepth;

  /// What the thread reads of one step, loaded ahead of it.
  struct Inputs {
    Addend addend[kElements];
    Element x[kElements][kFeatures + 1];  // one more, for there is no array of none
    Element y[kElements];
  };

  /// Of the first `rows` rows of the batch, those in this block.
  __device__ __forceinline__ int in_this_block(int64_t rows) const {
    const int64_t count = rows - row0_;
    return static_cast<int>(count < Engine::kRows ? count : Engine::kRows);
  }
  /// Whether element e exists among the block's first `rows` rows.
  __device__ __forceinline__ bool is_in(int rows, int e) const {
    return engine_.owns(e) && engine_.unit(e) < H_ && engine_.row(e) < rows;
  }
  /// Where element e is: in a contiguous [B, H] tensor, ...
  __device__ __forceinline__ int64_t batch_place(int e) const {
    return (row0_ + engine_.row(e)) * H_ + engine_.unit(e);
  }
  /// ... in a sequence, from the block's first row at that step (32 bits do), ...
  __device__ __forceinline__ unsigned sequence_place(const Sequence& s, int e) const {
    return row_place(s, e) + static_cast<unsigned>(engine_.unit(e));
  }
  /// ... or its row there, ...
  __device__ __forceinline__ unsigned row_place(const Sequence& s, int e) const {
    return static_cast<unsigned>(engine_.row(e)) * static_cast<unsigned>(s.row_stride);
  }
  /// ... and in a buffer of s.
  __device__ __forceinline__ int state_place(int e) const {
    return Engine::state_index(engine_.row(e), engine_.unit(e));
  }

  /// Both buffers of s: zero, also where there is no row or column, then the first one as given.
  __device__ __forceinline__ void fill_state() {
    for (int i = threadIdx.x; i < 2 * Engine::kStateSize; i += Engine::kThreads)
      state_[i] = Element{};
    if (d_.state == nullptr) return;
    __syncthreads();
    const int batch = in_this_block(args_.steps.B);
    FASTRNN_UNROLL
    for (int e = 0; e < kElements; ++e)
      if (is_in(batch, e))
        state_[state_place(e)] = static_cast<const Element*>(d_.state)[batch_place(e)];
  }

  __device__ __forceinline__ void load_bias() {
    FASTRNN_UNROLL
    for (int e = 0; e < kElements; ++e) {
      bias_[e] = 0;
      const int unit = engine_.unit(e);
      if (kBackward || d_.b_ih == nullptr || !engine_.owns(e) || unit >= H_) continue;
      bias_[e] = to_float(static_cast<const Element*>(d_.b_ih)[unit]) +
                 to_float(static_cast<const Element*>(d_.b_hh)[unit]);
    }
  }

  __device__ __forceinline__ void load_input_weights() {
    FASTRNN_UNROLL
    for (int e = 0; e < kElements; ++e) {
      const int unit = engine_.unit(e);
      FASTRNN_UNROLL
      for (int i = 0; i < kFeatures; ++i)
        w_ih_[e][i] = engine_.owns(e) && unit < H_ && i < I_
                          ? to_float(static_cast<const Element*>(d_.w_ih)[unit * I_ + i])
                          : 0.0f;
    }
  }

  /// The inputs of the walk's step number i, zero where there are none.
  __device__ __forceinline__ void load(int i, Inputs& in) const {
    if (i >= walk_.count) return;
    const int64_t t = walk_.step(i);
    const int rows = in_this_block(walk_.rows(t));
    const Addend* const addend = walk_.at<const Addend>(d_.addend, t, row0_);
    const Element* const x = walk_.at<const Element>(d_.x, t, row0_);
    const Element* const y = walk_.at<const Element>(d_.y, t, row0_);
    FASTRNN_UNROLL
    for (int e = 0; e < kElements; ++e) {
      in.addend[e] = Addend{};
      if (kBackward) in.y[e] = Element{};
      FASTRNN_UNROLL
      for (int i = 0; i < kFeatures; ++i)
        in.x[e][i] = engine_.row(e) < rows && i < I_ ? x[row_place(d_.x, e) + i] : Element{};
      if (!is_in(rows, e)) continue;
      if (kFeatures == 0 && d_.addend.data != nullptr)
        in.addend[e] = addend[sequence_place(d_.addend, e)];
      if (kBackward) in.y[e] = y[sequence_place(d_.y, e)];
    }
  }

  __device__ __forceinline__ float addend_of(const Inputs& in, int e) const {
    if (kFeatures == 0) return to_float(in.addend[e]);
    float sum = 0;
    FASTRNN_UNROLL
    for (int i = 0; i < kFeatures; ++i) sum += to_float(in.x[e][i]) * w_ih_[e][i];
    return sum;
  }

  /// Step t: reads s from one buffer, writes it to the other one and to the output.
  __device__ __forceinline__ void step(int64_t t, int buffer, const Inputs& in) {
    const Element* const before = state_ + buffer * Engine::kStateSize;
    Element* const after = state_ + (1 - buffer) * Engine::kStateSize;
    float sums[kElements];
    engine_.multiply(before, sums);
    const int rows = in_this_block(walk_.rows(t));
    const bool adds_grad_h_n = kBackward && d_.grad_h_n != nullptr;
    const int rows_before = adds_grad_h_n ? in_this_block(walk_.rows_before(t)) : 0;
    Element* const out = walk_.at<Element>(d_.out, t, row0_);
    FASTRNN_UNROLL
    for (int e = 0; e < kElements; ++e) {
      if (!engine_.owns(e)) continue;
      if (!is_in(rows, e)) {  // a row that has ended, or not begun, keeps its state
        after[state_place(e)] = before[state_place(e)];
        continue;
      }
      float sum = sums[e] + addend_of(in, e) + bias_[e];
      if (adds_grad_h_n && !is_in(rows_before, e))
        sum += to_float(static_cast<const Element*>(d_.grad_h_n)[batch_place(e)]);
      const float y = kBackward ? to_float(in.y[e]) : 0.0f;
      const Element s = from_float<Element>(activate<Element, kBackward>(args_.activation, sum, y));
      after[state_place(e)] = s;
      out[sequence_place(d_.out, e)] = s;
    }
  }

  __device__ __forceinline__ void store_final_state() const {
    if (d_.final_state == nullptr) return;
    const Element* const last = state_ + walk_.count % 2 * Engine::kStateSize;
    const int batch = in_this_block(args_.steps.B);
    FASTRNN_UNROLL
    for (int e = 0; e < kElements; ++e)
      if (is_in(batch, e))
        static_cast<Element*>(d_.final_state)[batch_place(e)] = last[state_place(e)];
  }

  const RecurrenceArgs& args_;
  const RecurrenceDirection d_;
  const int64_t row0_;  // the block's first row of the batch
  const int I_, H_;
  const Walk walk_;
  Engine engine_;
  Element* const state_;   // in shared memory: two buffers of s
  float bias_[kElements];  // b_ih + b_hh
  float w_ih_[kElements][kFeatures + 1];
};

template <class Engine, bool kBackward, int kFeatures>
__global__ void __launch_bounds__(Engine::kThreads, 1)
    block_recurrence(const __grid_constant__ RecurrenceArgs args) {
  BlockRecurrence<Engine, kBackward, kFeatures>(args).run();
}

template <class Engine>
const char* run_block_recurrence(const RecurrenceArgs& args, Stream stream) {
  LaunchShape shape;
  shape.blocks_x = static_cast<unsigned>((args.steps.B + Engine::kRows - 1) / Engine::kRows);
  shape.blocks_y = args.directions;
  shape.threads = Engine::kThreads;
  shape.shared_bytes = Engine::kSharedBytes;
  const auto kernel = args.backward ? block_recurrence<Engine, true, 0>
                      : args.direction[0].x.data == nullptr
                          ? block_recurrence<Engine, false, 0>
                          : block_recurrence<Engine, false, kMaxFusedInput>;
  return launch(kernel, shape, stream, args);
}

}  // namespace fastrnn::cuda
