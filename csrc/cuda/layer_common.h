// SPDX-License-Identifier: Apache-2.0
//
// What layer_forward.cpp and layer_backward.cpp share: the layer's steps in chunks, products of
// tensors, tensors as the kernels see them, and the recurrence over a chunk by any tier.
#pragma once

#include "layer_cuda.h"

namespace fastrnn::cuda {

/// out = a b, or out += a b; sums are in float, of double in double. a and b are matrices of one
/// type and any strides; out is of that type or compute_type, and the numbers of a row are
/// adjacent. Unless it must be `exact`, float may be rounded to TF32: see Multiplier.
void product_out(const Tensor& out, const Tensor& a, const Tensor& b, bool accumulate = false,
                 bool exact = false);
/// a b, of compute_type.
Tensor float_product(const Tensor& a, const Tensor& b);
/// sum += a b; the first one makes it, of compute_type.
void add_product(Tensor& sum, const Tensor& a, const Tensor& b);

inline void check_launch(const char* error) {
  TORCH_CHECK(error == nullptr, "fastrnn: CUDA error: ", error);
}

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

/// Layout::first_row on the GPU of `like`: [T + 1], uploaded when first asked for in a call;
/// undefined for padded data.
const Tensor& first_row_on_device(const Layout& layout, const Tensor& like);

/// What the recurrence of one direction reads and writes over one chunk: RecurrenceDirection and
/// its tensors. addend, x, y, out hold the chunk's steps [.., H].
struct DirectionTensors {
  Cell cell;
  Tensor addend, x, y, out;             // forward: addend or x
  Tensor state, grad_h_n, final_state;  // [B, H]
  bool descending;
};

/// Runs the recurrence over a chunk by the plan's tier, directions side by side where it can.
void run_recurrence(const Layout& layout, const Plan& plan, const Tensor& first_row,
                    Activation activation, bool backward, const std::vector<Range>& ranges,
                    const std::vector<DirectionTensors>& directions);

}  // namespace fastrnn::cuda
