// SPDX-License-Identifier: Apache-2.0
//
// The CPU kernels of rnn_forward and rnn_backward: allocate, and walk through the layers.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "layer_common.h"

namespace fastrnn {

namespace {

cpu::Activation activation_of(std::string_view nonlinearity) {
  return nonlinearity == "relu" ? cpu::Activation::kRelu : cpu::Activation::kTanh;
}

std::vector<Cell> cells_of(at::TensorList weights, const RnnOptions& options, int64_t layer) {
  std::vector<Cell> cells;
  for (int64_t d = 0; d < options.directions(); ++d)
    cells.push_back(cell_of(weights, options, layer, d));
  return cells;
}

/// Rows [layer * D, (layer + 1) * D) of an [L*D, B, H] tensor, if there is one.
Tensor rows_of_layer(const OptionalTensor& states, const RnnOptions& options, int64_t layer) {
  if (!states.has_value() || !states->defined()) return Tensor();
  if (options.num_layers == 1) return *states;
  return states->narrow(0, layer * options.directions(), options.directions());
}

ForwardResult rnn_forward_cpu(const Tensor& input, const OptionalTensor& hx, at::TensorList weights,
                              const OptionalTensor& batch_sizes, std::string_view nonlinearity,
                              bool bias, int64_t num_layers, bool bidirectional, bool keep) {
  const RnnOptions options{nonlinearity, bias, num_layers, bidirectional};
  const cpu::Layout layout(input, batch_sizes);
  const int64_t D = options.directions(), H = weights[1].size(0);
  auto output_sizes = input.sizes().vec();
  output_sizes.back() = D * H;
  const Tensor h_n = at::empty({num_layers * D, layout.B, H}, input.options());
  std::vector<Tensor> layer_outputs;
  Tensor x = input;
  for (int64_t layer = 0; layer < num_layers; ++layer) {
    const Tensor y = at::empty(output_sizes, input.options());
    cpu::layer_forward(layout, x, rows_of_layer(hx, options, layer),
                       cells_of(weights, options, layer), activation_of(nonlinearity), y,
                       rows_of_layer(h_n, options, layer));
    if (keep) layer_outputs.push_back(y);
    x = y;
  }
  if (!keep) return {x, h_n, std::move(layer_outputs)};
  // The caller may write to the output before backward, which reads it: it gets its own copy.
  const Tensor output = at::empty(output_sizes, input.options());
  cpu::copy_contiguous(x, output);
  return {output, h_n, std::move(layer_outputs)};
}

BackwardResult rnn_backward_cpu(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                                const Tensor& input, const OptionalTensor& hx,
                                at::TensorList weights, const OptionalTensor& batch_sizes,
                                at::TensorList layer_outputs, std::string_view nonlinearity,
                                bool bias, int64_t num_layers, bool bidirectional,
                                c10::List<bool> needs) {
  const RnnOptions options{nonlinearity, bias, num_layers, bidirectional};
  const cpu::Layout layout(input, batch_sizes);
  const int64_t D = options.directions(), H = weights[1].size(0);
  const auto gradient = [&](bool needed, at::IntArrayRef sizes) {
    return at::empty(needed ? sizes : at::IntArrayRef({0}), input.options());
  };
  const auto wanted = [](const Tensor& t, bool needed) { return needed ? t : Tensor(); };
  const Tensor grad_input = gradient(needs.get(0), input.sizes());
  const Tensor grad_hx = gradient(needs.get(1), {num_layers * D, layout.B, H});
  std::vector<Tensor> grad_weights;
  for (size_t i = 0; i < weights.size(); ++i)
    grad_weights.push_back(gradient(needs.get(i + 2), weights[i].sizes()));

  Tensor grad_y = grad_output.value_or(Tensor());
  for (int64_t layer = num_layers - 1; layer >= 0; --layer) {
    cpu::LayerGradients grads;
    for (int64_t d = 0; d < D; ++d) {
      const int64_t first = (layer * D + d) * options.weights_per_cell();
      const auto of = [&](int64_t i) {
        return wanted(grad_weights[first + i], needs.get(first + i + 2));
      };
      grads.cells.push_back({of(0), of(1), bias ? of(2) : Tensor(), bias ? of(3) : Tensor()});
    }
    if (needs.get(1)) grads.hx = rows_of_layer(grad_hx, options, layer);
    if (layer > 0)
      grads.input = at::empty(layer_outputs[layer - 1].sizes(), input.options());
    else
      grads.input = wanted(grad_input, needs.get(0));
    cpu::layer_backward(layout, layer > 0 ? layer_outputs[layer - 1] : input,
                        rows_of_layer(hx, options, layer), cells_of(weights, options, layer),
                        activation_of(nonlinearity), layer_outputs[layer], grad_y,
                        rows_of_layer(grad_h_n, options, layer), grads);
    grad_y = grads.input;
  }
  return {grad_input, grad_hx, std::move(grad_weights)};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastrnn, CPU, m) {
  m.impl("rnn_forward", rnn_forward_cpu);
  m.impl("rnn_backward", rnn_backward_cpu);
}

}  // namespace fastrnn
