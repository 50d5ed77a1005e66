// SPDX-License-Identifier: Apache-2.0
//
// Allocates, and walks through the layers of a call; an engine does each of them.
#include "layer.h"

#include <ATen/ops/empty.h>

namespace fastrnn {

Layout::Layout(std::vector<int64_t> rows_of_steps) : batch_sizes(std::move(rows_of_steps)) {
  T = static_cast<int64_t>(batch_sizes.size());
  B = batch_sizes[0];
  first_row.assign(T + 1, 0);
  for (int64_t t = 0; t < T; ++t) first_row[t + 1] = first_row[t] + batch_sizes[t];
  total_rows = first_row[T];
}

namespace {

Activation activation_of(std::string_view nonlinearity) {
  return nonlinearity == "relu" ? Activation::kRelu : Activation::kTanh;
}

/// The states of `count` layers, from `first`, in an [L*D, B, H] tensor, if there is one.
Tensor rows_of_layers(const OptionalTensor& states, const RnnOptions& options, int64_t first,
                      int64_t count) {
  if (!states.has_value() || !states->defined()) return Tensor();
  if (options.num_layers == count) return *states;
  return states->narrow(0, first * options.directions(), count * options.directions());
}
Tensor rows_of_layer(const OptionalTensor& states, const RnnOptions& options, int64_t layer) {
  return rows_of_layers(states, options, layer, 1);
}

/// Layer number `layer` of a call, reading `input`.
Layer layer_of(const Tensor& input, const OptionalTensor& hx, at::TensorList weights,
               const RnnOptions& options, int64_t layer) {
  Layer result{input, rows_of_layer(hx, options, layer), {}, activation_of(options.nonlinearity)};
  for (int64_t d = 0; d < options.directions(); ++d)
    result.cells.push_back(cell_of(weights, options, layer, d));
  return result;
}

/// The lowest layer that backward has to reach; num_layers if nothing is wanted.
int64_t lowest_layer(const c10::List<bool>& needs, int64_t weights_per_layer) {
  if (needs.get(0) || needs.get(1)) return 0;  // input, or the initial state of every layer
  size_t weight = 2;
  while (weight < needs.size() && !needs.get(weight)) ++weight;
  return static_cast<int64_t>(weight - 2) / weights_per_layer;
}

/// The place of a cell's w_ih among all weights.
int64_t first_weight(const RnnOptions& options, int64_t layer, int64_t direction) {
  return (layer * options.directions() + direction) * options.weights_per_cell();
}

/// What is wanted of a layer, but for its input's gradient.
WantedGradients wanted_of_layer(const c10::List<bool>& needs, const Tensor& grad_hx,
                                const RnnOptions& options, int64_t layer) {
  WantedGradients wanted;
  wanted.hx = rows_of_layer(grad_hx, options, layer);
  for (int64_t d = 0; d < options.directions(); ++d) {
    std::array<bool, 4>& cell = wanted.cells.emplace_back();
    for (int64_t i = 0; i < options.weights_per_cell(); ++i)
      cell[i] = needs.get(2 + first_weight(options, layer, d) + i);
  }
  return wanted;
}

void put_gradients(std::vector<Tensor>& grad_weights, const Cell& cell, const RnnOptions& options,
                   int64_t layer, int64_t direction) {
  const std::array<Tensor, 4> tensors{cell.w_ih, cell.w_hh, cell.b_ih, cell.b_hh};
  for (int64_t i = 0; i < options.weights_per_cell(); ++i)
    grad_weights[first_weight(options, layer, direction) + i] = tensors[i];
}

/// Nanoseconds of forward through all layers, about.
int64_t expected_time(const Layout& layout, const RnnOptions& options, int64_t I, int64_t H) {
  constexpr int64_t kMultiplyAdds = 25;  // in a nanosecond
  const int64_t D = options.directions();
  const int64_t features = I + H + (options.num_layers - 1) * (D * H + H);
  return layout.total_rows * D * H * features / kMultiplyAdds;
}

}  // namespace

ForwardResult forward_layers(const Engine& engine, const Layout& layout, const Tensor& input,
                             const OptionalTensor& hx, at::TensorList weights,
                             const RnnOptions& options, bool keep) {
  const int64_t D = options.directions(), H = weights[1].size(0);
  pool.expected = expected_time(layout, options, input.size(-1), H);
  auto output_sizes = input.sizes().vec();
  output_sizes.back() = D * H;
  const Tensor h_n = at::empty({options.num_layers * D, layout.B, H}, input.options());
  std::vector<Tensor> layer_outputs;
  Tensor x = input;
  for (int64_t layer = 0; layer < options.num_layers; ++layer) {
    const Tensor y = at::empty(output_sizes, input.options());
    engine.layer_forward(layout, layer_of(x, hx, weights, options, layer), y,
                         rows_of_layer(h_n, options, layer));
    if (keep) layer_outputs.push_back(y);
    x = y;
  }
  if (!keep) return {x, h_n, {}};
  // The caller may write to the output before backward, which reads it: it gets its own copy.
  const Tensor output = at::empty(output_sizes, input.options());
  copy_contiguous(x, output);
  return {output, h_n, std::move(layer_outputs)};
}

BackwardResult backward_layers(const Engine& engine, const Layout& layout,
                               const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                               const Tensor& input, const OptionalTensor& hx,
                               at::TensorList weights, at::TensorList layer_outputs,
                               const RnnOptions& options, const c10::List<bool>& needs) {
  const int64_t D = options.directions(), H = weights[1].size(0);
  pool.expected = 2 * expected_time(layout, options, input.size(-1), H);
  Tensor grad_input, grad_hx;
  if (needs.get(0)) grad_input = at::empty(input.sizes(), input.options());
  if (needs.get(1)) grad_hx = at::empty({options.num_layers * D, layout.B, H}, input.options());
  std::vector<Tensor> grad_weights(weights.size());

  const int64_t lowest = lowest_layer(needs, D * options.weights_per_cell());
  const int64_t count = options.num_layers - lowest;
  const int64_t together = D == 1 && engine.stacks ? count : 1;
  Tensor grad_y = grad_output.value_or(Tensor());
  for (int64_t top = options.num_layers; top > lowest; top -= together) {
    const int64_t first = top - together;
    BackwardPass pass{layout};
    for (int64_t layer = first; layer < top; ++layer) {
      const Tensor& below = layer > 0 ? layer_outputs[layer - 1] : input;
      pass.layers.push_back(layer_of(below, hx, weights, options, layer));
      pass.outputs.push_back(layer_outputs[layer]);
      pass.wanted.push_back(wanted_of_layer(needs, grad_hx, options, layer));
    }
    const Tensor& x = pass.layers[0].input;
    pass.wanted[0].input = first > lowest ? at::empty(x.sizes(), x.options()) : grad_input;
    pass.grad_output = grad_y;
    pass.grad_h_n = rows_of_layers(grad_h_n, options, first, together);
    const std::vector<Cell> cells = engine.layers_backward(pass);
    for (int64_t i = 0; i < together * D; ++i)
      put_gradients(grad_weights, cells[i], options, first + i / D, i % D);
    grad_y = pass.wanted[0].input;
  }
  for (Tensor& gradient : grad_weights)
    if (!gradient.defined()) gradient = at::empty({0}, input.options());
  return {grad_input, grad_hx, std::move(grad_weights)};
}

}  // namespace fastrnn
