// SPDX-License-Identifier: Apache-2.0
//
// Inside an autocast region the recurrence runs in the region's dtype, as PyTorch's does: float32
// and 16-bit tensors are cast, float64 stays.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "rnn.h"

namespace fastrnn {

namespace {

template <c10::DispatchKey key, c10::DeviceType device>
std::tuple<Tensor, Tensor> rnn_autocast(const Tensor& input, const OptionalTensor& hx,
                                        at::TensorList weights, const OptionalTensor& batch_sizes,
                                        std::string_view nonlinearity, bool bias,
                                        int64_t num_layers, bool bidirectional, bool batch_first) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
  const auto cast = [dtype](const Tensor& t) {
    return at::autocast::cached_cast(dtype, t, device);
  };
  const Tensor cast_input = cast(input);
  std::vector<Tensor> cast_weights;
  cast_weights.reserve(weights.size());
  for (const Tensor& w : weights) cast_weights.push_back(cast(w));
  // Integers and float64 stay as they are, and nn.RNN's matrix product fails.
  TORCH_CHECK(weights.empty() || cast_input.scalar_type() == cast_weights[0].scalar_type(),
              "mat1 and mat2 must have the same dtype, but got ",
              c10::toString(cast_input.scalar_type()), " and ",
              c10::toString(cast_weights[0].scalar_type()),
              ". Autocast converts float32 and 16-bit tensors only: the input is ",
              c10::toString(input.scalar_type()), ", the weights are ",
              c10::toString(weights[0].scalar_type()), ". Convert the input to their dtype.");
  return rnn(cast_input, hx.has_value() ? OptionalTensor(cast(*hx)) : hx, cast_weights, batch_sizes,
             nonlinearity, bias, num_layers, bidirectional, batch_first);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastrnn, AutocastCPU, m) {
  m.impl("rnn", rnn_autocast<c10::DispatchKey::AutocastCPU, c10::kCPU>);
}

TORCH_LIBRARY_IMPL(fastrnn, AutocastCUDA, m) {
  m.impl("rnn", rnn_autocast<c10::DispatchKey::AutocastCUDA, c10::kCUDA>);
}

}  // namespace fastrnn
