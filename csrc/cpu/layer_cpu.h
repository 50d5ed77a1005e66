// SPDX-License-Identifier: Apache-2.0
//
// Layers on the CPU: the large products around the recurrence (ATen), its
// threads and its workspaces. The contract is that of Engine.
#pragma once

#include "../layer.h"
#include "dispatch.h"

namespace fastrnn::cpu {

/// The type that a layer's kernels read and write, if its tensors are of type `given`.
inline at::ScalarType kernel_type(at::ScalarType given) {
  return given == at::kBFloat16 && has_bfloat16_kernels() ? given : compute_type(given);
}

/// Whether `layers` layers, of which the first is `first`, run side by side in forward, because one
/// alone leaves threads idle. `keep`: all their outputs will be kept for backward.
bool runs_side_by_side(const Layout& layout, const Layer& first, int64_t layers, bool keep);
void stack_forward(const Layout& layout, const std::vector<Layer>& layers, at::TensorList outputs,
                   const Tensor& h_n);

/// Layers of one direction, chunk by chunk.
std::vector<Cell> stack_backward(const Layout& layout, const std::vector<Layer>& layers,
                                 at::TensorList outputs, const Tensor& grad_output,
                                 const Tensor& grad_h_n,
                                 const std::vector<WantedGradients>& wanted);

void layer_forward(const Layout& layout, const Layer& layer, const Tensor& output,
                   const Tensor& h_n);

/// Of both directions.
std::vector<Cell> layer_backward(const Layout& layout, const Layer& layer, const Tensor& output,
                                 const Tensor& grad_output, const Tensor& grad_h_n,
                                 const WantedGradients& wanted);

}  // namespace fastrnn::cpu
