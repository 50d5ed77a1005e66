// SPDX-License-Identifier: Apache-2.0
//
// Torch-free contract of the CPU recurrence. One loop serves forward and backward:
//
//   s_t = f( addends_t + x_t * W_x + s_{t-1} * M )
//
// The body lives in recurrence.inl and is compiled once per CPU capability (recurrence_*.cpp);
// dispatch.cpp chooses a table of kernels once per process. Includes no torch header, so that code
// compiled for a wide instruction set can never leak into functions shared with other files.
#pragma once

// But for cstdint, these serve recurrence.inl, which must not include anything for its target.
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "../../activation.h"

namespace fastrnn::cpu {

/// A number of PyTorch's bfloat16: the upper half of a float32.
struct BFloat16 {
  uint16_t bits;
};

/// What sums of products of T are added up in, and biases are given in.
template <typename T>
struct SumOf {
  using type = T;
};
template <>
struct SumOf<BFloat16> {
  using type = float;
};
template <typename T>
using Sum = typename SumOf<T>::type;

/// The rows of one step, read or written in place: element (row, column) is
/// data[row * row_stride + column]. A null `data` means the matrix is absent.
template <typename T>
struct Matrix {
  T* data = nullptr;
  int64_t row_stride = 0;
};

/// A [T, B, N] sequence read or written in place, time-major or not, or packed data, where step t
/// begins with row first_row[t]. Columns are adjacent.
template <typename T>
struct Sequence {
  T* data = nullptr;
  int64_t step_stride = 0;
  int64_t row_stride = 0;
  const int64_t* first_row = nullptr;  // null: padded

  T* row(int64_t t, int64_t b) const {
    return data + (first_row ? first_row[t] * row_stride : t * step_stride) + b * row_stride;
  }
};

/// Which rows are alive at which step. Rows are sorted by length: a step's rows are a prefix.
struct Steps {
  int64_t begin = 0;  // steps [begin, end) are walked ...
  int64_t end = 0;
  bool descending = false;               // ... upwards, or downwards from end - 1
  int64_t batch = 0;                     // rows of every step of padded data
  const int64_t* batch_sizes = nullptr;  // packed: rows of step t, not increasing; else null
  // State that enters the first walked step: `carry_rows` rows of it, 0 at the sequence's start.
  int64_t carry_rows = 0;

  int64_t rows(int64_t t) const { return batch_sizes ? batch_sizes[t] : batch; }
};

/// Threads that share the steps of a walk, where there are too few rows for each to have its own.
/// Each computes some slabs of a step's columns, then waits for the others': the next step reads
/// all columns. Every slab has a cache line, in which its thread counts the rounds that it has
/// done.
struct alignas(64) Slab {
  int64_t done = 0;  // rounds whose results are in memory: one for each call of the walk's body
};
/// One thread's place in a team; no slabs: it walks alone.
struct Team {
  Slab* slabs = nullptr;         // [size], zero before the walk
  int64_t size = 1;              // slabs of a step
  int64_t begin = 0, end = 1;    // those of this thread
  void (*give_way)() = nullptr;  // called again and again while another thread is late
};

/// Forward of one layer and direction for rows [row_begin, row_end):
///   y_t = f( [y_t +] bias + x_t * W_ih^T + h_{t-1} * W_hh^T )
/// Weights are given either as panels, made by `pack`, or as they are: packing pays only where many
/// rows share it. Those of a product that no row has may be absent. Nothing is allocated; only y is
/// written.
template <typename T>
struct ForwardArgs {
  Steps steps;
  Team team;
  int64_t row_begin = 0, row_end = 0;
  int64_t I = 0, H = 0;
  Activation activation = Activation::kTanh;
  Sequence<const T> x;             // [T, B, I]; null: y already holds x * W_ih^T
  const T* w_ih_panels = nullptr;  // pack of W_ih^T [I, H], read only with x
  const T* w_hh_panels = nullptr;  // pack of W_hh^T [H, H]
  Matrix<const T> w_ih, w_hh;      // [H, I] and [H, H] in place of panels; adjacent columns
  const Sum<T>* bias = nullptr;    // [padded_columns(H)], zero padded; null: no bias
  Matrix<const T> hx;              // [B, H] state of a row at its first step; null: zeros
  Matrix<const T> carry;           // [carry_rows, H] state before the first walked step
  Sequence<T> y;                   // [T, B, H] out
};

/// Backward of one layer and direction, walking against the forward's time:
///   delta_t = ( grad_y_t + delta_{t+1} * W_hh ) * f'(y_t),    f' from y_t alone
/// where the row's last step gets grad_h_n in place of the product.
template <typename T>
struct BackwardArgs {
  Steps steps;
  Team team;
  int64_t row_begin = 0, row_end = 0;
  int64_t H = 0;
  Activation activation = Activation::kTanh;
  const T* w_hh_panels = nullptr;  // pack of W_hh [H, H], or ...
  Matrix<const T> w_hh;            // ... as it is
  Sequence<const T> grad_y;        // [T, B, H]; null: zeros
  Matrix<const T> grad_h_n;        // [B, H]; null: zeros
  Matrix<const T> carry;           // [carry_rows, H] delta of the step walked before the first
  Sequence<const T> y;             // [T, B, H]
  Sequence<T> delta;               // [T, B, H] out; may be grad_y's memory
};

/// Weight gradients of one layer and direction over a range of steps, added to what is there (or,
/// those of weights, where `overwrites`, in place of that), of rows [row_begin, row_end):
///   grad_W_ih += sum_t delta_t^T x_t
///   grad_W_hh += sum_t delta_t^T h_{t-1}
///   grad_b    += sum_t delta_t
/// `steps` walks as the forward did.
template <typename T>
struct WeightGradientArgs {
  Steps steps;
  int64_t row_begin = 0, row_end = 0;
  int64_t part = 0, parts = 1;  // this call's share of each gradient
  int64_t I = 0, H = 0;
  Sequence<const T> x;      // [T, B, I]
  Sequence<const T> y;      // [T, B, H], with the step before the first walked one
  Matrix<const T> hx;       // [B, H]; null: zeros
  Sequence<const T> delta;  // [T, B, H]
  bool overwrites = false;
  Sum<T>* grad_w_ih = nullptr;  // [H, I] contiguous, or null
  Sum<T>* grad_w_hh = nullptr;  // [H, H] contiguous, or null
  Sum<T>* grad_b = nullptr;     // [2, H], or null: the sums, and what they have lost by rounding
  T* workspace = nullptr;       // BFloat16: [packed_rows, packed_columns] to pack into
  int64_t packed_rows = 0;      // with it: rows at a time, even
};

/// Product of rows with a packed matrix M, or of few rows with a weight as it is, columns
/// [begin, end) of it:
///   out = [out +] x * M  or  out = x * W^T
template <typename T>
struct ProductArgs {
  int64_t rows = 0, K = 0, N = 0;
  Matrix<const T> x;           // [rows, K]
  const T* panels = nullptr;   // pack of M [K, N], or ...
  bool accumulate = false;     // ... with it: adds to out
  Matrix<const T> w;           // [N, K]
  int64_t begin = 0, end = 0;  // with it: begin a multiple of a vector, end too or N
  Matrix<T> out;               // [rows, N]
};

/// The kernels of one capability and one scalar type. All are safe to call from several threads on
/// disjoint rows, or as a team on the same rows. Those of BFloat16 round where they store and
/// multiply two terms at a time, which takes subnormal numbers as zero; backward needs panels.
template <typename T>
struct Kernels {
  /// Elements that `pack` writes for a [K, N] matrix, and N rounded up to whole vectors.
  int64_t (*packed_size)(int64_t K, int64_t N);
  int64_t (*padded_columns)(int64_t N);
  /// Copies the [K, N] matrix whose element (k, n) is source[k * k_stride + n * n_stride] into
  /// register-tile panels [panel][K][panel width], tail columns filled with zeros. Of BFloat16,
  /// with two terms side by side: [panel][K / 2, rounded up][panel width][2].
  void (*pack)(const T* source, int64_t k_stride, int64_t n_stride, int64_t K, int64_t N,
               T* panels);
  void (*forward)(const ForwardArgs<T>& args);
  void (*backward)(const BackwardArgs<T>& args);
  void (*product)(const ProductArgs<T>& args);
  void (*weight_gradients)(const WeightGradientArgs<T>& args);
  // Rows that it packs at a time, at most, and elements of its workspace for each; 0: it reads all
  // as it is.
  int64_t packed_rows, packed_columns;
};

/// One capability's tables.
struct Capability {
  const char* name;
  Kernels<float> f32;
  Kernels<double> f64;
};

const Capability& default_capability();
#if defined(__x86_64__)
const Capability& avx2_capability();
const Capability& avx512_capability();
/// For processors that have avx512_bf16 besides.
const Kernels<BFloat16>& avx512_bf16_kernels();
#endif

}  // namespace fastrnn::cpu
