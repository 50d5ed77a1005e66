// SPDX-License-Identifier: Apache-2.0
//
// Inside an autocast region the recurrence runs in the region's dtype, as PyTorch's does: float32
// and 16-bit tensors are cast, float64 stays.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "rnn.h"

namespace fastrnn {

namespace {

/// The floating-point arguments of rnn in the region's dtype.
struct CastArguments {
  Tensor input;
  OptionalTensor hx;
  std::vector<Tensor> weights;

  CastArguments(const Tensor& given_input, const OptionalTensor& given_hx,
                at::TensorList given_weights, c10::DeviceType device) {
    const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
    const auto cast = [&](const Tensor& t) { return at::autocast::cached_cast(dtype, t, device); };
    input = cast(given_input);
    if (given_hx.has_value()) hx = cast(*given_hx);
    weights.reserve(given_weights.size());
    for (const Tensor& w : given_weights) weights.push_back(cast(w));
    // Integers and float64 stay as they are, and nn.RNN's matrix product fails.
    TORCH_CHECK(
        weights.empty() || input.scalar_type() == weights[0].scalar_type(),
        "mat1 and mat2 must have the same dtype, but got ", c10::toString(input.scalar_type()),
        " and ", c10::toString(weights[0].scalar_type()),
        ". Autocast converts float32 and 16-bit tensors only: the input is ",
        c10::toString(given_input.scalar_type()), ", the weights are ",
        c10::toString(given_weights[0].scalar_type()), ". Convert the input to their dtype.");
  }
};

template <c10::DispatchKey key, c10::DeviceType device>
std::tuple<Tensor, Tensor> rnn_autocast(const Tensor& input, const OptionalTensor& hx,
                                        at::TensorList weights, const OptionalTensor& batch_sizes,
                                        std::string_view nonlinearity, bool bias,
                                        int64_t num_layers, bool bidirectional, bool batch_first) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  const CastArguments cast(input, hx, weights, device);
  return rnn(cast.input, cast.hx, cast.weights, batch_sizes, nonlinearity, bias, num_layers,
             bidirectional, batch_first);
}

template <c10::DispatchKey key, c10::DeviceType device>
void check_autocast(const Tensor& input, const OptionalTensor& hx, at::TensorList weights,
                    const OptionalTensor& batch_sizes, std::string_view nonlinearity, bool bias,
                    int64_t num_layers, bool bidirectional, bool batch_first) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  const CastArguments cast(input, hx, weights, device);
  check_arguments(cast.input, cast.hx, cast.weights, batch_sizes,
                  {nonlinearity, bias, num_layers, bidirectional, batch_first});
}

template <c10::DispatchKey key, c10::DeviceType device>
void register_for(torch::Library& m) {
  m.impl("rnn", rnn_autocast<key, device>);
  m.impl("check_arguments", check_autocast<key, device>);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastrnn, AutocastCPU, m) {
  register_for<c10::DispatchKey::AutocastCPU, c10::kCPU>(m);
}

TORCH_LIBRARY_IMPL(fastrnn, AutocastCUDA, m) {
  register_for<c10::DispatchKey::AutocastCUDA, c10::kCUDA>(m);
}

}  // namespace fastrnn
