// SPDX-License-Identifier: Apache-2.0
//
// tanh and relu, and their derivatives from the value alone: 1 - y^2, and 1 where y > 0.
#pragma once

#include "primitives.cuh"
#include "recurrence.h"

namespace fastrnn::cuda {

/// f(sum), or backward sum f'(y); as exact as results of type T need. NaN stays, in y too.
template <typename T, bool kBackward, typename Number>
__device__ __forceinline__ Number activate(Activation activation, Number sum, Number y) {
  if (kBackward) {
    if (activation == Activation::kTanh) return sum * (1 - y * y);
    return y <= 0 ? Number(0) : sum;
  }
  if (activation == Activation::kTanh) return tanh_for<T>(sum);
  return sum < 0 ? Number(0) : sum;
}

}  // namespace fastrnn::cuda
