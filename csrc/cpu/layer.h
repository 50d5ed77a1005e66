// SPDX-License-Identifier: Apache-2.0
//
// One layer on the CPU, all its directions: the large products around the recurrence (ATen), its
// threads and its workspaces. rnn_cpu.cpp walks through the layers.
#pragma once

#include <array>
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

/// What forward and backward read of one layer.
struct Layer {
  Tensor input;             // [T, B, I] of any strides, or packed [N, I]
  Tensor hx;                // [D, B, H] or undefined
  std::vector<Cell> cells;  // one per direction
  Activation activation;

  int64_t hidden_size() const { return cells[0].w_hh.size(0); }
  int64_t directions() const { return static_cast<int64_t>(cells.size()); }
};

/// Writes output [T, B, D*H] or [N, D*H] and h_n [D, B, H], both contiguous.
void layer_forward(const Layout& layout, const Layer& layer, const Tensor& output,
                   const Tensor& h_n);

/// Which gradients of a layer are wanted. Where a tensor is defined it is overwritten.
struct WantedGradients {
  Tensor input;                            // as the input, contiguous; or undefined
  Tensor hx;                               // [D, B, H]; or undefined
  std::vector<std::array<bool, 4>> cells;  // w_ih, w_hh, b_ih, b_hh of each direction
};

/// Backward. output as forward wrote it; grad_output like it, of any strides, or undefined;
/// grad_h_n [D, B, H] or undefined. Returns the cells' gradients, undefined where not wanted.
std::vector<Cell> layer_backward(const Layout& layout, const Layer& layer, const Tensor& output,
                                 const Tensor& grad_output, const Tensor& grad_h_n,
                                 const WantedGradients& wanted);

}  // namespace fastrnn::cpu
