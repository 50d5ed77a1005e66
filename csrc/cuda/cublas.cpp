// SPDX-License-Identifier: Apache-2.0
//
// cuBLAS knows columns only: a row-major matrix is its transpose to it, so out = a b is asked for
// as out^T = b^T a^T. The symbols of cuBLAS are those of the library that libtorch_cuda was linked
// with, found through it: linked by its name it might be another one than PyTorch's handle is of.
#include "cublas.h"

#include <ATen/cuda/CUDAContext.h>

#include "../layer.h"

namespace fastrnn::cuda {

namespace {

cudaDataType_t cuda_type(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return CUDA_R_64F;
    case at::kHalf:
      return CUDA_R_16F;
    case at::kBFloat16:
      return CUDA_R_16BF;
    default:
      return CUDA_R_32F;
  }
}

/// cuDNN rounds to TF32 where rows are aligned; in small products there is nothing to win.
bool takes_tf32(const Matrix& a, const Matrix& b) {
  constexpr int64_t kAlignment = 4, kSmall = 1 << 24;
  const int64_t sizes = a.rows | a.columns | b.columns | a.stride | b.stride;
  return sizes % kAlignment == 0 && a.rows * a.columns * b.columns >= kSmall;
}

cublasOperation_t operation(const Matrix& m) { return m.column_major ? CUBLAS_OP_T : CUBLAS_OP_N; }

}  // namespace

Multiplier::Multiplier(at::ScalarType type, at::ScalarType result, bool exact)
    : type_(type), result_(result), handle_(at::cuda::getCurrentCUDABlasHandle()) {
  tf32_ = type == at::kFloat && !exact && at::globalContext().allowTF32CuDNN(at::Float32Op::RNN);
  // As the setting of torch.matmul has it, the mode may allow TF32 for sums in float. PyTorch sets
  // it anew whenever it asks for the handle.
  TORCH_CUDABLAS_CHECK(cublasSetMathMode(static_cast<cublasHandle_t>(handle_),
                                         CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION));
}

void Multiplier::operator()(const Matrix& a, const Matrix& b, void* out, int64_t stride,
                            bool accumulate) const {
  const cublasComputeType_t sums = type_ == at::kDouble        ? CUBLAS_COMPUTE_64F
                                   : tf32_ && takes_tf32(a, b) ? CUBLAS_COMPUTE_32F_FAST_TF32
                                                               : CUBLAS_COMPUTE_32F;
  const double double_alpha = 1, double_beta = accumulate ? 1 : 0;
  const float float_alpha = 1, float_beta = accumulate ? 1 : 0;
  const bool in_double = type_ == at::kDouble;
  const void* const alpha = in_double ? static_cast<const void*>(&double_alpha) : &float_alpha;
  const void* const beta = in_double ? static_cast<const void*>(&double_beta) : &float_beta;
  TORCH_CUDABLAS_CHECK(cublasGemmEx_64(
      static_cast<cublasHandle_t>(handle_), operation(b), operation(a), b.columns, a.rows,
      a.columns, alpha, b.data, cuda_type(type_), b.stride, a.data, cuda_type(type_), a.stride,
      beta, out, cuda_type(result_), stride, sums, CUBLAS_GEMM_DEFAULT));
}

}  // namespace fastrnn::cuda
