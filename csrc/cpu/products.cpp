// SPDX-License-Identifier: Apache-2.0
#include "products.h"

#include <ATen/Context.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "../parallel.h"

namespace fastrnn::cpu {

bool has_fast_product(at::ScalarType type) {
  if (type == at::kFloat || type == at::kDouble) return true;
#if defined(__x86_64__)
  static const bool bfloat16 = __builtin_cpu_supports("avx512bf16") && at::hasMKLDNN();
  return type == at::kBFloat16 && bfloat16 && at::globalContext().userEnabledMkldnn();
#else
  return false;
#endif
}

bool has_tile_product(at::ScalarType type) {
// Older compilers do not know the name.
#if defined(__x86_64__) && (!defined(__clang__) || __clang_major__ >= 18)
  static const bool tiles = __builtin_cpu_supports("amx-bf16");
  return tiles && type == at::kBFloat16 && has_fast_product(type);
#else
  return false;
#endif
}

namespace {

/// In float32, block by block, which the threads share: each has three blocks as its workspace,
/// whatever the size.
void multiply_blocks(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out,
                     bool accumulate) {
  static constexpr int64_t kBlock = 128, kDepth = 64;
  const auto block = [](const at::Tensor& t, int64_t row, int64_t rows, int64_t column,
                        int64_t columns) {
    return t.narrow(0, row, std::min(rows, t.size(0) - row))
        .narrow(1, column, std::min(columns, t.size(1) - column));
  };
  const int64_t across = at::divup(out.size(1), kBlock), down = at::divup(out.size(0), kBlock);
  run_with_operators(across * down, [&](int64_t i) {
    const int64_t m = i / across * kBlock, n = i % across * kBlock;
    const at::Tensor target = block(out, m, kBlock, n, kBlock);
    at::Tensor sum = accumulate ? target.to(at::kFloat)
                                : at::zeros(target.sizes(), target.options().dtype(at::kFloat));
    for (int64_t k = 0; k < a.size(1); k += kDepth)
      sum.addmm_(block(a, m, kBlock, k, kDepth).to(at::kFloat),
                 block(b, k, kDepth, n, kBlock).to(at::kFloat));
    target.copy_(sum);
  });
}

}  // namespace

void multiply(const at::Tensor& a, const at::Tensor& b, at::Tensor out, bool accumulate) {
  if (!has_fast_product(out.scalar_type()))
    multiply_blocks(a, b, out, accumulate);
  else if (accumulate)
    out.addmm_(a, b);
  else
    at::mm_out(out, a, b);
}

}  // namespace fastrnn::cpu
