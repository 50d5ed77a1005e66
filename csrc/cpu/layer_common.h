// SPDX-License-Identifier: Apache-2.0
//
// What layer_forward.cpp and layer_backward.cpp share: views of tensors as the recurrence sees
// them, packed weights, and the split of the batch over threads.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>

#include "dispatch.h"
#include "layer_cpu.h"
#include "plan.h"
#include "products.h"
#include "recurrence.h"

namespace fastrnn::cpu {

/// The type of tensors that kernels for T read and write.
template <typename T>
constexpr at::ScalarType kScalarType = c10::CppTypeToScalarType<T>::value;
template <>
constexpr at::ScalarType kScalarType<BFloat16> = at::kBFloat16;

/// Its data, which are of type T.
template <typename T>
const T* data_of(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <typename T>
T* mutable_data_of(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

/// run(number), the number of the type that kernels for tensors of type `given` read and write.
template <typename Run>
auto with_kernel_type(at::ScalarType given, const Run& run) {
  switch (kernel_type(given)) {
    case at::kDouble:
      return run(double{});
    case at::kBFloat16:
      return run(BFloat16{});
    default:
      return run(float{});
  }
}

/// run(part of to, the same of from) for all parts of two tensors of one shape. ATen's operators on
/// so many numbers would ask for all threads by themselves, however late they come.
template <typename Run>
void run_in_parts(const Tensor& to, const Tensor& from, const Run& run) {
  constexpr int64_t kNumbers = (1 << 15) - 1;  // that ATen leaves to one thread
  if (to.numel() <= kNumbers || available_threads() == 1) return run(to, from);
  const int64_t count = to.size(0);
  if (to.numel() / count > kNumbers) {
    for (int64_t i = 0; i < count; ++i) run_in_parts(to.select(0, i), from.select(0, i), run);
    return;
  }
  const int64_t each = at::divup(count, at::divup(to.numel(), kNumbers));
  run_with_operators(at::divup(count, each), [&](int64_t i) {
    const int64_t begin = i * each, end = std::min(count, begin + each);
    run(to.narrow(0, begin, end - begin), from.narrow(0, begin, end - begin));
  });
}

/// to = from, of any types and strides.
inline void copy(const Tensor& from, const Tensor& to) {
  run_in_parts(to, from, [](const Tensor& t, const Tensor& f) { t.copy_(f); });
}

/// A new tensor of this type with the numbers of `t`.
inline Tensor converted(const Tensor& t, at::ScalarType type) {
  const Tensor result = at::empty_like(t, t.options().dtype(type));
  copy(t, result);
  return result;
}

/// `t` with adjacent columns, in `type`; itself where it is so already.
inline Tensor readable(const Tensor& t, at::ScalarType type) {
  if (!t.defined()) return t;
  const Tensor result = t.scalar_type() == type ? t : converted(t, type);
  if (result.stride(-1) == 1 || result.size(-1) == 1) return result;
  const Tensor adjacent = at::empty(t.sizes(), result.options());
  copy(result, adjacent);
  return adjacent;
}

inline LayerShape layer_shape(const Layout& layout, const Layer& layer) {
  LayerShape s;
  s.T = layout.T;
  s.B = layout.B;
  s.I = layer.input.size(-1);
  s.H = layer.hidden_size();
  s.total_rows = layout.total_rows;
  s.state_rows = layout.total_rows - (layer.hx.defined() ? 0 : layout.B);
  s.packed = layout.packed();
  s.directions = layer.directions();
  set_type(s, layer.input.scalar_type());
  return s;
}

/// The recurrence's view of steps [begin, end).
inline Steps steps_of(const Layout& layout, int64_t begin, int64_t end, bool descending,
                      int64_t carry_rows) {
  Steps s;
  s.begin = begin;
  s.end = end;
  s.descending = descending;
  s.batch = layout.B;
  s.batch_sizes = layout.packed() ? layout.batch_sizes.data() : nullptr;
  s.carry_rows = carry_rows;
  return s;
}

/// A chunk whose first step is `begin`, addressed by the steps of the whole sequence: data points
/// where step 0 would be. first_row: of each step, if packed; in a tensor of the call's, or in a
/// workspace, Layout::rows_before.
template <typename T>
Sequence<T> sequence_of(const Layout& layout, const Tensor& chunk, int64_t begin, int64_t column,
                        const std::vector<int64_t>& first_row) {
  using Value = std::remove_const_t<T>;
  if (!chunk.defined()) return {};
  T* data;
  if constexpr (std::is_const_v<T>)
    data = data_of<Value>(chunk);
  else
    data = mutable_data_of<T>(chunk);
  Sequence<T> s;
  s.step_stride = layout.packed() ? 0 : chunk.stride(0);
  // One row has any stride: then that of the steps, so that rows of all steps are a matrix.
  s.row_stride = layout.packed() || chunk.size(1) == 1 ? chunk.stride(0) : chunk.stride(1);
  s.first_row = layout.packed() ? first_row.data() : nullptr;
  const int64_t before = s.first_row ? first_row[begin] * s.row_stride : begin * s.step_stride;
  s.data = data + column - before;
  return s;
}
template <typename T>
Sequence<T> sequence_of(const Layout& layout, const Tensor& chunk, int64_t begin, int64_t column) {
  return sequence_of<T>(layout, chunk, begin, column, layout.first_row);
}

/// A [B, H] tensor whose columns are adjacent.
template <typename T>
Matrix<const T> matrix_of(const Tensor& t) {
  if (!t.defined()) return {};
  return {data_of<T>(t), t.stride(0)};
}

/// A packed weight.
template <typename T>
class Panels {
 public:
  Panels() = default;  // none

  /// Of weight^T ([N, K] read as [K, N]) or, with `transposed` false, of the weight itself.
  Panels(const Tensor& weight, bool transposed) {
    // By sizes and strides: a transposed view costs more than a small layer.
    const int64_t k_dim = transposed ? 1 : 0, n_dim = 1 - k_dim;
    const int64_t K = K_ = weight.size(k_dim), N = N_ = weight.size(n_dim);
    constexpr at::ScalarType type = kScalarType<T>;
    T* panels = allocate(kernels<T>().packed_size(K, N), weight.options().dtype(type));
    // Slices of columns hold whole panels. Threads share a large weight's; a 16-bit weight is
    // converted one at a time.
    constexpr int64_t kSlice = 128, kLarge = 1 << 16;  // columns; elements, some 20 us
    const bool converts = weight.scalar_type() != type;
    const auto pack = [&](int64_t begin, int64_t end) {
      const int64_t n = begin * kSlice, count = std::min(end * kSlice, N) - n;
      const Tensor part = converts ? converted(weight.narrow(n_dim, n, count), type) : weight;
      const int64_t n_stride = part.stride(n_dim);
      kernels<T>().pack(data_of<T>(part) + (converts ? 0 : n * n_stride), part.stride(k_dim),
                        n_stride, K, count, panels + kernels<T>().packed_size(K, n));
    };
    const int64_t slices = at::divup(N, kSlice);
    if (converts)
      for (int64_t i = 0; i < slices; ++i) pack(i, i + 1);
    else
      share(slices, 1, pack, /*parallel=*/K * N >= kLarge);
  }

  /// Null if there are none.
  const T* data() const {
    if (large_.defined()) return data_of<T>(large_);
    return small_.empty() ? nullptr : small_.data();
  }

  /// A product with it, but for rows, x and out.
  ProductArgs<T> product() const {
    ProductArgs<T> a;
    a.K = K_;
    a.N = N_;
    a.panels = data();
    return a;
  }

 private:
  T* allocate(int64_t size, const at::TensorOptions& options) {
    constexpr int64_t kSmall = 1 << 10;  // a tensor costs more than a small layer
    if (size <= kSmall) {
      small_.resize(size);
      return small_.data();
    }
    large_ = at::empty({size}, options);
    return mutable_data_of<T>(large_);
  }

  int64_t K_ = 0, N_ = 0;
  std::vector<T> small_;
  Tensor large_;
};

/// The product of a.rows rows with packed weights, which the threads share if `parallel`: by whole
/// tiles of any capability, the last of them with all rows that are left. Alone, one or two rows
/// would be added up in another order than among others.
template <typename T>
void multiply_rows(const ProductArgs<T>& a, bool parallel) {
  constexpr int64_t kTileRows = 12, kTilesPerThread = 3;
  const int64_t tiles = std::max<int64_t>(1, a.rows / kTileRows);
  const auto run = [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kTileRows;
    ProductArgs<T> part = a;
    part.rows = (end == tiles ? a.rows : end * kTileRows) - first;
    part.x.data += first * a.x.row_stride;
    part.out.data += first * a.out.row_stride;
    kernels<T>().product(part);
  };
  share(tiles, kTilesPerThread, run, parallel);
}

/// out = [out +] x M in some steps: at once where all rows follow one another, else by steps or by
/// sequences, of which there are fewer. a: but for rows, x and out.
template <typename T>
void multiply_steps(const Layout& layout, Range steps, const Sequence<const T>& x, ProductArgs<T> a,
                    const Sequence<T>& out, bool parallel) {
  const int64_t count = steps.end - steps.begin;
  a.rows = layout.offset(steps.end) - layout.offset(steps.begin);
  const auto is_matrix = [&](const auto& s) {
    return s.first_row ? s.first_row[steps.end] - s.first_row[steps.begin] == a.rows
                       : count == 1 || s.step_stride == layout.B * s.row_stride;
  };
  if (is_matrix(x) && is_matrix(out)) {
    a.x = {x.row(steps.begin, 0), x.row_stride};
    a.out = {out.row(steps.begin, 0), out.row_stride};
    return multiply_rows(a, parallel);
  }
  const bool by_steps = layout.packed() || count < layout.B;
  const int64_t pieces = by_steps ? count : layout.B;
  const bool each_alone = parallel && pieces >= available_threads();
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = steps.begin + (by_steps ? i : 0), b = by_steps ? 0 : i;
      ProductArgs<T> piece = a;
      piece.rows = by_steps ? layout.rows(t) : count;
      piece.x = {x.row(t, b), by_steps ? x.row_stride : x.step_stride};
      piece.out = {out.row(t, b), by_steps ? out.row_stride : out.step_stride};
      multiply_rows(piece, parallel && !each_alone);
    }
  };
  share(pieces, 1, run, each_alone);
}

/// The parts of the batch, as row bounds: equal numbers of rows x steps in each of the steps
/// `range`, so that long packed sequences share evenly.
inline std::vector<int64_t> row_bounds(const Layout& layout, Range range, int64_t row_blocks) {
  std::vector<int64_t> bounds{0};
  if (layout.packed() && row_blocks > 1) {
    const int64_t total = layout.offset(range.end) - layout.offset(range.begin);
    int64_t t = range.end, done = 0;
    for (int64_t b = 0; b < layout.rows(range.begin); ++b) {
      while (layout.batch_sizes[t - 1] <= b) --t;  // t: end of sequence b
      done += t - range.begin;
      const int64_t next = static_cast<int64_t>(bounds.size());
      if (next < row_blocks && done * row_blocks >= next * total) bounds.push_back(b + 1);
    }
  } else {
    for (int64_t i = 1; i < row_blocks; ++i) bounds.push_back(layout.B * i / row_blocks);
  }
  bounds.push_back(layout.B);
  return bounds;
}

/// Some rows of the batch, in steps that have any of them.
inline Layout narrow_layout(Layout layout, Range rows) {
  layout.B = rows.end - rows.begin;
  layout.total_rows = layout.T * layout.B;
  if (!layout.packed()) return layout;
  while (layout.batch_sizes[layout.T - 1] <= rows.begin) --layout.T;
  layout.batch_sizes.resize(layout.T);
  layout.first_row.resize(layout.T + 1);
  layout.rows_before.resize(layout.T + 1);
  for (int64_t t = 0; t < layout.T; ++t) {
    layout.batch_sizes[t] = std::min(layout.batch_sizes[t], rows.end) - rows.begin;
    layout.rows_before[t + 1] = layout.rows_before[t] + layout.batch_sizes[t];
  }
  layout.total_rows = layout.rows_before[layout.T];
  return layout;
}

/// Those rows of a [T, B, N] or [D, B, H] tensor, as a view, if there is one.
inline Tensor narrow_rows(const Tensor& t, Range rows) {
  return t.defined() ? t.narrow(1, rows.begin, rows.end - rows.begin) : t;
}

/// Runs a kernel on every part of the batch, of all `directions` side by side, each by a thread or
/// by a team of threads.
template <typename Args>
void run_parts(const Layout& layout, const Plan& plan, const std::vector<Args>& directions,
               void (*kernel)(const Args&)) {
  std::vector<Args> walks;
  for (const Args& args : directions) {
    const auto bounds = row_bounds(layout, {args.steps.begin, args.steps.end}, plan.row_blocks);
    for (size_t i = 1; i < bounds.size(); ++i) {
      Args& walk = walks.emplace_back(args);
      walk.row_begin = bounds[i - 1];
      walk.row_end = bounds[i];
    }
  }
  const int64_t team = plan.column_blocks, places = static_cast<int64_t>(walks.size()) * team;
  std::vector<Slab> slabs(team > 1 ? places : 0);
  const auto run = [&](int64_t begin, int64_t end) {
    const bool alone = end - begin == places;  // one thread is no team
    for (int64_t i = begin; i < end; i += alone ? team : 1) {
      Args walk = walks[i / team];
      if (!alone && team > 1)
        walk.team = {slabs.data() + i / team * team, team, i % team, give_way};
      kernel(walk);
    }
  };
  share(places, 1, run, plan.parallel);
}

}  // namespace fastrnn::cpu
