// SPDX-License-Identifier: Apache-2.0
//
// Products of tensors, the walk of tier 0, and the arguments of the kernels of tiers 1 and 2.
#include "layer_common.h"

#include <ATen/ops/empty.h>

#include <algorithm>

#include "products.h"

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

const Tensor& first_row_on_device(const Layout& layout, const Tensor& like) {
  Tensor& result = layout.device_first_row;
  if (!layout.packed() || result.defined()) return result;
  result = at::empty({layout.T + 1}, like.options().dtype(at::kLong));
  check_launch(upload(layout.first_row.data(), layout.T + 1, result.mutable_data_ptr<int64_t>(),
                      current_stream()));
  return result;
}

namespace {

/// Tier 0: a product and an epilogue for each step. Its time is that of the calls from the host, so
/// no tensor is made in a step but where rows end.
class StepWalk {
 public:
  StepWalk(const Layout& layout, Activation activation, bool backward, Range range,
           const DirectionTensors& d)
      : layout_(layout),
        range_(range),
        d_(d),
        H_(d.out.size(-1)),
        addend_(sequence_of(layout, d.addend, range.begin)),
        y_(sequence_of(layout, d.y, range.begin)),
        out_(sequence_of(layout, d.out, range.begin)),
        product_(
            at::empty({layout.B, H_}, d.out.options().dtype(compute_type(d.out.scalar_type())))),
        weight_{d.cell.w_hh.const_data_ptr(), H_, H_, H_, /*column_major=*/!backward},
        multiply_(d.out.scalar_type(), product_.scalar_type()) {
    args_.type = type_of(d.out);
    args_.activation = activation;
    args_.backward = backward;
    args_.H = H_;
    if (!backward) {
      args_.b_ih = read_of(d.cell.b_ih);
      args_.b_hh = read_of(d.cell.b_hh);
    }
    args_.grad_h_n = read_of(d.grad_h_n);
    args_.product = product_.const_data_ptr();
    args_.addend_stride = addend_.row_stride;
    args_.y_stride = y_.row_stride;
    args_.out_stride = out_.row_stride;
  }

  void run() {
    // A state that no step changes stays: that of rows which have ended, or not begun.
    if (d_.final_state.defined() && !d_.final_state.is_same(d_.state)) {
      if (d_.state.defined())
        d_.final_state.copy_(d_.state);
      else
        d_.final_state.zero_();
    }
    const int64_t count = range_.end - range_.begin;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t t = d_.descending ? range_.end - 1 - i : range_.begin + i;
      step(t, /*first=*/i == 0);
      const int64_t going_on = i + 1 < count ? std::min(rows(t), rows(after(t))) : 0;
      if (d_.final_state.defined() && going_on < rows(t)) end_rows(t, going_on);
    }
  }

 private:
  int64_t rows(int64_t t) const { return t < 0 || t >= layout_.T ? 0 : layout_.rows(t); }
  int64_t after(int64_t t) const { return d_.descending ? t - 1 : t + 1; }
  int64_t before(int64_t t) const { return d_.descending ? t + 1 : t - 1; }

  /// The first row of step t.
  char* row_of(const Sequence& s, int64_t t, int64_t item_size) const {
    if (s.data == nullptr) return nullptr;
    const int64_t elements =
        layout_.packed() ? layout_.first_row[t] * s.row_stride : t * s.step_stride;
    return static_cast<char*>(s.data) + elements * item_size;
  }

  /// Step t is the last one of its rows from `from` on.
  void end_rows(int64_t t, int64_t from) const {
    const Tensor out = step_of(layout_, d_.out, t, range_.begin);
    d_.final_state.narrow(0, from, rows(t) - from).copy_(out.narrow(0, from, rows(t) - from));
  }

  /// The products of rows [from, to), whose states lie at `state`, `stride` apart.
  void multiply(const void* state, int64_t stride, int64_t from, int64_t to) const {
    const int64_t bytes = from * H_ * static_cast<int64_t>(product_.itemsize());
    multiply_({state, to - from, H_, std::max(stride, H_)}, weight_,
              static_cast<char*>(product_.mutable_data_ptr()) + bytes, H_);
  }

  /// The product of each row that has a state before step t; returns how many do. First come those
  /// whose state the step walked before has written, then those that have the walk's initial one.
  int64_t multiply_states(int64_t t, bool first) const {
    const int64_t item_size = d_.out.itemsize();
    const int64_t continuing = std::min(rows(before(t)), rows(t)), walked = first ? 0 : continuing;
    if (walked > 0) multiply(row_of(out_, before(t), item_size), out_.row_stride, 0, walked);
    if (!d_.state.defined()) return walked;
    // In forward it is hx, also of rows that begin here.
    const int64_t count = args_.backward ? continuing : rows(t);
    if (walked < count) {
      const char* const state = static_cast<const char*>(d_.state.const_data_ptr());
      multiply(state + walked * H_ * item_size, H_, walked, count);
    }
    return count;
  }

  ///   out_t = f( addend_t + s_{t-1} W_hh^T + b_ih + b_hh ), or ( addend_t + s_{t+1} W_hh ) f'(y_t)
  void step(int64_t t, bool first) {
    args_.product_rows = multiply_states(t, first);
    args_.rows = rows(t);
    args_.addend = row_of(addend_, t, d_.addend.defined() ? d_.addend.itemsize() : 0);
    args_.y = row_of(y_, t, d_.out.itemsize());
    args_.out = row_of(out_, t, d_.out.itemsize());
    check_launch(step_epilogue(args_, current_stream()));
  }

  const Layout& layout_;
  const Range range_;
  const DirectionTensors& d_;
  const int64_t H_;
  const Sequence addend_, y_, out_;
  const Tensor product_;  // [B, H]
  const Matrix weight_;   // s times it is the product
  const Multiplier multiply_;
  StepArgs args_;  // of every step, but for its pointers and rows
};

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

/// The state as tier 2 can read it while it writes final_state.
Tensor state_for_groups(const DirectionTensors& d) {
  if (!d.state.defined()) return d.state;
  const bool aligned = reinterpret_cast<uintptr_t>(d.state.const_data_ptr()) % kGroupAlignment == 0;
  return !aligned || d.state.is_same(d.final_state) ? d.state.clone() : d.state;
}

}  // namespace

void run_recurrence(const Layout& layout, const Plan& plan, const Tensor& first_row,
                    Activation activation, bool backward, const std::vector<Range>& ranges,
                    const std::vector<DirectionTensors>& directions) {
  if (layout.B == 0 || directions[0].out.size(-1) == 0) return;  // no launch is without threads
  if (plan.tier == Tier::kSteps) {
    for (size_t d = 0; d < directions.size(); ++d)
      StepWalk(layout, activation, backward, ranges[d], directions[d]).run();
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
    if (plan.tier != Tier::kGroup) continue;
    // Blocks wait for `out` to hold something else than these bits.
    const Tensor& out = directions[d].out;
    out.view(out.itemsize() == 2 ? at::kShort : at::kInt).fill_(-1);
    states[d] = state_for_groups(directions[d]);
    a.direction[d].state = read_of(states[d]);
  }
  if (plan.tier == Tier::kGroup)
    check_launch(group_recurrence(a, plan.groups, current_stream()));
  else
    check_launch(a.type == Type::kFloat ? ffma_recurrence(a, plan.block_rows, current_stream())
                                        : mma_recurrence(a, current_stream()));
}

}  // namespace fastrnn::cuda
