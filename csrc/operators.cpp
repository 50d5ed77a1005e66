// SPDX-License-Identifier: Apache-2.0
//
// What stands between the dispatcher and the engines: the calls of the operators from C++, and the
// body of their kernels.
#include "operators.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/DeviceGuard.h>

namespace fastrnn {

namespace {

/// The caller's tensors as time-major views, and back. Undefined tensors stay undefined.
class TimeMajor {
 public:
  TimeMajor(const Layout& layout, const Tensor& input, bool batch_first)
      : unbatched_(!layout.packed() && input.dim() == 2),
        swaps_(!layout.packed() && !unbatched_ && batch_first) {}

  Tensor of(const Tensor& t) const {
    return !t.defined() ? t : unbatched_ ? t.unsqueeze(1) : swaps_ ? t.transpose(0, 1) : t;
  }
  Tensor back(const Tensor& t) const {
    return !t.defined() ? t : unbatched_ ? t.squeeze(1) : swaps_ ? t.transpose(0, 1) : t;
  }
  /// hx, h_n and their gradients have no time.
  Tensor of_state(const Tensor& t) const { return t.defined() && unbatched_ ? t.unsqueeze(1) : t; }
  Tensor back_state(const Tensor& t) const { return t.defined() && unbatched_ ? t.squeeze(1) : t; }

 private:
  const bool unbatched_, swaps_;
};

Tensor or_undefined(const OptionalTensor& t) { return t.value_or(Tensor()); }

}  // namespace

ForwardResult forward_by(const Engine& engine, const Tensor& input, const OptionalTensor& hx,
                         at::TensorList weights, const OptionalTensor& batch_sizes,
                         const RnnOptions& options, bool keep) {
  const Layout layout = check_forward(input, hx, weights, batch_sizes, options);
  const c10::OptionalDeviceGuard device(input.device());
  const at::AutoDispatchBelowADInplaceOrView guard;  // the results are no views to autograd
  const TimeMajor view(layout, input, options.batch_first);
  auto [output, h_n, layer_outputs] = forward_layers(
      engine, layout, view.of(input), view.of_state(or_undefined(hx)), weights, options, keep);
  return {view.back(output), view.back_state(h_n), std::move(layer_outputs)};
}

BackwardResult backward_by(const Engine& engine, const OptionalTensor& grad_output,
                           const OptionalTensor& grad_h_n, const Tensor& input,
                           const OptionalTensor& hx, at::TensorList weights,
                           const OptionalTensor& batch_sizes, at::TensorList layer_outputs,
                           const RnnOptions& options, const c10::List<bool>& needs) {
  const Layout layout = check_backward(grad_output, grad_h_n, input, hx, weights, batch_sizes,
                                       layer_outputs, options, needs);
  const c10::OptionalDeviceGuard device(input.device());
  const at::AutoDispatchBelowADInplaceOrView guard;
  const TimeMajor view(layout, input, options.batch_first);
  auto [grad_input, grad_hx, grad_weights] = backward_layers(
      engine, layout, view.of(or_undefined(grad_output)), view.of_state(or_undefined(grad_h_n)),
      view.of(input), view.of_state(or_undefined(hx)), weights, layer_outputs, options, needs);
  return {view.back(grad_input), view.back_state(grad_hx), std::move(grad_weights)};
}

std::tuple<Tensor, Tensor> rnn(const Tensor& input, const OptionalTensor& hx,
                               at::TensorList weights, const OptionalTensor& batch_sizes,
                               std::string_view nonlinearity, bool bias, int64_t num_layers,
                               bool bidirectional, bool batch_first) {
  using Signature = std::tuple<Tensor, Tensor>(const Tensor&, const OptionalTensor&, at::TensorList,
                                               const OptionalTensor&, std::string_view, bool,
                                               int64_t, bool, bool);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("fastrnn::rnn", "").typed<Signature>();
  return op.call(input, hx, weights, batch_sizes, nonlinearity, bias, num_layers, bidirectional,
                 batch_first);
}

ForwardResult rnn_forward(const Tensor& input, const OptionalTensor& hx, at::TensorList weights,
                          const OptionalTensor& batch_sizes, const RnnOptions& options, bool keep) {
  using Signature =
      ForwardResult(const Tensor&, const OptionalTensor&, at::TensorList, const OptionalTensor&,
                    std::string_view, bool, int64_t, bool, bool, bool);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("fastrnn::rnn_forward", "").typed<Signature>();
  return op.call(input, hx, weights, batch_sizes, options.nonlinearity, options.bias,
                 options.num_layers, options.bidirectional, keep, options.batch_first);
}

BackwardResult rnn_backward(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                            const Tensor& input, const OptionalTensor& hx, at::TensorList weights,
                            const OptionalTensor& batch_sizes, at::TensorList layer_outputs,
                            const RnnOptions& options, const std::vector<bool>& needs) {
  using Signature =
      BackwardResult(const OptionalTensor&, const OptionalTensor&, const Tensor&,
                     const OptionalTensor&, at::TensorList, const OptionalTensor&, at::TensorList,
                     std::string_view, bool, int64_t, bool, c10::List<bool>, bool);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastrnn::rnn_backward", "")
                             .typed<Signature>();
  c10::List<bool> needs_list;
  for (const bool need : needs) needs_list.push_back(need);
  return op.call(grad_output, grad_h_n, input, hx, weights, batch_sizes, layer_outputs,
                 options.nonlinearity, options.bias, options.num_layers, options.bidirectional,
                 needs_list, options.batch_first);
}

}  // namespace fastrnn
