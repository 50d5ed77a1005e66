// SPDX-License-Identifier: Apache-2.0
//
// Every operator schema, nothing else. Kernels register themselves where they are written:
// check.cpp, autograd.cpp, autocast.cpp, cpu/engine.cpp, cuda/engine.cpp.
#include <torch/library.h>

TORCH_LIBRARY(fastrnn, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "rnn(Tensor input, Tensor? hx, Tensor[] weights, Tensor? batch_sizes, str nonlinearity, "
      "bool bias, int num_layers, bool bidirectional, bool batch_first) "
      "-> (Tensor output, Tensor h_n)",
      tags);
  m.def(
      "check_arguments(Tensor input, Tensor? hx, Tensor[] weights, Tensor? batch_sizes, "
      "str nonlinearity, bool bias, int num_layers, bool bidirectional, bool batch_first) -> ()",
      tags);
  m.def(
      "rnn_forward(Tensor input, Tensor? hx, Tensor[] weights, Tensor? batch_sizes, "
      "str nonlinearity, bool bias, int num_layers, bool bidirectional, bool keep, "
      "bool batch_first=False) "
      "-> (Tensor output, Tensor h_n, Tensor[] layer_outputs)",
      tags);
  m.def(
      "rnn_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor input, Tensor? hx, "
      "Tensor[] weights, Tensor? batch_sizes, Tensor[] layer_outputs, str nonlinearity, "
      "bool bias, int num_layers, bool bidirectional, bool[] needs, bool batch_first=False) "
      "-> (Tensor grad_input, Tensor grad_hx, Tensor[] grad_weights)",
      tags);
}
