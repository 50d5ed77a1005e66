// SPDX-License-Identifier: Apache-2.0
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <cstring>

#include "layer_common.h"

namespace fastrnn::cpu {

Layout::Layout(const Tensor& input, const OptionalTensor& batch_sizes_tensor) {
  if (!batch_sizes_tensor.has_value()) {
    T = input.size(0);
    B = input.size(1);
    total_rows = T * B;
    return;
  }
  const Tensor sizes = batch_sizes_tensor->contiguous();
  const int64_t* data = sizes.const_data_ptr<int64_t>();
  T = sizes.numel();
  batch_sizes.assign(data, data + T);
  first_row.assign(T + 1, 0);
  for (int64_t t = 0; t < T; ++t) first_row[t + 1] = first_row[t] + batch_sizes[t];
  B = batch_sizes[0];
  total_rows = first_row[T];
}

Steps Layout::steps(int64_t begin, int64_t end, bool descending, int64_t carry_rows) const {
  Steps s;
  s.begin = begin;
  s.end = end;
  s.descending = descending;
  s.batch = B;
  s.batch_sizes = packed() ? batch_sizes.data() : nullptr;
  s.first_row = packed() ? first_row.data() : nullptr;
  s.carry_rows = carry_rows;
  return s;
}

namespace {

/// One direction's weights, ready for the kernel, in the type computed in.
template <typename T>
struct PreparedCell {
  Tensor w_ih, w_hh;  // [H, I], [H, H], adjacent columns where they are read unpacked
  Tensor bias;        // b_ih + b_hh, [padded H], or undefined
  Tensor w_ih_panels, w_hh_panels;

  PreparedCell(const Cell& cell, const Plan& plan) {
    const at::ScalarType type = c10::CppTypeToScalarType<T>::value;
    const int64_t H = cell.w_hh.size(0);
    w_ih = plan.pack_weights ? cell.w_ih.to(type) : readable(cell.w_ih, type);
    w_hh = plan.pack_weights ? cell.w_hh.to(type) : readable(cell.w_hh, type);
    if (plan.pack_weights) {
      w_hh_panels = pack_weight<T>(w_hh, /*transposed=*/true);
      if (plan.fuse_input) w_ih_panels = pack_weight<T>(w_ih, /*transposed=*/true);
    }
    if (!cell.b_ih.defined()) return;
    const Tensor b_ih = cell.b_ih.to(type).contiguous(), b_hh = cell.b_hh.to(type).contiguous();
    const T *ih = b_ih.const_data_ptr<T>(), *hh = b_hh.const_data_ptr<T>();
    const int64_t padded = kernels<T>().padded_columns(H);
    bias = at::empty({padded}, w_ih.options());
    T* sum = bias.mutable_data_ptr<T>();
    for (int64_t j = 0; j < padded; ++j) sum[j] = j < H ? ih[j] + hh[j] : T(0);
  }

  /// The kernel's arguments as far as the weights decide them. x: input whose first step is
  /// `begin`, read only where the plan fuses its product.
  ForwardArgs<T> args(const Layout& layout, const Plan& plan, const Tensor& x,
                      int64_t begin) const {
    ForwardArgs<T> a;
    a.I = w_ih.size(1);
    a.H = w_hh.size(0);
    if (plan.pack_weights)
      a.w_hh_panels = w_hh_panels.const_data_ptr<T>();
    else
      a.w_hh = matrix_of<T>(w_hh);
    if (!plan.fuse_input) return a;
    a.x = sequence_of<const T>(layout, x, begin, 0);
    if (plan.pack_weights)
      a.w_ih_panels = w_ih_panels.const_data_ptr<T>();
    else
      a.w_ih = matrix_of<T>(w_ih);
    if (bias.defined()) a.bias = bias.const_data_ptr<T>();
    return a;
  }
};

/// P = X W_ih^T + b for all steps at once, written where the outputs will be.
template <typename T>
void project_input(const Tensor& input, const PreparedCell<T>& cell, Tensor y) {
  const Tensor x = as_rows(input), w = cell.w_ih.t();
  Tensor rows = y.view({-1, y.size(-1)});
  const int64_t H = w.size(1);
  if (cell.bias.defined())
    at::addmm_out(rows, cell.bias.narrow(0, 0, H), x, w);
  else
    at::mm_out(rows, x, w);
}

/// h_n of one direction: each row's state at its last step in that direction.
template <typename T>
void copy_final_state(const Layout& layout, bool reverse, const Tensor& output, int64_t column,
                      int64_t H, T* h_n) {
  const T* y = output.const_data_ptr<T>() + column;
  const int64_t stride = output.size(-1);
  int64_t t = layout.T;
  for (int64_t b = 0; b < layout.B; ++b) {
    while (layout.rows(t - 1) <= b) --t;  // t: length of sequence b
    const int64_t row = layout.offset(reverse ? 0 : t - 1) + b;
    std::memcpy(h_n + b * H, y + row * stride, H * sizeof(T));
  }
}

/// Tensors of the type computed in: the outputs are the workspace.
template <typename T>
void forward_native(const Layout& layout, const Plan& plan, const Tensor& input, const Tensor& hx,
                    const std::vector<PreparedCell<T>>& cells, Activation activation,
                    const Tensor& output) {
  const int64_t D = static_cast<int64_t>(cells.size()), H = output.size(-1) / D;
  const Tensor x = readable(input, input.scalar_type());
  std::vector<ForwardArgs<T>> args;
  for (int64_t d = 0; d < D; ++d) {
    const int64_t column = d * H;
    if (!plan.fuse_input) project_input<T>(x, cells[d], narrow_direction(output, d, H));
    ForwardArgs<T> a = cells[d].args(layout, plan, x, 0);
    a.steps = layout.steps(0, layout.T, /*descending=*/d == 1, 0);
    a.activation = activation;
    a.y = sequence_of<T>(layout, output, 0, column);
    if (hx.defined()) a.hx = matrix_of<T>(hx[d]);
    args.push_back(a);
  }
  for_each_part(layout, plan, D, [&](int64_t d, int64_t row_begin, int64_t row_end) {
    ForwardArgs<T> part = args[d];
    part.row_begin = row_begin;
    part.row_end = row_end;
    kernels<T>().forward(part);
  });
}

/// 16-bit tensors: chunks of steps are converted to float32 and back, the state stays in float32.
void forward_converted(const Layout& layout, const Plan& plan, const Tensor& input,
                       const Tensor& hx, const std::vector<PreparedCell<float>>& cells,
                       Activation activation, const Tensor& output) {
  const int64_t D = static_cast<int64_t>(cells.size()), H = output.size(-1) / D;
  for (int64_t d = 0; d < D; ++d) {
    const bool reverse = d == 1;
    Tensor carry;
    int64_t carry_rows = 0;
    for (int64_t done = 0; done < layout.T; done += plan.forward_steps) {
      const int64_t count = std::min(plan.forward_steps, layout.T - done);
      const int64_t begin = reverse ? layout.T - done - count : done, end = begin + count;
      const Tensor x = narrow_steps(layout, input, begin, end).to(at::kFloat).contiguous();
      const Tensor target = narrow_direction(narrow_steps(layout, output, begin, end), d, H);
      const Tensor y = at::empty(target.sizes(), x.options());
      if (!plan.fuse_input) project_input<float>(x, cells[d], y);
      ForwardArgs<float> a = cells[d].args(layout, plan, x, begin);
      a.steps = layout.steps(begin, end, /*descending=*/reverse, carry_rows);
      a.activation = activation;
      a.y = sequence_of<float>(layout, y, begin, 0);
      a.carry = matrix_of<float>(carry);
      if (hx.defined()) a.hx = matrix_of<float>(hx[d]);
      for_each_part(layout, plan, 1, [&](int64_t, int64_t row_begin, int64_t row_end) {
        ForwardArgs<float> part = a;
        part.row_begin = row_begin;
        part.row_end = row_end;
        kernels<float>().forward(part);
      });
      target.copy_(y);
      const int64_t last = reverse ? begin : end - 1;
      carry_rows = layout.rows(last);
      carry = y.view({-1, H}).narrow(0, layout.offset(last) - layout.offset(begin), carry_rows);
    }
  }
}

template <typename T>
std::vector<PreparedCell<T>> prepare_cells(const std::vector<Cell>& cells, const Plan& plan) {
  std::vector<PreparedCell<T>> prepared;
  prepared.reserve(cells.size());
  for (const Cell& cell : cells) prepared.emplace_back(cell, plan);
  return prepared;
}

}  // namespace

void layer_forward(const Layout& layout, const Tensor& input, const Tensor& hx,
                   const std::vector<Cell>& cells, Activation activation, const Tensor& output,
                   const Tensor& h_n) {
  const int64_t D = static_cast<int64_t>(cells.size()), H = output.size(-1) / D;
  const at::ScalarType type = output.scalar_type();
  const Plan plan = plan_layer(layer_shape(layout, input, H, D), available_threads());
  const Tensor state = readable(hx, compute_type(type));
  if (type == at::kDouble) {
    forward_native<double>(layout, plan, input, state, prepare_cells<double>(cells, plan),
                           activation, output);
  } else if (type == at::kFloat) {
    forward_native<float>(layout, plan, input, state, prepare_cells<float>(cells, plan), activation,
                          output);
  } else {
    forward_converted(layout, plan, input, state, prepare_cells<float>(cells, plan), activation,
                      output);
  }
  const auto copy = [&](auto zero) {
    using Scalar = decltype(zero);
    for (int64_t d = 0; d < D; ++d)
      copy_final_state<Scalar>(layout, d == 1, output, d * H, H,
                               h_n.mutable_data_ptr<Scalar>() + d * layout.B * H);
  };
  if (type == at::kDouble)
    copy(double{});
  else if (type == at::kFloat)
    copy(float{});
  else if (type == at::kBFloat16)
    copy(at::BFloat16{});
  else
    copy(at::Half{});
}

}  // namespace fastrnn::cpu
