// SPDX-License-Identifier: Apache-2.0
//
// Whether the arguments of a call lie in memory that can be read. The engines take addresses as
// they are: memory may have been given back, and some kinds of tensors never had any.
#pragma once

#include <ATen/EmptyTensor.h>

#include <array>

#include "rnn.h"

namespace fastrnn {

inline constexpr const char* kNoMemory =
    " has no memory, or too little: its storage was resized, as sharded training does with "
    "parameters that are not in use. Give it back its memory before the call.";
inline constexpr const char* kNotAllocated =
    "The tensor has a non-zero number of elements, but its data is not allocated yet: ";

/// Raises unless every element of `t` lies in memory that `t` has now. `name`: the words for it.
template <typename... Name>
void check_memory(const Tensor& t, const Name&... name) {
  if (t.numel() == 0) return;
  TORCH_CHECK(t.has_storage(),
              "Cannot access data pointer of Tensor that doesn't have storage: ", name...,
              " is not an ordinary tensor.");
  const c10::Storage& storage = t.storage();
  TORCH_CHECK(storage.data() != nullptr || storage.nbytes() == 0, kNotAllocated, name...,
              " is not an ordinary tensor.");
  const size_t needed =
      at::detail::computeStorageNbytes(t.sizes(), t.strides(), t.itemsize(), t.storage_offset());
  TORCH_CHECK(needed <= storage.nbytes(), "setStorage: sizes ", t.sizes(), ", strides ",
              t.strides(), ", storage offset ", t.storage_offset(), ", and itemsize ", t.itemsize(),
              " requiring a storage size of ", needed, " are out of bounds for storage of size ",
              storage.nbytes(), ": ", name..., kNoMemory);
}

/// nn.RNN's words for the input are others.
inline void check_input_memory(const Tensor& input) {
  TORCH_CHECK(input.numel() == 0 || !input.has_storage() || input.storage().nbytes() > 0,
              kNotAllocated, "the input", kNoMemory);
  check_memory(input, "the input");
}

/// Looks at what backward reads and nothing else: the rest may be gone. A layer's input and hx are
/// read for the gradients of its weights, W_ih for the gradient of its input.
inline void check_memory_of_backward(const Tensor& input, const OptionalTensor& hx,
                                     at::TensorList weights, at::TensorList layer_outputs,
                                     const RnnOptions& options, const c10::List<bool>& needs) {
  const int64_t D = options.directions(), count = options.weights_per_cell();
  bool below = needs.get(0);  // whether the gradient of this layer's input is needed
  for (int64_t layer = 0; layer < options.num_layers; ++layer) {
    const int64_t first = layer * D * count;
    std::array<bool, 4> wanted{};  // w_ih, w_hh, b_ih, b_hh of any direction
    for (int64_t i = 0; i < D * count; ++i)
      wanted[i % count] = wanted[i % count] || needs.get(2 + first + i);
    if (wanted[0] && layer == 0) check_input_memory(input);
    if (wanted[0] && layer > 0)
      check_memory(layer_outputs[layer - 1], "the output of layer ", layer - 1);
    if (wanted[1] && hx.has_value()) check_memory(*hx, "hx");
    const bool reached = below || needs.get(1) || wanted != std::array<bool, 4>{};
    if (reached) check_memory(layer_outputs[layer], "the output of layer ", layer);
    for (int64_t i = first; i < first + D * count; i += count) {
      if (below) check_memory(weights[i], "weight ", i);
      if (reached) check_memory(weights[i + 1], "weight ", i + 1);
    }
    below = reached;
  }
}

}  // namespace fastrnn
