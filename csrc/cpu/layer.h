// SPDX-License-Identifier: Apache-2.0
//
// One layer on the CPU, all its directions: the large products around the recurrence (ATen), its
// threads and its workspaces. rnn_cpu.cpp walks through the layers.
#pragma once

#include <vector>

#include "../rnn.h"
#include "plan.h"
#include "recurrence.h"

namespace fastrnn::cpu {

/// The steps of a call, shared by its layers. Padded: batch_sizes and first_row are empty.
struct Layout {
  int64_t T = 0, B = 0, total_rows = 0;
  std::vector<int64_t> batch_sizes, first_row;  // first_row has T + 1 elements

  Layout(const Tensor& input, const OptionalTensor& batch_sizes_tensor);
  bool packed() const { return !batch_sizes.empty(); }
  int64_t rows(int64_t t) const { return packed() ? batch_sizes[t] : B; }
  /// Rows of all steps before step t.
  int64_t offset(int64_t t) const { return packed() ? first_row[t] : t * B; }
  Steps steps(int64_t begin, int64_t end, bool descending, int64_t carry_rows) const;
};

/// Forward. input [T, B, I] of any strides or packed [N, I]; hx [D, B, H] or undefined; output
/// [T, B, D*H] or [N, D*H] and h_n [D, B, H] contiguous, allocated by the caller.
void layer_forward(const Layout& layout, const Tensor& input, const Tensor& hx,
                   const std::vector<Cell>& cells, Activation activation, const Tensor& output,
                   const Tensor& h_n);

/// Which gradients are wanted, and where they go: undefined tensors are not computed.
struct CellGradients {
  Tensor w_ih, w_hh, b_ih, b_hh;
};
struct LayerGradients {
  Tensor input;  // as the input, contiguous
  Tensor hx;     // [D, B, H]
  std::vector<CellGradients> cells;
};

/// Backward. grad_output as output, any strides, or undefined; grad_h_n [D, B, H] or undefined.
/// Gradients are overwritten.
void layer_backward(const Layout& layout, const Tensor& input, const Tensor& hx,
                    const std::vector<Cell>& cells, Activation activation, const Tensor& output,
                    const Tensor& grad_output, const Tensor& grad_h_n,
                    const LayerGradients& gradients);

}  // namespace fastrnn::cpu
