// SPDX-License-Identifier: Apache-2.0
//
// Layers on the CPU. The contract is that of Engine.
#pragma once

#include "../layer.h"

namespace fastrnn::cpu {

void layer_forward(const Layout& layout, const Layer& layer, const Tensor& output,
                   const Tensor& h_n);

std::vector<Cell> layers_backward(const BackwardPass& pass);

}  // namespace fastrnn::cpu
