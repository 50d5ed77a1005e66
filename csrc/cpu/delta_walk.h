// SPDX-License-Identifier: Apache-2.0
//
// Backward's walk of one direction of a layer, from its input and output alone:
//
//   delta_t = (grad_y_t + delta_{t+1} W_hh) f'(y_t)
//
// It goes through chunks of steps, so that delta's workspace does not grow with T.
#pragma once

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "products.h"
#include "walks.h"
#include "weights.h"

namespace fastrnn::cpu {

/// Consecutive steps of one direction: what the walk and the gradients read and write, in T.
struct Chunk {
  Range range;
  int64_t y_begin;  // first step of y
  Tensor x;         // [.., I], where the kernels make W_ih's gradient of it
  Tensor y;         // [.., H], with the step whose state enters the chunk
  Tensor grad_y;    // [.., H], undefined, or delta itself
  Tensor delta;     // a workspace of [.., H]: DeltaWalk::rows_of
  bool from_above;  // grad_y is a workspace, too
};

/// One direction of a layer, and what passes from chunk to chunk. T: the type computed in.
template <typename T>
struct DeltaWalk {
  const Layout& layout;
  const Layer& layer;
  const Plan& plan;
  int64_t d;
  // Of blocks of rows that lie together in a workspace, all steps of each, since what threads write
  // side by side slows both; or of all rows.
  const std::vector<int64_t>& bounds;
  Tensor grad_h_n;     // [B, H] in T, or undefined
  Tensor delta_first;  // [B, H] in T: delta of each row's first step in forward; or undefined
  Tensor carry = {};   // [rows, H] in T: delta of the last step walked

  bool reverse() const { return d == 1; }
  int64_t hidden_size() const { return layer.hidden_size(); }
  const Cell& cell() const { return layer.cells[d]; }

  /// A workspace for the steps `range`.
  Tensor make_delta(Range range) const {
    const auto options = layer.input.options().dtype(kScalarType<T>);
    if (layout.packed())
      return at::empty({layout.position(range.end) - layout.position(range.begin), hidden_size()},
                       options);
    return at::empty({range.end - range.begin, layout.B, hidden_size()}, options);
  }

  /// Where the rows of a block lie in a workspace of the steps `range`.
  Sequence<T> rows_of(const Tensor& workspace, Range range, int64_t block) const {
    Sequence<T> s = sequence_of<T>(layout, workspace, range.begin, 0);
    if (bounds.size() == 2) return s;
    const int64_t first = bounds[block], steps = range.end - range.begin;
    s.row_stride = hidden_size();
    s.step_stride = (bounds[block + 1] - first) * s.row_stride;
    s.data = mutable_data_of<T>(workspace) + (steps - 1) * first * s.row_stride -
             range.begin * s.step_stride;
    return s;
  }

  /// This direction's columns of some steps of a [.., D * H] tensor.
  Tensor columns(const Tensor& t, Range range) const {
    return readable(narrow_direction(narrow_steps(layout, t, range), d, hidden_size()),
                    kScalarType<T>);
  }

  /// Chunk number i of `steps` steps, without x, grad_y and delta.
  Chunk chunk(int64_t steps, int64_t i, const Tensor& output) const {
    Chunk c;
    c.range = part_of({0, layout.T}, steps, i, /*descending=*/!reverse());
    c.y_begin = reverse() ? c.range.begin : std::max<int64_t>(0, c.range.begin - 1);
    const int64_t y_end = reverse() ? std::min(layout.T, c.range.end + 1) : c.range.end;
    c.y = columns(output, {c.y_begin, y_end});
    return c;
  }

  /// Rows [first, first + count) of a chunk's delta at step t, copied to those of a [B, H] tensor.
  void copy_rows(const Chunk& c, int64_t t, int64_t first, int64_t count, const Tensor& to) const {
    const int64_t row_bytes = hidden_size() * static_cast<int64_t>(sizeof(T));
    for (size_t block = 0; block + 1 < bounds.size(); ++block) {
      const int64_t begin = std::max(first, bounds[block]);
      const int64_t end = std::min(first + count, bounds[block + 1]);
      if (begin >= end) continue;
      std::memcpy(mutable_data_of<T>(to) + begin * hidden_size(),
                  rows_of(c.delta, c.range, block).row(t, begin), (end - begin) * row_bytes);
    }
  }

  /// The kernel's arguments for a block of rows, but for W_hh.
  BackwardArgs<T> args(const Chunk& c, int64_t block) const {
    BackwardArgs<T> a;
    a.steps = steps_of(layout, c.range.begin, c.range.end, /*descending=*/!reverse(),
                       carry.defined() ? carry.size(0) : 0);
    a.H = hidden_size();
    a.activation = layer.activation;
    a.grad_y = c.from_above ? read_only(rows_of(c.grad_y, c.range, block))
                            : sequence_of<const T>(layout, c.grad_y, c.range.begin, 0);
    a.grad_h_n = matrix_of<T>(grad_h_n);
    a.carry = matrix_of<T>(carry);
    a.y = sequence_of<const T>(layout, c.y, c.y_begin, 0);
    a.delta = rows_of(c.delta, c.range, block);
    return a;
  }

  /// Keeps what is read of a chunk's delta later.
  void keep_states(const Chunk& c) {
    const int64_t last = reverse() ? c.range.end - 1 : c.range.begin;
    const bool ends = last == (reverse() ? layout.T - 1 : 0);
    carry = Tensor();
    if (!ends) {
      carry = at::empty({layout.rows(last), hidden_size()}, c.delta.options());
      copy_rows(c, last, 0, layout.rows(last), carry);
    }
    if (!delta_first.defined()) return;
    if (!reverse()) {
      if (ends) copy_rows(c, 0, 0, layout.B, delta_first);
      return;
    }
    for (int64_t t = c.range.begin; t < c.range.end; ++t) {  // rows that begin here in forward
      const int64_t ongoing = t + 1 < layout.T ? layout.rows(t + 1) : 0;
      copy_rows(c, t, ongoing, layout.rows(t) - ongoing, delta_first);
    }
  }
};

/// W_hh as the walk reads it: as it is, or packed. It is made anew for every chunk, which costs
/// little beside the chunk, so that it is not in memory during the products after the walk.
template <typename T>
struct DeltaWeights {
  Panels<T> panels;
  Tensor w_hh;

  explicit DeltaWeights(const DeltaWalk<T>& walk) {
    if (walk.layout.T == 1) return;  // no product
    if (walk.plan.delta == Maker::kPanels) panels = {walk.cell().w_hh, /*transposed=*/false};
    if (walk.plan.delta == Maker::kAsIs) w_hh = readable(walk.cell().w_hh, kScalarType<T>);
  }

  BackwardArgs<T> add_to(BackwardArgs<T> args) const {
    args.w_hh_panels = panels.data();
    args.w_hh = matrix_of<T>(w_hh);
    return args;
  }
};

/// The walk with a product by ATen in each step, made where delta_t will be:
///   delta_t = ( grad_y_t + delta_{t+1} W_hh ) f'(y_t)
/// Not added to grad_y by ATen: a sum that starts from a large term loses digits. So grad_y must
/// not be delta's memory here.
template <typename T>
void walk_by_steps(DeltaWalk<T>& walk, const Chunk& c) {
  const Layout& layout = walk.layout;
  Tensor next = std::move(walk.carry);
  for (int64_t i = 0; i < parts_in(c.range, 1); ++i) {
    Chunk step;
    step.range = part_of(c.range, 1, i, /*descending=*/!walk.reverse());
    step.y_begin = step.range.begin;
    step.y = narrow_steps(layout, c.y, step.range, c.y_begin);
    step.delta = narrow_steps(layout, c.delta, step.range, c.range.begin);
    if (c.grad_y.defined()) step.grad_y = narrow_steps(layout, c.grad_y, step.range, c.range.begin);
    step.from_above = false;  // one block
    BackwardArgs<T> a = walk.args(step, 0);
    if (next.defined()) {
      multiply(next, walk.cell().w_hh, step.delta[0]);
      a.grad_h_n = step.grad_y.defined() ? matrix_of<T>(step.grad_y[0]) : Matrix<const T>{};
      a.grad_y = sequence_of<const T>(layout, step.delta, step.range.begin, 0);
    }
    run_walks(layout, walk.plan, std::vector{a}, kernels<T>().backward);
    next = step.delta[0];
  }
}

}  // namespace fastrnn::cpu
