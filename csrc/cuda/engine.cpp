// SPDX-License-Identifier: Apache-2.0
//
// Registers the CUDA kernels of rnn_forward and rnn_backward, and asks CUDA what
// the rest of this folder needs to know.
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "call_offsets.h"
#include "engine.h"

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

ForwardResult rnn_forward_cuda(const Tensor& input, const OptionalTensor& hx,
                               at::TensorList weights, const OptionalTensor& batch_sizes,
                               std::string_view nonlinearity, bool bias, int64_t num_layers,
                               bool bidirectional, bool keep) {
  const c10::OptionalDeviceGuard guard(input.device());
  const RnnOptions options{nonlinearity, bias, num_layers, bidirectional};
  const cuda::CallOffsets offsets;
  return forward_layers(kEngine, input, hx, weights, batch_sizes, options, keep);
}

BackwardResult rnn_backward_cuda(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                                 const Tensor& input, const OptionalTensor& hx,
                                 at::TensorList weights, const OptionalTensor& batch_sizes,
                                 at::TensorList layer_outputs, std::string_view nonlinearity,
                                 bool bias, int64_t num_layers, bool bidirectional,
                                 c10::List<bool> needs) {
  const c10::OptionalDeviceGuard guard(input.device());
  const RnnOptions options{nonlinearity, bias, num_layers, bidirectional};
  const cuda::CallOffsets offsets;
  return backward_layers(kEngine, grad_output, grad_h_n, input, hx, weights, batch_sizes,
                         layer_outputs, options, needs);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastrnn, CUDA, m) {
  m.impl("rnn_forward", rnn_forward_cuda);
  m.impl("rnn_backward", rnn_backward_cuda);
}

}  // namespace fastrnn
