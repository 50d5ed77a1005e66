// SPDX-License-Identifier: Apache-2.0
//
// Products around the recurrence that are not made with packed weights (panels.h): by PyTorch's
// BLAS where that is fast and may ask for threads.
#pragma once

#include <ATen/core/Tensor.h>

namespace fastrnn::cpu {

/// Whether ATen's product of this type is a fast one. Where the processor has no instruction for a
/// 16-bit type, it is a plain loop, 10 to 80 times slower than in float32.
bool has_fast_product(at::ScalarType type);

/// Whether ATen multiplies in tiles of this 16-bit type (AMX), at several times the rate of
/// vectors.
bool has_tile_product(at::ScalarType type);

/// out = a b, or out += a b. a [M, K], b [K, N], out [M, N], of one dtype and any strides; out
/// overlaps neither. 16-bit products add up in float32 and need no float32 copy of an argument; out
/// may be float32.
void multiply(const at::Tensor& a, const at::Tensor& b, at::Tensor out, bool accumulate = false);

}  // namespace fastrnn::cpu
