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

void check_dtype(const Tensor& input) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      is_fused_dtype(input.scalar_type()), "fastrnn's operators are not implemented for ",
      c10::toString(input.scalar_type()),
      ": call fastrnn.RNN or fastrnn.functional.rnn, which take PyTorch's own path for it.");
}

/// Rows [layer * D, (layer + 1) * D) of an [L*D, B, H] tensor, if there is one.
Tensor rows_of_layer(const OptionalTensor& states, const RnnOptions& options, int64_t layer) {
  if (!states.has_value() || !states->defined()) return Tensor();
  if (options.num_layers == 1) return *states;
  return states->narrow(0, layer * options.directions(), options.directions());
}

/// Layer number `layer` of a call, reading `input`.
cpu::Layer layer_of(const Tensor& input, const OptionalTensor& hx, at::TensorList weights,
                    const RnnOptions& options, int64_t layer) {
  cpu::Layer result{
      input, rows_of_layer(hx, options, layer), {}, activation_of(options.nonlinearity)};
  for (int64_t d = 0; d < options.directions(); ++d)
    result.cells.push_back(cell_of(weights, options, layer, d));
  return result;
}

ForwardResult rnn_forward_cpu(const Tensor& input, const OptionalTensor& hx, at::TensorList weights,
                              const OptionalTensor& batch_sizes, std::string_view nonlinearity,
                              bool bias, int64_t num_layers, bool bidirectional, bool keep) {
  const RnnOptions options{nonlinearity, bias, num_layers, bidirectional};
  check_forward(input, hx, weights, batch_sizes, options);
  check_dtype(input);
  const cpu::Layout layout(input, batch_sizes);
  const int64_t D = options.directions(), H = weights[1].size(0);
  auto output_sizes = input.sizes().vec();
  output_sizes.back() = D * H;
  const Tensor h_n = at::empty({num_layers * D, layout.B, H}, input.options());
  std::vector<Tensor> layer_outputs;
  Tensor x = input;
  for (int64_t layer = 0; layer < num_layers; ++layer) {
    const Tensor y = at::empty(output_sizes, input.options());
    cpu::layer_forward(layout, layer_of(x, hx, weights, options, layer), y,
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

/// The lowest layer that backward has to reach; num_layers if nothing is wanted.
int64_t lowest_layer(const c10::List<bool>& needs, int64_t weights_per_layer) {
  if (needs.get(0) || needs.get(1)) return 0;  // input, or the initial state of every layer
  size_t weight = 2;
  while (weight < needs.size() && !needs.get(weight)) ++weight;
  return static_cast<int64_t>(weight - 2) / weights_per_layer;
}

BackwardResult rnn_backward_cpu(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                                const Tensor& input, const OptionalTensor& hx,
                                at::TensorList weights, const OptionalTensor& batch_sizes,
                                at::TensorList layer_outputs, std::string_view nonlinearity,
                                bool bias, int64_t num_layers, bool bidirectional,
                                c10::List<bool> needs) {
  const RnnOptions options{nonlinearity, bias, num_layers, bidirectional};
  check_backward(grad_output, grad_h_n, input, hx, weights, batch_sizes, layer_outputs, options,
                 needs.size());
  check_dtype(input);
  const cpu::Layout layout(input, batch_sizes);
  const int64_t D = options.directions(), H = weights[1].size(0);
  Tensor grad_input, grad_hx;
  if (needs.get(0)) grad_input = at::empty(input.sizes(), input.options());
  if (needs.get(1)) grad_hx = at::empty({num_layers * D, layout.B, H}, input.options());
  std::vector<Tensor> grad_weights(weights.size());

  const int64_t weights_per_layer = D * options.weights_per_cell();
  const int64_t lowest = lowest_layer(needs, weights_per_layer);
  Tensor grad_y = grad_output.value_or(Tensor());
  for (int64_t layer = num_layers - 1; layer >= lowest; --layer) {
    const int64_t first = layer * weights_per_layer;
    const Tensor& x = layer > 0 ? layer_outputs[layer - 1] : input;
    cpu::WantedGradients wanted;
    wanted.input = layer > lowest ? at::empty(x.sizes(), x.options()) : grad_input;
    wanted.hx = rows_of_layer(grad_hx, options, layer);
    for (int64_t d = 0; d < D; ++d) {
      std::array<bool, 4>& cell = wanted.cells.emplace_back();
      for (int64_t i = 0; i < options.weights_per_cell(); ++i)
        cell[i] = needs.get(2 + first + d * options.weights_per_cell() + i);
    }
    const std::vector<Cell> cells =
        cpu::layer_backward(layout, layer_of(x, hx, weights, options, layer), layer_outputs[layer],
                            grad_y, rows_of_layer(grad_h_n, options, layer), wanted);
    for (int64_t d = 0; d < D; ++d) {
      const std::array<Tensor, 4> tensors{cells[d].w_ih, cells[d].w_hh, cells[d].b_ih,
                                          cells[d].b_hh};
      for (int64_t i = 0; i < options.weights_per_cell(); ++i)
        grad_weights[first + d * options.weights_per_cell() + i] = tensors[i];
    }
    grad_y = wanted.input;
  }
  for (Tensor& gradient : grad_weights)
    if (!gradient.defined()) gradient = at::empty({0}, input.options());
  return {grad_input, grad_hx, std::move(grad_weights)};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastrnn, CPU, m) {
  m.impl("rnn_forward", rnn_forward_cpu);
  m.impl("rnn_backward", rnn_backward_cpu);
}

}  // namespace fastrnn
