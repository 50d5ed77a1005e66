// SPDX-License-Identifier: Apache-2.0
//
// The only SIMD code: the recurrence of recurrence.h, written once over the compiler's generic
// vectors. Included by recurrence_*.cpp inside their own namespace and target region, with
//   FASTRNN_VECTOR_BYTES  the vector's width,
//   FASTRNN_TILE_ROWS     rows of the largest register tile,
//   FASTRNN_TILE_VECTORS  vectors per row of a tile, hence the width of a panel,
//   FASTRNN_TERMS         terms of a sum that are added one after another: fewer where each
//                         product is rounded too, for want of a fused multiply-add,
//   FASTRNN_MASKED_LOAD   defined where there is masked_load(pointer, count) of float and double,
//   FASTRNN_BFLOAT16      defined if the target multiplies in bfloat16 (avx512_bf16).
// Everything has internal linkage, so that the linker can never take a function that was compiled
// for a wide instruction set into code for an older processor.
#define FASTRNN_INLINE inline __attribute__((always_inline))

// Each builds on those before it.
// clang-format off
#include "vectors.inl"
#if defined(FASTRNN_BFLOAT16)
#include "bfloat16.inl"
#endif
#include "activations.inl"
#include "pack.inl"
#include "step.inl"
#include "unpacked_step.inl"
#include "team.inl"
#include "walk.inl"
#include "outer_product.inl"
#include "weight_gradients.inl"
// clang-format on

namespace {

/// One step, alone or in a team: its columns in units of `width`, by run(s, unit, end, descending).
template <typename T>
FASTRNN_INLINE void run_step(const Step<T>& s, Rounds& rounds, bool descending, int64_t width,
                             void (*run)(const Step<T>&, int64_t, int64_t, bool)) {
  const int64_t units = (s.N + width - 1) / width;
  rounds.next(
      [&](int64_t i, int64_t n) { run(s, units * i / n, units * (i + 1) / n, descending); });
}

/// Asks for rows of the step after t, which another thread may have written: a step of one or two
/// rows is so little work that it would wait for them. args: those of the walk. (Members of a team
/// would take the rows from each other.)
template <typename Args, typename T>
FASTRNN_INLINE void fetch_next(const Args& args, const Sequence<T>& s, int64_t t, int64_t row,
                               int64_t rows) {
  constexpr int64_t kMostRows = 2, kLine = 64 / sizeof(T);
  const Steps& steps = args.steps;
  const int64_t next = steps.descending ? t - 1 : t + 1;
  const bool is_there = s.data != nullptr && steps.begin <= next && next < steps.end;
  if (!is_there || rows > kMostRows || args.team.slabs != nullptr) return;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < args.H; j += kLine)
      __builtin_prefetch(s.row(next, row + r) + j, /*for writing=*/!std::is_const_v<T>);
  }
}

template <typename T, typename Act>
void forward_loop(const ForwardArgs<T>& a) {
  const bool fused = a.x.data != nullptr, unpacked = a.w_hh.data != nullptr;
  Rounds rounds(a.team);
  walk<T>(a.steps, a.row_begin, a.row_end, a.carry, a.y,
          [&](int64_t t, int64_t first, int64_t last, Matrix<const T> previous) {
            Step<T> s = {};
            s.rows = last - first;
            s.N = a.H;
            s.out = rows_of(a.y, t, first);
            s.bias = a.bias;
            if (fused) {
              s.I = a.I;
              s.x = rows_of(a.x, t, first);
              s.x_panels = a.w_ih_panels;
              s.w_x = a.w_ih;
            } else {
              s.addend = read_only(s.out);
              fetch_next(a, a.y, t, first, s.rows);
            }
            s.s = previous.data ? previous : from_row(a.hx, first);
            s.K = s.s.data ? a.H : 0;
            s.s_panels = a.w_hh_panels;
            s.w_s = a.w_hh;
            if (unpacked)
              run_step(s, rounds, t & 1, kLanes<T>, run_unpacked_forward<T, Act>);
            else
              run_step(s, rounds, t & 1, kPanel<T>, run_panels<T, ForwardEpilogue<Act>>);
          });
}

template <typename T, typename Act>
void backward_loop(const BackwardArgs<T>& a) {
  const bool unpacked = a.w_hh.data != nullptr;
  Rounds rounds(a.team);
  walk<T>(a.steps, a.row_begin, a.row_end, a.carry, a.delta,
          [&](int64_t t, int64_t first, int64_t last, Matrix<const T> previous) {
            Step<T> s = {};
            s.rows = last - first;
            s.N = a.H;
            s.addend = rows_of(a.grad_y, t, first);
            s.s_panels = a.w_hh_panels;
            s.w_s = a.w_hh;
            if (previous.data != nullptr) {
              s.s = previous;
              s.K = a.H;
            } else {
              s.addend2 = from_row(a.grad_h_n, first);
            }
            s.h = rows_of(a.y, t, first);
            s.out = rows_of(a.delta, t, first);
            fetch_next(a, a.grad_y, t, first, s.rows);
            fetch_next(a, a.y, t, first, s.rows);
            if (unpacked)
              run_step(s, rounds, t & 1, kLanes<T>,
                       run_unpacked_backward<T, BackwardEpilogue<Act>>);
            else
              run_step(s, rounds, t & 1, kPanel<T>, run_panels<T, BackwardEpilogue<Act>>);
          });
}

/// Rows of K numbers that the second-level cache holds while panels pass: whole tiles.
template <typename T>
int64_t rows_in_block(int64_t K) {
  constexpr int64_t kBytes = 1 << 18, kLeast = 4;
  const int64_t row_bytes = (K + 1) * static_cast<int64_t>(sizeof(T));  // of no features too
  const int64_t tiles = kBytes / (FASTRNN_TILE_ROWS * row_bytes);
  return FASTRNN_TILE_ROWS * (tiles < kLeast ? kLeast : tiles);
}

template <typename T>
void product(const ProductArgs<T>& a) {
  Step<T> s = {};
  s.rows = a.rows;
  s.N = a.N;
  s.out = a.out;
  if (a.w.data == nullptr) {
    s.K = a.K;
    s.s_panels = a.panels;
    const int64_t panels = (a.N + kPanel<T> - 1) / kPanel<T>, block = rows_in_block<T>(a.K);
    for (int64_t row = 0; row < a.rows; row += s.rows) {
      // No few rows alone: they would be added up in another order than among others.
      s.rows = a.rows - row < block + FASTRNN_TILE_ROWS ? a.rows - row : block;
      s.s = from_row(a.x, row);
      s.out = from_row(a.out, row);
      if (a.accumulate) s.addend = read_only(s.out);
      run_panels<T, ForwardEpilogue<Identity>>(s, 0, panels, /*descending=*/(row / block) & 1);
    }
    return;
  }
  s.I = a.K;
  s.x = a.x;
  s.w_x = a.w;
  run_unpacked_forward<T, Identity>(s, a.begin / kLanes<T>, (a.end + kLanes<T> - 1) / kLanes<T>,
                                    /*descending=*/false);
}

template <typename T>
void forward(const ForwardArgs<T>& a) {
  if (a.activation == Activation::kTanh)
    forward_loop<T, Tanh>(a);
  else
    forward_loop<T, Relu>(a);
}

template <typename T>
void backward(const BackwardArgs<T>& a) {
  if (a.activation == Activation::kTanh)
    backward_loop<T, Tanh>(a);
  else
    backward_loop<T, Relu>(a);
}

template <typename T>
constexpr Kernels<T> kKernels = {packed_size<T>,      padded_columns<T>, pack<T>,
                                 forward<T>,          backward<T>,       product<T>,
                                 weight_gradients<T>, kPackedRows<T>,    kPackedColumns<T>};

}  // namespace
