// SPDX-License-Identifier: Apache-2.0
//
// The kernels of rnn_forward and rnn_backward, for any engine: they check the arguments, and show
// the engine the caller's tensors as time-major views.
#pragma once

#include <torch/library.h>

#include <variant>

#include "layer.h"

namespace fastrnn {

ForwardResult forward_by(const Engine& engine, const Tensor& input, const OptionalTensor& hx,
                         at::TensorList weights, const OptionalTensor& batch_sizes,
                         const RnnOptions& options, bool keep);
BackwardResult backward_by(const Engine& engine, const OptionalTensor& grad_output,
                           const OptionalTensor& grad_h_n, const Tensor& input,
                           const OptionalTensor& hx, at::TensorList weights,
                           const OptionalTensor& batch_sizes, at::TensorList layer_outputs,
                           const RnnOptions& options, const c10::List<bool>& needs);

/// Makes `engine` the kernels of a device. Call: what it keeps while it is in one.
template <const Engine& engine, typename Call = std::monostate>
void register_engine(torch::Library& m) {
  m.impl("rnn_forward",
         [](const Tensor& input, const OptionalTensor& hx, at::TensorList weights,
            const OptionalTensor& batch_sizes, std::string_view nonlinearity, bool bias,
            int64_t num_layers, bool bidirectional, bool keep, bool batch_first) {
           [[maybe_unused]] const Call call{};
           return forward_by(engine, input, hx, weights, batch_sizes,
                             {nonlinearity, bias, num_layers, bidirectional, batch_first}, keep);
         });
  m.impl("rnn_backward",
         [](const OptionalTensor& grad_output, const OptionalTensor& grad_h_n, const Tensor& input,
            const OptionalTensor& hx, at::TensorList weights, const OptionalTensor& batch_sizes,
            at::TensorList layer_outputs, std::string_view nonlinearity, bool bias,
            int64_t num_layers, bool bidirectional, c10::List<bool> needs, bool batch_first) {
           [[maybe_unused]] const Call call{};
           return backward_by(engine, grad_output, grad_h_n, input, hx, weights, batch_sizes,
                              layer_outputs,
                              {nonlinearity, bias, num_layers, bidirectional, batch_first}, needs);
         });
}

}  // namespace fastrnn
