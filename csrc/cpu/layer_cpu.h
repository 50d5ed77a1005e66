// SPDX-License-Identifier: Apache-2.0
//
// Layers on the CPU: the recurrence, the large products around it, threads and workspaces. The
// contract is that of Engine.
#pragma once

#include "../layer.h"
#include "dispatch.h"
#include "plan.h"
#include "products.h"

namespace fastrnn::cpu {

/// The type that a layer's kernels read and write, if its tensors are of type `given`.
inline at::ScalarType kernel_type(at::ScalarType given) {
  return given == at::kBFloat16 && has_bfloat16_kernels() ? given : compute_type(given);
}

/// What the plan has to know of the tensors' type.
inline void set_type(LayerShape& shape, at::ScalarType given) {
  const at::ScalarType type = kernel_type(given);
  shape.element_size = static_cast<int64_t>(c10::elementSize(type));
  shape.converts = type != given;
  shape.tile_products = !shape.converts && has_tile_product(given);
  shape.baseline = &capability() == &default_capability();
}

/// Whether `layers` layers, of which the first is `first`, run side by side in forward, because one
/// alone leaves threads idle. `keep`: all their outputs will be kept for backward.
bool runs_side_by_side(const Layout& layout, const Layer& first, int64_t layers, bool keep);
void stack_forward(const Layout& layout, const std::vector<Layer>& layers, at::TensorList outputs,
                   const Tensor& h_n);

void layer_forward(const Layout& layout, const Layer& layer, const Tensor& output,
                   const Tensor& h_n);

std::vector<Cell> layers_backward(const BackwardPass& pass);

}  // namespace fastrnn::cpu
