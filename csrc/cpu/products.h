// SPDX-License-Identifier: Apache-2.0
//
// PyTorch's matrix product, for what the kernels do not multiply.
#pragma once

#include <ATen/core/Tensor.h>

namespace fastrnn::cpu {

/// Whether PyTorch multiplies in tiles of this 16-bit type (AMX), at several times the rate of
/// vectors.
bool has_tile_product(at::ScalarType type);

/// out = a b, or out += a b. a [M, K], b [K, N], out [M, N], of one dtype and any strides; out
/// overlaps neither.
void multiply(const at::Tensor& a, const at::Tensor& b, at::Tensor out, bool accumulate = false);

}  // namespace fastrnn::cpu
