// SPDX-License-Identifier: Apache-2.0
//
// The C++ face of the operators, and what they share. Device-independent.
//
//   rnn              what users call: autograd around the next two
//   rnn_forward      checks its arguments and computes; one kernel per device
//   rnn_backward     the derivative of rnn_forward, likewise
//   check_arguments  the checks alone
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>

#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

namespace fastrnn {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

/// Whether the operators take tensors of this type.
inline bool is_fused_dtype(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
}

/// What nn.RNN's constructor fixes.
struct RnnOptions {
  std::string_view nonlinearity;  // "tanh" or "relu"
  bool bias = true;
  int64_t num_layers = 1;
  bool bidirectional = false;
  bool batch_first = false;

  int64_t directions() const { return bidirectional ? 2 : 1; }
  int64_t weights_per_cell() const { return bias ? 4 : 2; }
};

/// One layer and direction's parameters: w_ih [H, I], w_hh [H, H], b_ih [H], b_hh [H].
struct Cell {
  Tensor w_ih, w_hh, b_ih, b_hh;  // biases undefined without bias
};

/// The parameters of layer `layer`, direction `direction` in nn.RNN's flat list.
Cell cell_of(at::TensorList weights, const RnnOptions& options, int64_t layer, int64_t direction);

struct Layout;  // layer.h

/// Checks all that an engine relies on in the arguments of rnn_forward. Raises what nn.RNN raises,
/// its wording first, then what to change. `input` is as the user gave it: [T, I], [T, B, I],
/// [B, T, I] with batch_first, or packed data [N, I] with batch_sizes. The layout holds the one
/// copy of batch_sizes: it was checked, and what is written to the tensor later changes nothing.
Layout check_forward(const Tensor& input, const OptionalTensor& hx, at::TensorList weights,
                     const OptionalTensor& batch_sizes, const RnnOptions& options);

/// The same for rnn_backward. Memory that the wanted gradients are not made of may be gone.
Layout check_backward(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                      const Tensor& input, const OptionalTensor& hx, at::TensorList weights,
                      const OptionalTensor& batch_sizes, at::TensorList layer_outputs,
                      const RnnOptions& options, const c10::List<bool>& needs);

/// The checks that a tracer can make, too: no memory is asked for, and of batch_sizes the values
/// are checked only where there are some.
void check_arguments(const Tensor& input, const OptionalTensor& hx, at::TensorList weights,
                     const OptionalTensor& batch_sizes, const RnnOptions& options);

/// A copy for backward to read: nothing would notice that the caller edits the tensor.
OptionalTensor copy_batch_sizes(const OptionalTensor& batch_sizes);

/// output and h_n in the layout of input and hx; layer_outputs: what the L layers wrote, [T, B,
/// D*H] or packed, empty unless `keep`. `output` is then a copy of the last, which a caller may
/// edit.
using ForwardResult = std::tuple<Tensor, Tensor, std::vector<Tensor>>;

/// grad_input, grad_hx, one gradient per weight. Where `needs` says no, the first two are undefined
/// and a weight's has no elements.
using BackwardResult = std::tuple<Tensor, Tensor, std::vector<Tensor>>;

/// The registered operators: calls go through the dispatcher.
std::tuple<Tensor, Tensor> rnn(const Tensor& input, const OptionalTensor& hx,
                               at::TensorList weights, const OptionalTensor& batch_sizes,
                               std::string_view nonlinearity, bool bias, int64_t num_layers,
                               bool bidirectional, bool batch_first);
ForwardResult rnn_forward(const Tensor& input, const OptionalTensor& hx, at::TensorList weights,
                          const OptionalTensor& batch_sizes, const RnnOptions& options, bool keep);
BackwardResult rnn_backward(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                            const Tensor& input, const OptionalTensor& hx, at::TensorList weights,
                            const OptionalTensor& batch_sizes, at::TensorList layer_outputs,
                            const RnnOptions& options, const std::vector<bool>& needs);

}  // namespace fastrnn
