// SPDX-License-Identifier: Apache-2.0
//
// Tensors as the kernels read and write them: of their types, with adjacent columns, by steps.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>

#include "../layer.h"
#include "../parallel.h"
#include "dispatch.h"
#include "plan.h"
#include "products.h"

namespace fastrnn::cpu {

/// The type that a layer's kernels read and write, if its tensors are of type `given`.
inline at::ScalarType kernel_type(at::ScalarType given) {
  return given == at::kBFloat16 && has_bfloat16_kernels() ? given : compute_type(given);
}

/// What the plan has to know of the tensors' type.
inline void set_type(LayerShape& shape, at::ScalarType given) {
  const at::ScalarType type = kernel_type(given);
  shape.element_size = static_cast<int64_t>(c10::elementSize(type));
  shape.converts = type != given;
  shape.aten_is_faster = &capability() == &default_capability() || has_tile_product(given);
}

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

/// run(part of to, the same of from) for all parts of two tensors of one shape, which the threads
/// share. ATen's operators on so many numbers would ask for all threads by themselves, however late
/// they come.
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
  share(at::divup(count, each), 1, [&](int64_t begin, int64_t end) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;  // threads have no state of the caller's
    for (int64_t first = begin * each; first < std::min(count, end * each); first += each) {
      const int64_t size = std::min(each, count - first);
      run(to.narrow(0, first, size), from.narrow(0, first, size));
    }
  });
}

/// to = from, of any types and strides.
inline void copy_into(const Tensor& from, const Tensor& to) {
  run_in_parts(to, from, [](const Tensor& t, const Tensor& f) { t.copy_(f); });
}

/// A new tensor of this type with the numbers of `t`.
inline Tensor converted(const Tensor& t, at::ScalarType type) {
  const Tensor result = at::empty_like(t, t.options().dtype(type));
  copy_into(t, result);
  return result;
}

/// `t` with adjacent columns, in `type`; itself where it is so already.
inline Tensor readable(const Tensor& t, at::ScalarType type) {
  if (!t.defined()) return t;
  const Tensor result = t.scalar_type() == type ? t : converted(t, type);
  if (result.stride(-1) == 1 || result.size(-1) == 1) return result;
  const Tensor adjacent = at::empty(t.sizes(), result.options());
  copy_into(result, adjacent);
  return adjacent;
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
/// where step 0 would be.
template <typename T>
Sequence<T> sequence_of(const Layout& layout, const Tensor& chunk, int64_t begin, int64_t column) {
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
  s.first_row = layout.packed() ? layout.first_row.data() : nullptr;
  const int64_t before = s.first_row ? s.first_row[begin] * s.row_stride : begin * s.step_stride;
  s.data = data + column - before;
  return s;
}

template <typename T>
Sequence<const T> read_only(const Sequence<T>& s) {
  return {s.data, s.step_stride, s.row_stride, s.first_row};
}

/// A [B, H] tensor whose columns are adjacent.
template <typename T>
Matrix<const T> matrix_of(const Tensor& t) {
  if (!t.defined()) return {};
  return {data_of<T>(t), t.stride(0)};
}

}  // namespace fastrnn::cpu
