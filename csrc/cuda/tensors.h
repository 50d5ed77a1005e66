// SPDX-License-Identifier: Apache-2.0
//
// Tensors as the kernels read and write them.
#pragma once

#include "engine.h"

namespace fastrnn::cuda {

inline Type type_of(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return Type::kDouble;
    case at::kHalf:
      return Type::kHalf;
    case at::kBFloat16:
      return Type::kBFloat16;
    default:
      return Type::kFloat;
  }
}

inline Type type_of(const Tensor& t) { return type_of(t.scalar_type()); }

inline void* data_of(const Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; }
inline const void* read_of(const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }

/// The rows of step t in a tensor that begins at step `origin`, as a matrix.
inline Tensor step_of(const Layout& layout, const Tensor& t, int64_t step, int64_t origin) {
  const Tensor rows = narrow_steps(layout, t, {step, step + 1}, origin);
  return layout.packed() ? rows : rows[0];
}

/// `t` as the kernels can address it; itself where it is so already.
inline Tensor addressable(const Tensor& t) {
  const bool adjacent = t.stride(-1) == 1 || t.size(-1) == 1;
  return adjacent && t.stride(-2) <= kMaxRowStride ? t : t.contiguous();
}

/// `t` holds `steps` from `origin` on; the kernels address it by the steps of the whole sequence.
inline Sequence sequence_of(const Layout& layout, const Tensor& t, int64_t origin) {
  if (!t.defined()) return {};
  Sequence s;
  s.step_stride = layout.packed() ? 0 : t.stride(0);
  s.row_stride = layout.packed() ? t.stride(0) : t.stride(1);
  const int64_t before =
      layout.packed() ? layout.first_row[origin] * s.row_stride : origin * s.step_stride;
  s.data = static_cast<char*>(t.mutable_data_ptr()) - before * static_cast<int64_t>(t.itemsize());
  return s;
}

}  // namespace fastrnn::cuda
