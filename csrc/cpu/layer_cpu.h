// SPDX-License-Identifier: Apache-2.0
//
// One layer on the CPU, all its directions: the large products around the recurrence (ATen), its
// threads and its workspaces. The contract is that of Engine.
#pragma once

#include "../layer.h"

namespace fastrnn::cpu {

void layer_forward(const Layout& layout, const Layer& layer, const Tensor& output,
                   const Tensor& h_n);

std::vector<Cell> layer_backward(const Layout& layout, const Layer& layer, const Tensor& output,
                                 const Tensor& grad_output, const Tensor& grad_h_n,
                                 const WantedGradients& wanted);

}  // namespace fastrnn::cpu
