// SPDX-License-Identifier: Apache-2.0
//
// Packed weights, and products of rows with them.
#pragma once

#include <ATen/ops/empty.h>

#include <algorithm>
#include <vector>

#include "../parallel.h"
#include "dispatch.h"
#include "tensors.h"

namespace fastrnn::cpu {

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

/// out = [out +] x M for the rows `rows` of some steps: at once where all follow one another, else
/// by steps or by sequences, of which there are fewer. a: but for rows, x and out.
template <typename T>
void multiply_steps(const Layout& layout, Range steps, Range rows, const Sequence<const T>& x,
                    ProductArgs<T> a, const Sequence<T>& out, bool parallel) {
  const int64_t count = steps.end - steps.begin, height = rows.end - rows.begin;
  a.rows = layout.position(steps.end) - layout.position(steps.begin);
  const auto is_matrix = [&](const auto& s) {
    return s.first_row ? height == layout.B : count == 1 || s.step_stride == height * s.row_stride;
  };
  if (is_matrix(x) && is_matrix(out)) {
    if (!layout.packed()) a.rows = count * height;
    a.x = {x.row(steps.begin, rows.begin), x.row_stride};
    a.out = {out.row(steps.begin, rows.begin), out.row_stride};
    return multiply_rows(a, parallel);
  }
  const bool by_steps = layout.packed() || count < height;
  const int64_t pieces = by_steps ? count : height;
  const bool each_alone = parallel && pieces >= available_threads();
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = steps.begin + (by_steps ? i : 0), b = rows.begin + (by_steps ? 0 : i);
      ProductArgs<T> piece = a;
      piece.rows = by_steps ? std::min(layout.rows(t), rows.end) - rows.begin : count;
      if (piece.rows <= 0) continue;
      piece.x = {x.row(t, b), by_steps ? x.row_stride : x.step_stride};
      piece.out = {out.row(t, b), by_steps ? out.row_stride : out.step_stride};
      multiply_rows(piece, parallel && !each_alone);
    }
  };
  share(pieces, 1, run, each_alone);
}

}  // namespace fastrnn::cpu
