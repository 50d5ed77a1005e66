// SPDX-License-Identifier: Apache-2.0
//
// Registers the CPU kernels of rnn_forward and rnn_backward.
#include "engine.h"

#include "../operators.h"

namespace fastrnn {

namespace {

constexpr Engine kEngine{cpu::layer_forward, cpu::layers_backward, /*stacks=*/true};

}  // namespace

TORCH_LIBRARY_IMPL(fastrnn, CPU, m) { register_engine<kEngine>(m); }

}  // namespace fastrnn
