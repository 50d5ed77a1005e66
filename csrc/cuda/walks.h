// SPDX-License-Identifier: Apache-2.0
//
// Walks through a chunk of steps, for layer_forward.cpp and layer_backward.cpp.
#pragma once

#include "tensors.h"

namespace fastrnn::cuda {

/// What the recurrence of one direction reads and writes over one chunk: RecurrenceDirection and
/// its tensors. addend, x, y, out hold the chunk's steps [.., H].
struct DirectionTensors {
  Cell cell;
  Tensor addend, x, y, out;             // forward: addend or x
  Tensor state, grad_h_n, final_state;  // [B, H]
  bool descending;
};

/// Walks through a chunk as the plan says, directions side by side where they can.
/// first_row: CallOffsets::first_row, unless the walk is by steps.
void run_walks(const Layout& layout, const Plan& plan, const Tensor& first_row,
               Activation activation, bool backward, const std::vector<Range>& ranges,
               const std::vector<DirectionTensors>& directions);

/// The steps walk of one direction.
void walk_by_steps(const Layout& layout, Activation activation, bool backward, Range range,
                   const DirectionTensors& direction);

}  // namespace fastrnn::cuda
