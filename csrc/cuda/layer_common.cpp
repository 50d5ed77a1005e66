// SPDX-License-Identifier: Apache-2.0
#include "layer_common.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

namespace fastrnn::cuda {

Tensor float_product(const Tensor& a, const Tensor& b) {
  if (a.scalar_type() == sum_type(a)) return at::mm(a, b);
  if (a.is_cuda()) return at::mm(a, b, at::kFloat);
  return at::mm(a.to(at::kFloat), b.to(at::kFloat));
}

Tensor upload_first_row(const Layout& layout, const Tensor& like) {
  if (!layout.packed()) return Tensor();
  const Tensor result = at::empty({layout.T + 1}, like.options().dtype(at::kLong));
  check_launch(upload(layout.first_row.data(), layout.T + 1, result.mutable_data_ptr<int64_t>(),
                      current_stream()));
  return result;
}

namespace {

/// Tier 0: a product and an epilogue for each step.
class StepWalk {
 public:
  StepWalk(const Layout& layout, Activation activation, bool backward, Range range,
           const DirectionTensors& d)
      : layout_(layout),
        activation_(activation),
        backward_(backward),
        range_(range),
        d_(d),
        weight_(backward ? d.cell.w_hh : d.cell.w_hh.t()) {}

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
      if (d_.final_state.defined() && going_on < rows(t))
        d_.final_state.narrow(0, going_on, rows(t) - going_on)
            .copy_(at(d_.out, t).narrow(0, going_on, rows(t) - going_on));
    }
  }

 private:
  int64_t rows(int64_t t) const { return t < 0 || t >= layout_.T ? 0 : layout_.rows(t); }
  int64_t after(int64_t t) const { return d_.descending ? t - 1 : t + 1; }
  int64_t before(int64_t t) const { return d_.descending ? t + 1 : t - 1; }
  Tensor at(const Tensor& t, int64_t step) const { return step_of(layout_, t, step, range_.begin); }

  /// The state before step t of all its rows, or of the first ones; undefined if of none.
  Tensor previous(int64_t t, bool first) const {
    const int64_t continuing = std::min(rows(before(t)), rows(t));
    const bool has_initial = d_.state.defined() && !backward_;  // hx, for rows that begin here
    if (first) {
      const int64_t count = has_initial ? rows(t) : continuing;
      return d_.state.defined() && count > 0 ? d_.state.narrow(0, 0, count) : Tensor();
    }
    const Tensor going_on = at(d_.out, before(t)).narrow(0, 0, continuing);
    if (continuing == rows(t) || !has_initial) return going_on;
    return at::cat({going_on, d_.state.narrow(0, continuing, rows(t) - continuing)});
  }

  ///   out_t = f( addend_t + s_{t-1} W_hh^T + b_ih + b_hh ), or ( addend_t + s_{t+1} W_hh ) f'(y_t)
  void step(int64_t t, bool first) {
    const Tensor s = previous(t, first), out = at(d_.out, t);
    Tensor product;
    if (s.defined() && s.size(0) > 0) product = float_product(s, weight_);
    StepArgs a;
    a.type = type_of(out);
    a.activation = activation_;
    a.backward = backward_;
    a.rows = out.size(0);
    a.H = out.size(1);
    a.product_rows = product.defined() ? product.size(0) : 0;
    a.product = read_of(product);
    a.b_ih = read_of(backward_ ? Tensor() : d_.cell.b_ih);
    a.b_hh = read_of(backward_ ? Tensor() : d_.cell.b_hh);
    a.grad_h_n = read_of(d_.grad_h_n);
    if (d_.addend.defined()) {
      const Tensor addend = at(d_.addend, t);
      a.addend = addend.const_data_ptr();
      a.addend_stride = addend.stride(0);
    }
    if (d_.y.defined()) {
      const Tensor y = at(d_.y, t);
      a.y = y.const_data_ptr();
      a.y_stride = y.stride(0);
    }
    a.out = out.mutable_data_ptr();
    a.out_stride = out.stride(0);
    check_launch(step_epilogue(a, current_stream()));
  }

  const Layout& layout_;
  const Activation activation_;
  const bool backward_;
  const Range range_;
  const DirectionTensors& d_;
  const Tensor weight_;
};

RecurrenceDirection direction_of(const Layout& layout, bool backward, Range range,
                                 const DirectionTensors& d) {
  RecurrenceDirection r;
  r.w_hh = read_of(d.cell.w_hh);
  if (!backward) {
    r.b_ih = read_of(d.cell.b_ih);
    r.b_hh = read_of(d.cell.b_hh);
  }
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
  a.H = directions[0].cell.w_hh.size(0);
  a.type = type_of(directions[0].out);
  a.activation = activation;
  a.backward = backward;
  a.directions = static_cast<int>(directions.size());
  for (size_t d = 0; d < directions.size(); ++d)
    a.direction[d] = direction_of(layout, backward, ranges[d], directions[d]);
  check_launch(a.type == Type::kFloat ? ffma_recurrence(a, plan.block_rows, current_stream())
                                      : mma_recurrence(a, current_stream()));
}

}  // namespace fastrnn::cuda
