// SPDX-License-Identifier: Apache-2.0
//
// By ATen where that is fast and no turn of threads; else by our kernels, in blocks.
#include "products.h"

#include <ATen/Context.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <vector>

#include "../parallel.h"
#include "dispatch.h"

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

/// By our kernels in T, block by block, which the threads share: each has a few blocks as its
/// workspace, whatever the size.
template <typename T>
void multiply_blocks(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out,
                     bool accumulate) {
  static constexpr int64_t kBlock = 128, kDepth = 128;
  constexpr at::ScalarType type = c10::CppTypeToScalarType<T>::value;
  const auto block = [](const at::Tensor& t, int64_t row, int64_t rows, int64_t column,
                        int64_t columns) {
    return t.narrow(0, row, std::min(rows, t.size(0) - row))
        .narrow(1, column, std::min(columns, t.size(1) - column));
  };
  const int64_t across = at::divup(out.size(1), kBlock), down = at::divup(out.size(0), kBlock);
  run_with_operators(across * down, [&](int64_t i) {
    const int64_t m = i / across * kBlock, n = i % across * kBlock;
    const at::Tensor target = block(out, m, kBlock, n, kBlock);
    const at::Tensor sum = accumulate ? target.to(type).contiguous()
                                      : at::zeros(target.sizes(), target.options().dtype(type));
    ProductArgs<T> p;
    p.rows = sum.size(0);
    p.N = sum.size(1);
    p.out = {sum.mutable_data_ptr<T>(), p.N};
    std::vector<T> panels(kernels<T>().packed_size(kDepth, p.N));
    p.panels = panels.data();
    p.accumulate = true;
    for (int64_t k = 0; k < a.size(1); k += kDepth) {
      const at::Tensor x = block(a, m, kBlock, k, kDepth).to(type).contiguous(),
                       w = block(b, k, kDepth, n, kBlock).to(type);
      p.K = x.size(1);
      p.x = {x.const_data_ptr<T>(), p.K};
      kernels<T>().pack(w.const_data_ptr<T>(), w.stride(0), w.stride(1), p.K, p.N, panels.data());
      kernels<T>().product(p);
    }
    target.copy_(sum);
  });
}

}  // namespace

void multiply(const at::Tensor& a, const at::Tensor& b, at::Tensor out, bool accumulate) {
  // In a turn BLAS would have one thread or, where the caller is alone, several, which may come
  // late and would add in another order.
  const bool widens = out.scalar_type() != a.scalar_type();
  if (Turn::inside || widens || !has_fast_product(a.scalar_type())) {
    const bool is_double = a.scalar_type() == at::kDouble;
    return (is_double ? multiply_blocks<double> : multiply_blocks<float>)(a, b, out, accumulate);
  }
  if (accumulate)
    out.addmm_(a, b);
  else
    at::mm_out(out, a, b);
}

}  // namespace fastrnn::cpu
