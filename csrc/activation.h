// SPDX-License-Identifier: Apache-2.0
//
// Torch-free.
#pragma once

namespace fastrnn {

/// What nn.RNN calls its nonlinearity.
enum class Activation { kTanh, kRelu };

}  // namespace fastrnn
