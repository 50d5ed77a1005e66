// SPDX-License-Identifier: Apache-2.0
#include "products.h"

#include <ATen/Context.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

namespace fastrnn::cpu {

bool has_tile_product(at::ScalarType type) {
// Older compilers do not know the name.
#if defined(__x86_64__) && (!defined(__clang__) || __clang_major__ >= 18)
  static const bool tiles = __builtin_cpu_supports("amx-bf16") && at::hasMKLDNN();
  return tiles && type == at::kBFloat16 && at::globalContext().userEnabledMkldnn();
#else
  return false;
#endif
}

void multiply(const at::Tensor& a, const at::Tensor& b, at::Tensor out, bool accumulate) {
  if (accumulate)
    out.addmm_(a, b);
  else
    at::mm_out(out, a, b);
}

}  // namespace fastrnn::cpu
