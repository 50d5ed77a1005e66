// SPDX-License-Identifier: Apache-2.0
//
// Forward of one layer: the input's product before the walk, inside it, or beside it; then h_n.
#include <ATen/ops/empty.h>

#include <cstring>

#include "beside.h"
#include "engine.h"
#include "products.h"
#include "walks.h"
#include "weights.h"

namespace fastrnn::cpu {

namespace {

/// One direction's weights, in the form in which the walk reads them. T: the type computed in.
template <typename T>
struct WalkWeights {
  Tensor w_ih, w_hh;                   // [H, I], [H, H]; in T, adjacent columns, or undefined
  Panels<T> w_ih_panels, w_hh_panels;  // or packed
  std::vector<Sum<T>> bias;            // b_ih + b_hh, [padded H], or empty; a tensor costs more

  /// reads_state: a single step without hx has no previous state.
  WalkWeights(const Plan& plan, const Cell& cell, bool reads_state) {
    const bool reads_input = plan.input == Maker::kInStep;
    if (plan.state == Maker::kPanels) {
      if (reads_state) w_hh_panels = Panels<T>(cell.w_hh, /*transposed=*/true);
      if (reads_input || plan.converts) w_ih_panels = Panels<T>(cell.w_ih, /*transposed=*/true);
    } else if (plan.state == Maker::kAsIs) {
      w_hh = readable(cell.w_hh, kScalarType<T>);
      if (reads_input) w_ih = readable(cell.w_ih, kScalarType<T>);
    }
    if (!cell.b_ih.defined()) return;
    constexpr at::ScalarType type = kScalarType<Sum<T>>;
    const Tensor b_ih = readable(cell.b_ih, type), b_hh = readable(cell.b_hh, type);
    const Sum<T>*ih = data_of<Sum<T>>(b_ih), *hh = data_of<Sum<T>>(b_hh);
    const int64_t H = cell.w_hh.size(0);
    bias.resize(kernels<T>().padded_columns(H));
    for (int64_t j = 0; j < H; ++j) bias[j] = ih[j] + hh[j];
  }
};

/// Direction d of a layer on its way through the steps. Tensors of type T.
template <typename T>
struct ForwardWalk {
  const Layout& layout;
  const Layer& layer;
  const Plan& plan;
  const WalkWeights<T>& weights;
  const int64_t d;
  const Tensor hx;  // [B, H] or undefined

  int64_t hidden_size() const { return layer.hidden_size(); }

  /// The kernel's arguments for the steps `range`, from which x and y begin. y: this direction's
  /// columns. carry [carry_rows, H]: the state before them, undefined at the sequence's start.
  ForwardArgs<T> args(Range range, const Tensor& x, const Tensor& y, const Tensor& carry) const {
    ForwardArgs<T> a;
    a.steps = steps_of(layout, range.begin, range.end, /*descending=*/d == 1,
                       carry.defined() ? carry.size(0) : 0);
    a.I = layer.cells[d].w_ih.size(1);
    a.H = hidden_size();
    a.activation = layer.activation;
    if (plan.input == Maker::kInStep) a.x = sequence_of<const T>(layout, x, range.begin, 0);
    a.w_ih_panels = weights.w_ih_panels.data();
    a.w_hh_panels = weights.w_hh_panels.data();
    a.w_ih = matrix_of<T>(weights.w_ih);
    a.w_hh = matrix_of<T>(weights.w_hh);
    if (!weights.bias.empty()) a.bias = weights.bias.data();
    a.hx = matrix_of<T>(hx);
    a.carry = matrix_of<T>(carry);
    a.y = sequence_of<T>(layout, y, range.begin, 0);
    return a;
  }
};

/// out = x W^T, of few rows, by threads that share the columns.
template <typename T>
void multiply_few_rows(const Plan& plan, const Tensor& x, const Tensor& weight, const Tensor& out) {
  const Tensor w = readable(weight, kScalarType<T>);
  ProductArgs<T> a;
  a.K = w.size(1);
  a.N = w.size(0);
  a.w = matrix_of<T>(w);
  a.rows = x.size(0);
  a.x = matrix_of<T>(x);
  a.out = {mutable_data_of<T>(out), out.stride(0)};
  const int64_t vector = kernels<T>().padded_columns(1), vectors = at::divup(a.N, vector);
  const auto run = [&](int64_t begin, int64_t end) {
    ProductArgs<T> part = a;
    part.begin = begin * vector;
    part.end = std::min(a.N, end * vector);
    kernels<T>().product(part);
  };
  share(vectors, 1, run, plan.threads > 1);
}

/// x W_ih^T, written where the outputs will be. Packed weights read an x of any strides.
template <typename T>
void multiply_input(const Layout& layout, const Plan& plan, const Layer& layer, const Tensor& x,
                    const Tensor& output) {
  const int64_t H = layer.hidden_size();
  for (int64_t d = 0; d < layer.directions(); ++d) {
    const Tensor &w_ih = layer.cells[d].w_ih, target = narrow_direction(output, d, H);
    if (plan.input == Maker::kPanels)
      multiply_steps(layout, {0, layout.T}, {0, layout.B}, sequence_of<const T>(layout, x, 0, 0),
                     Panels<T>(w_ih, /*transposed=*/true).product(),
                     sequence_of<T>(layout, target, 0, 0), plan.threads > 1);
    else if (plan.input == Maker::kAsIs)
      multiply_few_rows<T>(plan, as_rows(x), w_ih, as_rows(target));
    else
      multiply(as_rows(x), w_ih.t(), as_rows(target));
  }
}

/// The walk by one thread, the input's product beside it by the others.
template <typename T>
void multiply_beside(const ForwardWalk<T>& forward, const Tensor& x, const Tensor& output) {
  const Layout& layout = forward.layout;
  const Panels<T> w_ih(forward.layer.cells[0].w_ih, /*transposed=*/true);
  const Sequence<const T> input = sequence_of<const T>(layout, x, 0, 0);
  const ForwardArgs<T> all = forward.args({0, layout.T}, x, output, Tensor());
  const std::vector<Range> parts = growing_parts(layout.T, layout.B);
  const auto walk = [&](int64_t i) {
    ForwardArgs<T> a = all;
    a.row_end = layout.B;
    a.steps.begin = parts[i].begin;
    a.steps.end = parts[i].end;
    if (i > 0) {
      a.steps.carry_rows = layout.rows(parts[i].begin - 1);
      a.carry = {a.y.row(parts[i].begin - 1, 0), a.y.row_stride};
    }
    kernels<T>().forward(a);
  };
  const auto product = [&](int64_t, int64_t i) {
    multiply_steps(layout, parts[i], {0, layout.B}, input, w_ih.product(), all.y,
                   /*parallel=*/false);
  };
  walk_beside(static_cast<int64_t>(parts.size()), 1, /*products_first=*/true, walk, product);
}

/// A product by ATen in each step; the kernel adds the bias and activates:
///   y_t = f( y_t + h_{t-1} W_hh^T + bias )
/// The exception among walks, for bfloat16 in tiles (AMX), which the kernels do not multiply in.
template <typename T>
void forward_by_steps(const ForwardWalk<T>& forward, const Tensor& y) {
  const Layout& layout = forward.layout;
  const Tensor w = forward.layer.cells[forward.d].w_hh.t();
  Tensor h = forward.hx;
  for (int64_t i = 0; i < layout.T; ++i) {
    const Range step = part_of({0, layout.T}, 1, i, /*descending=*/forward.d == 1);
    const Tensor y_t = narrow_steps(layout, y, step);
    if (h.defined()) multiply(h, w, y_t[0], /*accumulate=*/true);
    ForwardArgs<T> a = forward.args(step, Tensor(), y_t, Tensor());
    a.hx = {};
    run_walks(layout, forward.plan, std::vector{a}, kernels<T>().forward);
    h = y_t[0];
  }
}

/// 16-bit tensors: a few steps at a time are converted to float32 and back; the state stays in
/// float32.
void forward_converted(const ForwardWalk<float>& forward, const Tensor& x, const Tensor& output) {
  const Layout& layout = forward.layout;
  const Plan& plan = forward.plan;
  const Range all{0, layout.T};
  Tensor carry;
  for (int64_t i = 0; i < parts_in(all, plan.convert_steps); ++i) {
    const Range range = part_of(all, plan.convert_steps, i, /*descending=*/forward.d == 1);
    const Tensor target = narrow_steps(layout, output, range);
    const Tensor x_part = readable(narrow_steps(layout, x, range), at::kFloat);
    const Tensor y = at::empty(target.sizes(), x_part.options());
    if (plan.input == Maker::kPanels)
      multiply_steps(layout, range, {0, layout.B},
                     sequence_of<const float>(layout, x_part, range.begin, 0),
                     forward.weights.w_ih_panels.product(),
                     sequence_of<float>(layout, y, range.begin, 0), plan.threads > 1);
    run_walks(layout, plan, std::vector{forward.args(range, x_part, y, carry)},
              kernels<float>().forward);
    copy_into(y, target);
    const int64_t last = forward.d == 1 ? range.begin : range.end - 1;
    carry = converted(
        y.view({-1, forward.hidden_size()})
            .narrow(0, layout.position(last) - layout.position(range.begin), layout.rows(last)),
        at::kFloat);
  }
}

/// The same by blocks of padded rows: each thread converts what it computes.
void forward_converted_by_rows(const ForwardWalk<float>& forward, const Tensor& x,
                               const Tensor& output) {
  const Layout& layout = forward.layout;
  Plan alone = forward.plan;
  alone.row_blocks = alone.threads = 1;
  const std::vector<int64_t> bounds = row_bounds(layout, {0, layout.T}, forward.plan.row_blocks);
  share(forward.plan.row_blocks, 1, [&](int64_t begin, int64_t end) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;  // threads have no state of the caller's
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = bounds[i], count = bounds[i + 1] - first;
      Layout rows = layout;
      rows.B = count;
      rows.total_rows = layout.T * count;
      const Tensor hx = forward.hx.defined() ? forward.hx.narrow(0, first, count) : Tensor();
      forward_converted({rows, forward.layer, alone, forward.weights, forward.d, hx},
                        x.narrow(1, first, count), output.narrow(1, first, count));
    }
  });
}

/// T: the type computed in.
template <typename T>
void forward_as(const Layout& layout, const Plan& plan, const Layer& layer, const Tensor& output) {
  const Tensor x = readable(layer.input, layer.input.scalar_type());
  const bool beside = plan.sharing == Sharing::kBeside && plan.input == Maker::kPanels;
  const bool by_rows = plan.row_blocks > 1 && plan.column_blocks == 1 && !layout.packed();
  if (plan.input != Maker::kInStep && !beside && !plan.converts)
    multiply_input<T>(layout, plan, layer, x, output);
  std::vector<WalkWeights<T>> weights;
  std::vector<ForwardWalk<T>> walks;
  std::vector<ForwardArgs<T>> args;
  weights.reserve(layer.directions());  // walks refer to them
  for (int64_t d = 0; d < layer.directions(); ++d) {
    const Tensor hx = layer.hx.defined() ? readable(layer.hx[d], kScalarType<T>) : Tensor();
    weights.emplace_back(plan, layer.cells[d], hx.defined() || layout.total_rows > layout.B);
    walks.push_back({layout, layer, plan, weights[d], d, hx});
    const ForwardWalk<T>& walk = walks.back();
    const Tensor y = narrow_direction(output, d, layer.hidden_size());
    if (beside) return multiply_beside(walk, x, y);
    if (plan.state == Maker::kAten) {
      forward_by_steps(walk, y);
    } else if (plan.converts) {
      if constexpr (std::is_same_v<T, float>)
        (by_rows ? forward_converted_by_rows : forward_converted)(walk, x, y);
    } else {
      args.push_back(walk.args({0, layout.T}, x, y, Tensor()));
    }
  }
  if (!args.empty()) run_walks(layout, plan, args, kernels<T>().forward);
}

/// h_n of direction d: each row's state at its last step in that direction.
void copy_final_state(const Layout& layout, int64_t d, const Tensor& output, const Tensor& h_n) {
  const size_t row_bytes = h_n.size(-1) * h_n.element_size();
  const size_t stride = output.size(-1) * output.element_size();
  const char* y = static_cast<const char*>(output.const_data_ptr()) + d * row_bytes;
  char* out = static_cast<char*>(h_n.mutable_data_ptr()) + d * layout.B * row_bytes;
  int64_t t = layout.T;
  for (int64_t b = 0; b < layout.B; ++b) {
    while (layout.rows(t - 1) <= b) --t;  // t: length of sequence b
    const int64_t row = layout.position(d == 1 ? 0 : t - 1) + b;
    std::memcpy(out + b * row_bytes, y + row * stride, row_bytes);
  }
}

}  // namespace

void layer_forward(const Layout& layout, const Layer& layer, const Tensor& output,
                   const Tensor& h_n) {
  const Plan plan = plan_layer(layer_shape(layout, layer), available_threads());
  with_kernel_type(output.scalar_type(),
                   [&](auto number) { forward_as<decltype(number)>(layout, plan, layer, output); });
  for (int64_t d = 0; d < layer.directions(); ++d) copy_final_state(layout, d, output, h_n);
}

}  // namespace fastrnn::cpu
