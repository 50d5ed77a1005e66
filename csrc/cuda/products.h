// SPDX-License-Identifier: Apache-2.0
//
// Products of tensors, by cuBLAS.
#pragma once

#include <ATen/core/Tensor.h>

namespace fastrnn::cuda {

/// out = a b, or out += a b; sums are in float, of double in double. a and b are matrices of one
/// type and any strides. out is of that type or compute_type, and the numbers of a row are
/// adjacent. Unless it must be `exact`, float may be rounded to TF32: see Multiplier.
void product_out(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b,
                 bool accumulate = false, bool exact = false);
/// a b, of compute_type.
at::Tensor float_product(const at::Tensor& a, const at::Tensor& b);
/// sum += a b; the first one makes it, of compute_type.
void add_product(at::Tensor& sum, const at::Tensor& a, const at::Tensor& b);

}  // namespace fastrnn::cuda
