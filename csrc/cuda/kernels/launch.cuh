// SPDX-License-Identifier: Apache-2.0
//
// How a kernel is launched, by CUDA or by the emulator of tests/cuda_host.
#pragma once

#include <cstddef>

#include "primitives.cuh"
#include "recurrence.h"

namespace fastrnn::cuda {

struct LaunchShape {
  unsigned blocks_x = 1, blocks_y = 1, threads = 1;
  size_t shared_bytes = 0;
  bool resident = false;  // all blocks must run at the same time: they wait for each other
};

/// Null, or what went wrong.
template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), const LaunchShape& shape, Stream stream,
                   const Arguments&... arguments) {
#ifdef __CUDACC__
  constexpr size_t kAlwaysAllowed = 48 << 10;
  if (shape.shared_bytes > kAlwaysAllowed) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared_bytes));
    if (error != cudaSuccess) {
      cudaGetLastError();  // else the next one who asks is blamed
      return cudaGetErrorString(error);
    }
  }
  cudaLaunchAttribute together;
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(shape.blocks_x, shape.blocks_y);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &together;
  config.numAttrs = shape.resident ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
#else
  cuda_host::launch({dim3(shape.blocks_x, shape.blocks_y), dim3(shape.threads), shape.shared_bytes,
                     shape.resident},
                    [&] { kernel(arguments...); });
  return nullptr;
#endif
}

}  // namespace fastrnn::cuda
