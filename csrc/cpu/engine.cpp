// SPDX-License-Identifier: Apache-2.0
//
// Registers the CPU kernels of rnn_forward and rnn_backward.
#include "engine.h"

#include <torch/library.h>

namespace fastrnn {

namespace {

constexpr Engine kEngine{cpu::layer_forward, cpu::layers_backward, /*stacks=*/true};

ForwardResult rnn_forward_cpu(const Tensor& input, const OptionalTensor& hx, at::TensorList weights,
                              const OptionalTensor& batch_sizes, std::string_view nonlinearity,
                              bool bias, int64_t num_layers, bool bidirectional, bool keep) {
  const RnnOptions options{nonlinearity, bias, num_layers, bidirectional};
  return forward_layers(kEngine, input, hx, weights, batch_sizes, options, keep);
}

BackwardResult rnn_backward_cpu(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                                const Tensor& input, const OptionalTensor& hx,
                                at::TensorList weights, const OptionalTensor& batch_sizes,
                                at::TensorList layer_outputs, std::string_view nonlinearity,
                                bool bias, int64_t num_layers, bool bidirectional,
                                c10::List<bool> needs) {
  const RnnOptions options{nonlinearity, bias, num_layers, bidirectional};
  return backward_layers(kEngine, grad_output, grad_h_n, input, hx, weights, batch_sizes,
                         layer_outputs, options, needs);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastrnn, CPU, m) {
  m.impl("rnn_forward", rnn_forward_cpu);
  m.impl("rnn_backward", rnn_backward_cpu);
}

}  // namespace fastrnn
