// SPDX-License-Identifier: Apache-2.0
//
// Tensors of any strides as the matrices that cuBLAS takes, and what cuBLAS gets wrong.
#include "products.h"

#include <ATen/ops/empty.h>

#include <algorithm>

#include "../layer.h"
#include "cublas.h"

namespace fastrnn::cuda {

namespace {

/// Whether the numbers along `dim` are adjacent and the other stride leads past all of them.
bool adjacent_along(int64_t dim, const Tensor& t) {
  return (t.stride(dim) == 1 || t.size(dim) == 1) &&
         (t.stride(1 - dim) >= t.size(dim) || t.size(1 - dim) == 1);
}

/// `t` or, of other strides than a Matrix can have, a copy.
Tensor with_strides_of_matrix(const Tensor& t) {
  return adjacent_along(1, t) || adjacent_along(0, t) ? t : t.contiguous();
}

/// The stride of a dimension of one is any number.
int64_t leading_stride(int64_t adjacent, const Tensor& t) {
  return std::max(t.stride(1 - adjacent), t.size(adjacent));
}

Matrix matrix_of(const Tensor& t) {
  const int64_t adjacent = adjacent_along(1, t) ? 1 : 0;
  return {t.const_data_ptr(), t.size(0), t.size(1), leading_stride(adjacent, t),
          /*column_major=*/adjacent == 0};
}

/// cuBLAS 13.1 leaves out the last rows of two 16-bit matrices that lie in K rows, at some sizes
/// and K = 64 n + 1 to 64 n + 3 (seen at 5633, 8193 and 65537; from 64 n + 4 on none was). Where to
/// cut such a product in two of other K, with a margin; 0: nowhere.
int64_t cut(const Tensor& a, const Tensor& b) {
  constexpr int64_t kTile = 64, kSafeRest = 8;
  const int64_t K = a.size(1), rest = K % kTile;
  const bool in_rows = adjacent_along(0, a) && adjacent_along(1, b);
  const bool can_fail = a.itemsize() == 2 && in_rows && K > kTile && rest > 0 && rest < kSafeRest;
  return can_fail ? K - rest - kTile / 2 : 0;
}

}  // namespace

void product_out(const Tensor& out, const Tensor& a, const Tensor& b, bool accumulate, bool exact) {
  if (out.numel() == 0) return;
  TORCH_INTERNAL_ASSERT(adjacent_along(1, out));
  if (a.size(1) == 0) {
    if (!accumulate) out.zero_();
    return;
  }
  const Tensor left = with_strides_of_matrix(a), right = with_strides_of_matrix(b);
  if (const int64_t first = cut(left, right); first > 0) {
    const int64_t rest = a.size(1) - first;
    product_out(out, left.narrow(1, 0, first), right.narrow(0, 0, first), accumulate, exact);
    product_out(out, left.narrow(1, first, rest), right.narrow(0, first, rest), true, exact);
    return;
  }
  const Multiplier multiply(a.scalar_type(), out.scalar_type(), exact);
  multiply(matrix_of(left), matrix_of(right), out.mutable_data_ptr(), leading_stride(1, out),
           accumulate);
}

Tensor float_product(const Tensor& a, const Tensor& b) {
  const Tensor product =
      at::empty({a.size(0), b.size(1)}, a.options().dtype(compute_type(a.scalar_type())));
  product_out(product, a, b);
  return product;
}

void add_product(Tensor& sum, const Tensor& a, const Tensor& b) {
  if (sum.defined())
    product_out(sum, a, b, /*accumulate=*/true);
  else
    sum = float_product(a, b);
}

}  // namespace fastrnn::cuda
