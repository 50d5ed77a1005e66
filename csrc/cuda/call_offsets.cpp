// SPDX-License-Identifier: Apache-2.0
#include "call_offsets.h"

#include <ATen/ops/empty.h>

#include "tensors.h"

namespace fastrnn::cuda {

thread_local CallOffsets* CallOffsets::current_ = nullptr;

const Tensor& CallOffsets::first_row(const Layout& layout, const Tensor& like) {
  TORCH_INTERNAL_ASSERT(current_ != nullptr);
  Tensor& result = current_->first_row_;
  if (!layout.packed() || result.defined()) return result;
  result = at::empty({layout.T + 1}, like.options().dtype(at::kLong));
  check_launch(upload(layout.first_row.data(), layout.T + 1, result.mutable_data_ptr<int64_t>(),
                      current_stream()));
  return result;
}

}  // namespace fastrnn::cuda
