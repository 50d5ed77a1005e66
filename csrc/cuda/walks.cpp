// SPDX-License-Identifier: Apache-2.0
//
// The arguments of the kernels that walk, made from tensors.
#include "walks.h"

namespace fastrnn::cuda {

namespace {

RecurrenceDirection direction_of(const Layout& layout, bool backward, Range range,
                                 const DirectionTensors& d) {
  RecurrenceDirection r;
  r.w_hh = read_of(d.cell.w_hh);
  if (!backward) {
    r.b_ih = read_of(d.cell.b_ih);
    r.b_hh = read_of(d.cell.b_hh);
    r.w_ih = read_of(d.cell.w_ih);
  }
  r.x = sequence_of(layout, d.x, range.begin);
  r.addend = sequence_of(layout, d.addend, range.begin);
  r.y = sequence_of(layout, d.y, range.begin);
  r.state = read_of(d.state);
  r.grad_h_n = read_of(d.grad_h_n);
  r.out = sequence_of(layout, d.out, range.begin);
  r.final_state = data_of(d.final_state);
  r.begin = range.begin;
  r.end = range.end;
  r.descending = d.descending;
  return r;
}

/// The state as a group can read it while it writes final_state.
Tensor state_for_groups(const DirectionTensors& d) {
  if (!d.state.defined()) return d.state;
  const bool aligned = reinterpret_cast<uintptr_t>(d.state.const_data_ptr()) % kGroupAlignment == 0;
  return !aligned || d.state.is_same(d.final_state) ? d.state.clone() : d.state;
}

}  // namespace

void run_walks(const Layout& layout, const Plan& plan, const Tensor& first_row,
               Activation activation, bool backward, const std::vector<Range>& ranges,
               const std::vector<DirectionTensors>& directions) {
  if (layout.B == 0 || directions[0].out.size(-1) == 0) return;  // no launch is without threads
  if (plan.walk == Walk::kSteps) {
    for (size_t d = 0; d < directions.size(); ++d)
      walk_by_steps(layout, activation, backward, ranges[d], directions[d]);
    return;
  }
  RecurrenceArgs a;
  a.steps = {layout.T, layout.B,
             first_row.defined() ? first_row.const_data_ptr<int64_t>() : nullptr};
  a.I = directions[0].cell.w_ih.size(1);
  a.H = directions[0].cell.w_hh.size(0);
  a.type = type_of(directions[0].out);
  a.activation = activation;
  a.backward = backward;
  a.directions = static_cast<int>(directions.size());
  Tensor states[2];
  for (size_t d = 0; d < directions.size(); ++d) {
    a.direction[d] = direction_of(layout, backward, ranges[d], directions[d]);
    if (plan.walk != Walk::kGroup) continue;
    // kAwaited in every number: blocks wait until it is replaced.
    const Tensor& out = directions[d].out;
    out.view(out.itemsize() == 2 ? at::kShort : at::kInt).fill_(-1);
    states[d] = state_for_groups(directions[d]);
    a.direction[d].state = read_of(states[d]);
  }
  if (plan.walk == Walk::kGroup)
    check_launch(group_mma(a, plan.groups, current_stream()));
  else
    check_launch(a.type == Type::kFloat ? block_ffma(a, plan.block_rows, current_stream())
                                        : block_mma(a, current_stream()));
}

}  // namespace fastrnn::cuda
