// SPDX-License-Identifier: Apache-2.0
//
// The calls of cuBLAS. PyTorch's own products obey the settings of torch.matmul, which belong to
// the whole process and are not nn.RNN's. They also cost a step of the steps walk more than its
// kernel. Includes no CUDA header: tests replace cublas.cpp by a twin for the CPU
// (tests/cuda_engine.cpp).
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

namespace fastrnn::cuda {

/// [rows, columns] in device memory, both at least 1. The numbers of a row are adjacent and rows
/// begin `stride` apart, at least `columns`; with column_major columns are what rows are else.
struct Matrix {
  const void* data;
  int64_t rows, columns, stride;
  bool column_major = false;
};

/// Multiplies on the device and stream that are current when it is made, until PyTorch's BLAS is
/// used again in this thread.
class Multiplier {
 public:
  /// For matrices of `type`; results are of `type` or, as the sums are, of compute_type(type).
  /// Unless it must be `exact`, float is rounded to TF32 in large products where nn.RNN may do
  /// that.
  Multiplier(at::ScalarType type, at::ScalarType result, bool exact = false);

  /// out = a b, or out += a b. out is row-major, its rows begin `stride` apart.
  void operator()(const Matrix& a, const Matrix& b, void* out, int64_t stride,
                  bool accumulate = false) const;

 private:
  const at::ScalarType type_, result_;
  void* handle_;
  bool tf32_;
};

}  // namespace fastrnn::cuda
