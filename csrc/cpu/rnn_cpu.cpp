// SPDX-License-Identifier: Apache-2.0
//
// Registers the CPU kernels of rnn_forward and rnn_backward.
#include "../operators.h"
#include "layer_cpu.h"

namespace fastrnn {

namespace {

constexpr Engine kEngine{cpu::layer_forward, cpu::layers_backward, cpu::runs_side_by_side,
                         cpu::stack_forward};

}  // namespace

TORCH_LIBRARY_IMPL(fastrnn, CPU, m) { register_engine<kEngine>(m); }

}  // namespace fastrnn
