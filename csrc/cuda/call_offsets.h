// SPDX-License-Identifier: Apache-2.0
//
// What the layers of a call share on the GPU: where the steps of packed data begin.
#pragma once

#include "../layer.h"

namespace fastrnn::cuda {

/// Layout::first_row on the GPU. An operator makes one of these for its call. The first layer that
/// asks uploads the numbers, and the others of the call find them here.
class CallOffsets {
 public:
  CallOffsets() : outer_(current_) { current_ = this; }
  ~CallOffsets() { current_ = outer_; }
  CallOffsets(const CallOffsets&) = delete;
  CallOffsets& operator=(const CallOffsets&) = delete;

  /// Those of this thread's call, [T + 1], on the device of `like`; undefined for padded data.
  static const Tensor& first_row(const Layout& layout, const Tensor& like);

 private:
  static thread_local CallOffsets* current_;
  CallOffsets* const outer_;
  Tensor first_row_;
};

}  // namespace fastrnn::cuda
