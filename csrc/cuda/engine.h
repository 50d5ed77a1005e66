// SPDX-License-Identifier: Apache-2.0
//
// One layer on a GPU, all its directions; the contract is that of Engine. Everything is enqueued on
// the current stream and nothing waits for it. Includes no CUDA header: what depends on CUDA's
// libraries is in engine.cpp, cublas.cpp and launch.cuh, so that tests run the rest on the
// emulator of tests/cuda_host.
#pragma once

#include "../layer.h"
#include "kernels/recurrence.h"
#include "plan.h"

namespace fastrnn::cuda {

void layer_forward(const Layout& layout, const Layer& layer, const Tensor& output,
                   const Tensor& h_n);

std::vector<Cell> layers_backward(const BackwardPass& pass);

/// Whether there are kernels for this GPU: those of compute capability 8.0 or above.
bool runs_on(int device);

/// Throws what a kernel's function returned, if it says that something went wrong.
inline void check_launch(const char* error) {
  TORCH_CHECK(error == nullptr, "fastrnn: CUDA error: ", error);
}

/// Of the current device.
Stream current_stream();
Gpu current_gpu();

}  // namespace fastrnn::cuda
