// SPDX-License-Identifier: Apache-2.0
//
// Forward of layers: the input's product, then the walk, as a whole, by steps, converted from 16
// bits a few steps at a time, or as a pipeline of layers.
#include <ATen/ops/empty.h>

#include <cstring>
#include <optional>

#include "layer_common.h"
#include "pipeline.h"

namespace fastrnn::cpu {

namespace {

/// One direction's weights, ready for a recurrence in T.
template <typename T>
struct PreparedCell {
  Activation activation;
  bool reads_input;    // x in the step
  Tensor w_ih, w_hh;   // [H, I], [H, H]; in T and with adjacent columns if the plan does not pack
  bool as_is = false;  // w_ih and w_hh are what the kernels read
  Panels<T> w_ih_panels, w_hh_panels;  // where the plan packs and a row reads them
  std::vector<Sum<T>> bias;            // b_ih + b_hh, [padded H], or empty; a tensor costs more

  PreparedCell(const Layer& layer, int64_t d, const Plan& plan, bool reads_state)
      : activation(layer.activation),
        reads_input(plan.fuse_input),
        w_ih(layer.cells[d].w_ih),
        w_hh(layer.cells[d].w_hh) {
    const at::ScalarType type = kScalarType<T>;
    const Cell& cell = layer.cells[d];
    const int64_t H = w_hh.size(0);
    if (plan.pack_weights || plan.step_products) {
      if (reads_state && !plan.step_products) w_hh_panels = Panels<T>(w_hh, /*transposed=*/true);
    } else {
      as_is = true;
      if (reads_input) w_ih = readable(w_ih, type);
      w_hh = readable(w_hh, type);
    }
    if (plan.pack_input_weights) w_ih_panels = Panels<T>(w_ih, /*transposed=*/true);
    if (!cell.b_ih.defined()) return;
    constexpr at::ScalarType sum_type = kScalarType<Sum<T>>;
    const Tensor b_ih = readable(cell.b_ih, sum_type), b_hh = readable(cell.b_hh, sum_type);
    const Sum<T>*ih = data_of<Sum<T>>(b_ih), *hh = data_of<Sum<T>>(b_hh);
    bias.resize(kernels<T>().padded_columns(H));
    for (int64_t j = 0; j < H; ++j) bias[j] = ih[j] + hh[j];
  }

  /// The kernel's arguments as far as the layer decides them.
  ForwardArgs<T> args() const {
    ForwardArgs<T> a;
    a.activation = activation;
    a.I = w_ih.size(1);
    a.H = w_hh.size(0);
    a.w_ih_panels = w_ih_panels.data();
    a.w_hh_panels = w_hh_panels.data();
    if (as_is) {
      a.w_hh = matrix_of<T>(w_hh);
      a.w_ih = matrix_of<T>(w_ih);
    }
    if (!bias.empty()) a.bias = bias.data();
    return a;
  }
};

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
  share(vectors, 1, run, plan.parallel);
}

/// x W_ih^T, written where the outputs will be. Packed weights read an x of any strides.
template <typename T>
void multiply_input(const Layout& layout, const Plan& plan, const Layer& layer, const Tensor& x,
                    const Tensor& output) {
  const int64_t H = layer.hidden_size();
  const bool packs = plan.own_products && !plan.own_input_product;
  const Tensor rows = packs ? Tensor() : as_rows(x);
  for (int64_t d = 0; d < layer.directions(); ++d) {
    const Tensor& w_ih = layer.cells[d].w_ih;
    if (packs) {
      multiply_steps(layout, {0, layout.T}, sequence_of<const T>(layout, x, 0, 0),
                     Panels<T>(w_ih, /*transposed=*/true).product(),
                     sequence_of<T>(layout, output, 0, d * H), plan.parallel);
      continue;
    }
    const Tensor target = as_rows(narrow_direction(output, d, H));
    if (plan.own_input_product)
      multiply_few_rows<T>(plan, rows, w_ih, target);
    else
      multiply(rows, w_ih.t(), target);
  }
}

/// The recurrence's arguments for direction d and the steps `range`: all, or in one direction those
/// that follow after the ones that have been run. Tensors of type T: the outputs are the workspace.
template <typename T>
ForwardArgs<T> forward_args(const Layout& layout, int64_t d, const PreparedCell<T>& cell,
                            const Tensor& x, const Tensor& hx, Range range, const Tensor& output) {
  ForwardArgs<T> a = cell.args();
  const int64_t carry_rows = range.begin == 0 ? 0 : layout.rows(range.begin - 1);
  a.steps = steps_of(layout, range.begin, range.end, /*descending=*/d == 1, carry_rows);
  if (cell.reads_input) a.x = sequence_of<const T>(layout, x, 0, 0);
  a.y = sequence_of<T>(layout, output, 0, d * a.H);
  if (carry_rows > 0) a.carry = {data_of<T>(output) + layout.position(range.begin - 1) * a.H, a.H};
  if (hx.defined()) a.hx = matrix_of<T>(hx[d]);
  return a;
}

/// Directions run side by side.
template <typename T>
void forward_native(const Layout& layout, const Plan& plan, const Layer& layer,
                    const std::vector<PreparedCell<T>>& cells, const Tensor& x,
                    const Tensor& output) {
  const Tensor hx = readable(layer.hx, output.scalar_type());
  std::vector<ForwardArgs<T>> args;
  for (int64_t d = 0; d < layer.directions(); ++d)
    args.push_back(forward_args<T>(layout, d, cells[d], x, hx, {0, layout.T}, output));
  run_parts(layout, plan, args, kernels<T>().forward);
}

/// Few rows of a large layer with the kernels for any processor, or 16-bit products in tiles (AMX);
/// direction d; output holds x W_ih^T:
///   y_t = f( y_t + h_{t-1} W_hh^T + bias ),  the product by ATen
template <typename T>
void forward_by_steps(const Layout& layout, const Plan& plan, const Layer& layer, int64_t d,
                      const PreparedCell<T>& cell, const Tensor& output) {
  const Tensor y = narrow_direction(output, d, layer.hidden_size()), w = cell.w_hh.t();
  Tensor h = layer.hx.defined() ? layer.hx[d] : Tensor();
  for (int64_t i = 0; i < layout.T; ++i) {
    const int64_t t = d == 1 ? layout.T - 1 - i : i;
    const Tensor y_t = y.narrow(0, t, 1);
    if (h.defined()) multiply(h, w, y_t[0], /*accumulate=*/true);
    ForwardArgs<T> a = cell.args();
    a.steps = steps_of(layout, t, t + 1, false, 0);
    a.y = sequence_of<T>(layout, y_t, t, 0);
    run_parts(layout, plan, std::vector{a}, kernels<T>().forward);
    h = y_t[0];
  }
}

/// 16-bit tensors, direction d: a few steps at a time are converted to float32 and back; the state
/// stays in float32.
void forward_converted(const Layout& layout, const Plan& plan, const Layer& layer, int64_t d,
                       const PreparedCell<float>& cell, const Tensor& x, const Tensor& output) {
  const int64_t H = layer.hidden_size();
  const bool reverse = d == 1;
  const Range all{0, layout.T};
  const Tensor hx = layer.hx.defined() ? readable(layer.hx[d], at::kFloat) : Tensor();
  Tensor carry;
  int64_t carry_rows = 0;
  for (int64_t i = 0; i < parts_in(all, plan.convert_steps); ++i) {
    const Range range = part_of(all, plan.convert_steps, i, reverse);
    const Tensor target = narrow_direction(narrow_steps(layout, output, range), d, H);
    ForwardArgs<float> a = cell.args();
    Tensor x_part, y;
    if (cell.reads_input) {
      x_part = readable(narrow_steps(layout, x, range), at::kFloat);
      a.x = sequence_of<const float>(layout, x_part, range.begin, 0);
      y = at::empty(target.sizes(), x_part.options());
    } else {
      y = readable(target, at::kFloat);
    }
    a.steps = steps_of(layout, range.begin, range.end, reverse, carry_rows);
    a.y = sequence_of<float>(layout, y, range.begin, 0);
    a.carry = matrix_of<float>(carry);
    a.hx = matrix_of<float>(hx);
    run_parts(layout, plan, std::vector{a}, kernels<float>().forward);
    copy(y, target);
    const int64_t last = reverse ? range.begin : range.end - 1;
    carry_rows = layout.rows(last);
    const int64_t first_row = layout.offset(last) - layout.offset(range.begin);
    carry = converted(y.view({-1, H}).narrow(0, first_row, carry_rows), at::kFloat);
  }
}

/// The same by blocks of rows: each thread converts what it computes.
void forward_converted_by_rows(const Layout& layout, const Plan& plan, const Layer& layer,
                               int64_t d, const PreparedCell<float>& cell, const Tensor& x,
                               const Tensor& output) {
  const std::vector<int64_t> bounds = row_bounds(layout, {0, layout.T}, plan.row_blocks);
  Plan alone = plan;
  alone.row_blocks = 1;
  run_with_operators(plan.row_blocks, [&](int64_t i) {
    const Range rows{bounds[i], bounds[i + 1]};
    Layer part = layer;
    part.hx = narrow_rows(layer.hx, rows);
    forward_converted(narrow_layout(layout, rows), alone, part, d, cell, narrow_rows(x, rows),
                      narrow_rows(output, rows));
  });
}

/// Layers of one direction, or one, as a pipeline: a layer's product with its input, by parts of
/// the sequence, and its walk through them are stages, each of which has a weight of its own.
template <typename T>
void stack_forward_as(const Layout& layout, const std::vector<Layer>& layers,
                      at::TensorList outputs, const StackPlan& stack) {
  enum Task { kMultiply, kWalk };
  const int64_t count = static_cast<int64_t>(layers.size());
  const Tensor x = readable(layers[0].input, layers[0].input.scalar_type());
  const Plan first = plan_layer(layer_shape(layout, layers[0]), available_threads());
  if (!first.fuse_input && !stack.multiplies_first)
    multiply_input<T>(layout, first, layers[0], x, outputs[0]);
  std::vector<Plan> plans;
  std::vector<Tensor> hx;
  std::vector<Stage> stages;
  for (int64_t l = 0; l < count; ++l) {
    const Layer& layer = layers[l];
    const Plan& plan = plans.emplace_back(plan_layer(layer_shape(layout, layer), /*threads=*/1));
    TORCH_INTERNAL_ASSERT(!plan.step_products && !plan.converts);
    hx.push_back(readable(layer.hx, x.scalar_type()));
    const int64_t I = layer.input.size(-1), H = layer.hidden_size();
    // A step of one row takes twice as long as a row of a product.
    if (!plan.fuse_input && (l > 0 || stack.multiplies_first))
      stages.push_back({l, kMultiply, I, static_cast<int64_t>(stages.size()) - 1});
    stages.push_back(
        {l, kWalk, 2 * H + (plan.fuse_input ? I : 0), static_cast<int64_t>(stages.size()) - 1});
  }
  divide(stages, stack.threads);
  // The calling thread gets the last ones: backward begins with it there.
  for (Stage& stage : stages) stage.thread = stack.threads - 1 - stage.thread;
  std::vector<Panels<T>> w_ih(count);
  std::vector<std::optional<PreparedCell<T>>> cells(count);
  const auto prepare = [&](const Stage& stage) {
    const int64_t l = stage.layer;
    if (stage.task == kMultiply)
      w_ih[l] = Panels<T>(layers[l].cells[0].w_ih, /*transposed=*/true);
    else
      cells[l].emplace(layers[l], 0, plans[l], /*reads_state=*/true);
  };
  const std::vector<Range> parts = growing_parts(layout.T, stack.first_steps, stack.steps);
  const auto run = [&](const Stage& stage, int64_t part) {
    const int64_t l = stage.layer;
    const Tensor& input = l > 0 ? layers[l].input : x;
    if (stage.task == kMultiply)
      return multiply_steps(layout, parts[part], sequence_of<const T>(layout, input, 0, 0),
                            w_ih[l].product(), sequence_of<T>(layout, outputs[l], 0, 0),
                            /*parallel=*/false);
    ForwardArgs<T> a = forward_args<T>(layout, 0, *cells[l], input, hx[l], parts[part], outputs[l]);
    a.row_end = layout.B;
    kernels<T>().forward(a);
  };
  run_pipeline(stages, static_cast<int64_t>(parts.size()), stack.threads, prepare, run);
}

/// T: the type computed in.
template <typename T>
void forward_as(const Layout& layout, const Layer& layer, const Tensor& output) {
  const LayerShape shape = layer_shape(layout, layer);
  const Plan plan = plan_layer(shape, available_threads());
  if (plan.parallel) {  // else there is too little work for two parts
    const StackPlan alone = plan_stack(shape, /*layers=*/1, available_threads());
    if (alone.threads > 1) return stack_forward_as<T>(layout, {layer}, {output}, alone);
  }
  const bool reads_state = shape.state_rows > 0;
  const Tensor x = readable(layer.input, layer.input.scalar_type());
  const int64_t D = layer.directions();
  if (!plan.fuse_input) multiply_input<T>(layout, plan, layer, x, output);
  std::vector<PreparedCell<T>> cells;
  cells.reserve(D);
  for (int64_t d = 0; d < D; ++d) cells.emplace_back(layer, d, plan, reads_state);
  if (!plan.step_products && !plan.converts)
    return forward_native<T>(layout, plan, layer, cells, x, output);
  const bool by_rows =
      plan.fuse_input && plan.row_blocks > 1 && plan.column_blocks == 1 && !layout.packed();
  for (int64_t d = 0; d < D; ++d) {
    if (plan.step_products)
      forward_by_steps<T>(layout, plan, layer, d, cells[d], output);
    else if constexpr (std::is_same_v<T, float>)
      (by_rows ? forward_converted_by_rows : forward_converted)(layout, plan, layer, d, cells[d], x,
                                                                output);
  }
}

StackPlan stack_plan(const Layout& layout, const Layer& first, int64_t layers) {
  return plan_stack(layer_shape(layout, first), layers, available_threads());
}

}  // namespace

bool runs_side_by_side(const Layout& layout, const Layer& first, int64_t layers, bool keep) {
  // Else one output is in memory beside the one before.
  constexpr int64_t kOutputBytes = 16 << 20;
  const int64_t row_bytes = first.hidden_size() * first.input.element_size();
  if (!keep && layers * layout.total_rows * row_bytes > kOutputBytes) return false;
  return stack_plan(layout, first, layers).threads > 1;
}

void stack_forward(const Layout& layout, const std::vector<Layer>& layers, at::TensorList outputs,
                   const Tensor& h_n) {
  const StackPlan stack = stack_plan(layout, layers[0], layers.size());
  with_kernel_type(outputs[0].scalar_type(), [&](auto number) {
    stack_forward_as<decltype(number)>(layout, layers, outputs, stack);
  });
  for (size_t l = 0; l < layers.size(); ++l)
    copy_final_state(layout, 0, outputs[l], h_n.narrow(0, l, 1));
}

void layer_forward(const Layout& layout, const Layer& layer, const Tensor& output,
                   const Tensor& h_n) {
  with_kernel_type(output.scalar_type(),
                   [&](auto number) { forward_as<decltype(number)>(layout, layer, output); });
  for (int64_t d = 0; d < layer.directions(); ++d) copy_final_state(layout, d, output, h_n);
}

}  // namespace fastrnn::cpu
