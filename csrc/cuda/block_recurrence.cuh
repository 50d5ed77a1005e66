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

/// What one thread reads of one step, loaded ahead of it.
template <typename Addend, typename Element, int kElements>
struct Inputs {
  Addend addend[kElements];
  Element y[kElements];
};

template <class Engine, bool kBackward>
__global__ void __launch_bounds__(Engine::kThreads, 1)
    block_recurrence(const __grid_constant__ RecurrenceArgs args) {
  using Element = typename Engine::Element;
  using Addend = std::conditional_t<kBackward, Element, float>;
  constexpr int kElements = Engine::kElements, kDepth = Engine::kDepth;
  const RecurrenceDirection& d = args.direction[blockIdx.y];
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * Engine::kRows;
  const int H = static_cast<int>(args.H);
  const Walk walk(args.steps, d, row0);

  Engine engine;
  engine.load_weights(static_cast<const Element*>(d.w_hh), H, /*transposed=*/kBackward);

  // Two buffers of s, zero also where there is no row or column.
  Element* const state = static_cast<Element*>(shared_memory());
  for (int i = threadIdx.x; i < 2 * Engine::kStateSize; i += Engine::kThreads) state[i] = Element{};
  __syncthreads();

  // Of `rows` rows of the batch, those in this block; is a thread's element e in them; and where
  // is it in a [B, H] tensor.
  const auto in_this_block = [&](int64_t rows) {
    const int64_t count = rows - row0;
    return static_cast<int>(count < Engine::kRows ? count : Engine::kRows);
  };
  const auto is_alive = [&](int e, int rows) {
    return engine.owns(e) && engine.unit(e) < H && engine.row(e) < rows;
  };
  const int batch = in_this_block(args.steps.B);
  const auto in_block = [&](int e, const Sequence& s) {  // from the block's first row; 32 bits do
    return static_cast<unsigned>(engine.row(e)) * static_cast<unsigned>(s.row_stride) +
           static_cast<unsigned>(engine.unit(e));
  };
  const auto place = [&](int e) { return (row0 + engine.row(e)) * H + engine.unit(e); };

  float bias[kElements] = {};  // the biases' sum there
  FASTRNN_UNROLL
  for (int e = 0; e < kElements; ++e) {
    if (kBackward || d.b_ih == nullptr || !is_alive(e, batch)) continue;
    bias[e] = to_float(static_cast<const Element*>(d.b_ih)[engine.unit(e)]) +
              to_float(static_cast<const Element*>(d.b_hh)[engine.unit(e)]);
  }
  FASTRNN_UNROLL
  for (int e = 0; e < kElements; ++e) {
    if (d.state == nullptr || !is_alive(e, batch)) continue;
    state[Engine::state_index(engine.row(e), engine.unit(e))] =
        static_cast<const Element*>(d.state)[place(e)];
  }

  const auto load = [&](int i, Inputs<Addend, Element, kElements>& in) {
    if (i >= walk.count) return;
    const int64_t t = walk.step(i);
    const int rows = in_this_block(walk.rows(t));
    const Addend* const addend = walk.at<const Addend>(d.addend, t, row0);
    const Element* const y = walk.at<const Element>(d.y, t, row0);
    FASTRNN_UNROLL
    for (int e = 0; e < kElements; ++e) {
      in.addend[e] = Addend{};
      if (kBackward) in.y[e] = Element{};
      if (!is_alive(e, rows)) continue;
      if (d.addend.data != nullptr) in.addend[e] = addend[in_block(e, d.addend)];
      if (kBackward) in.y[e] = y[in_block(e, d.y)];
    }
  };
  Inputs<Addend, Element, kElements> inputs[kDepth];
  FASTRNN_UNROLL
  for (int i = 0; i < kDepth; ++i) load(i, inputs[i]);
  __syncthreads();

  for (int base = 0; base < walk.count; base += kDepth) {
    FASTRNN_UNROLL
    for (int i = 0; i < kDepth; ++i) {
      if (base + i >= walk.count) break;
      const int64_t t = walk.step(base + i);
      const int rows = in_this_block(walk.rows(t));
      const int buffer = (kDepth % 2 == 0 ? i : base) % 2;
      const Element* const before = state + buffer * Engine::kStateSize;
      Element* const after = state + (1 - buffer) * Engine::kStateSize;
      float sums[kElements];
      engine.multiply(before, sums);
      const int rows_before =
          kBackward && d.grad_h_n != nullptr ? in_this_block(walk.rows_before(t)) : 0;
      Element* const out = walk.at<Element>(d.out, t, row0);
      FASTRNN_UNROLL
      for (int e = 0; e < kElements; ++e) {
        if (!engine.owns(e)) continue;
        float sum = sums[e] + to_float(inputs[i].addend[e]) + bias[e];
        const bool alive = is_alive(e, rows);
        if (kBackward && d.grad_h_n != nullptr && alive && !is_alive(e, rows_before))
          sum += to_float(static_cast<const Element*>(d.grad_h_n)[place(e)]);
        const float y = kBackward ? to_float(inputs[i].y[e]) : 0.0f;
        const int index = Engine::state_index(engine.row(e), engine.unit(e));
        if (alive) {
          const Element s =
              from_float<Element>(activate<Element, kBackward>(args.activation, sum, y));
          after[index] = s;
          out[in_block(e, d.out)] = s;
        } else {
          after[index] = before[index];  // a row that has ended, or not begun, keeps its state
        }
      }
      load(base + i + kDepth, inputs[i]);
      __syncthreads();
    }
  }

  if (d.final_state == nullptr) return;
  const Element* const last = state + walk.count % 2 * Engine::kStateSize;
  FASTRNN_UNROLL
  for (int e = 0; e < kElements; ++e)
    if (is_alive(e, batch))
      static_cast<Element*>(d.final_state)[place(e)] =
          last[Engine::state_index(engine.row(e), engine.unit(e))];
}

template <class Engine>
const char* run_block_recurrence(const RecurrenceArgs& args, Stream stream) {
  LaunchShape shape;
  shape.blocks_x = static_cast<unsigned>((args.steps.B + Engine::kRows - 1) / Engine::kRows);
  shape.blocks_y = args.directions;
  shape.threads = Engine::kThreads;
  shape.shared_bytes = Engine::kSharedBytes;
  return args.backward ? launch(block_recurrence<Engine, true>, shape, stream, args)
                       : launch(block_recurrence<Engine, false>, shape, stream, args);
}

}  // namespace fastrnn::cuda
