// SPDX-License-Identifier: Apache-2.0
//
// Registers the CUDA kernels of rnn_forward and rnn_backward, and asks CUDA what
// the rest of this folder needs to know.
#include "engine.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>

#include "../operators.h"
#include "call_offsets.h"

namespace fastrnn {

namespace cuda {

namespace {

int attribute_of(int device, cudaDeviceAttr attribute) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

}  // namespace

bool runs_on(int device) { return attribute_of(device, cudaDevAttrComputeCapabilityMajor) >= 8; }

Stream current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

Gpu current_gpu() {
  const int device = c10::cuda::current_device();
  Gpu gpu;
  gpu.major = attribute_of(device, cudaDevAttrComputeCapabilityMajor);
  gpu.multiprocessors = attribute_of(device, cudaDevAttrMultiProcessorCount);
  gpu.shared_bytes = attribute_of(device, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return gpu;
}

}  // namespace cuda

namespace {

constexpr Engine kEngine{cuda::layer_forward, cuda::layers_backward};

}  // namespace

TORCH_LIBRARY_IMPL(fastrnn, CUDA, m) { register_engine<kEngine, cuda::CallOffsets>(m); }

}  // namespace fastrnn
