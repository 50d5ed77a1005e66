// SPDX-License-Identifier: Apache-2.0
//
// Products with sums in float32, the walk of tier 0, and the arguments of tier 1's kernels.
#include "layer_common.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <algorithm>

namespace fastrnn::cuda {

namespace {

/// cuBLAS refuses float sums of float16 where the process allows float16 sums.
bool refuses_float_sums(at::ScalarType type) {
  return type == at::kHalf && at::globalContext().allowFP16AccumulationCuBLAS();
}

}  // namespace

Tensor float_product(const Tensor& a, const Tensor& b) {
  Tensor product =
      at::empty({a.size(0), b.size(1)}, a.options().dtype(compute_type(a.scalar_type())));
  float_product_out(product, a, b);
  return product;
}

void float_product_out(Tensor& product, const Tensor& a, const Tensor& b) {
  if (a.scalar_type() == product.scalar_type())
    at::mm_out(product, a, b);
  else if (a.is_cuda() && !refuses_float_sums(a.scalar_type()))
    at::mm_out(product, a, b, at::kFloat);
  else
    at::mm_out(product, a.to(at::kFloat), b.to(at::kFloat));
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
/// as few tensors as can be are made in a step.
class StepWalk {
 public:
  StepWalk(const Layout& layout, Activation activation, bool backward, Range range,
           const DirectionTensors& d)
      : layout_(layout),
        range_(range),
        d_(d),
        weight_(backward ? d.cell.w_hh : d.cell.w_hh.t()),
        addend_(sequence_of(layout, d.addend, range.begin)),
        y_(sequence_of(layout, d.y, range.begin)),
        out_(sequence_of(layout, d.out, range.begin)) {
    // Else each step would convert it.
    if (refuses_float_sums(weight_.scalar_type())) weight_ = weight_.to(at::kFloat);
    args_.type = type_of(d.out);
    args_.activation = activation;
    args_.backward = backward;
    args_.H = d.out.size(-1);
    if (!backward) {
      args_.b_ih = read_of(d.cell.b_ih);
      args_.b_hh = read_of(d.cell.b_hh);
    }
    args_.grad_h_n = read_of(d.grad_h_n);
    args_.addend_stride = addend_.row_stride;
    args_.y_stride = y_.row_stride;
    args_.out_stride = out_.row_stride;
    product_ =
        at::empty({layout.B, args_.H}, d.out.options().dtype(compute_type(d.out.scalar_type())));
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
      previous_output_ = std::move(output_);
      output_ = step_of(layout_, d_.out, t, range_.begin);
      step(t, /*first=*/i == 0);
      const int64_t going_on = i + 1 < count ? std::min(rows(t), rows(after(t))) : 0;
      if (d_.final_state.defined() && going_on < rows(t))
        d_.final_state.narrow(0, going_on, rows(t) - going_on)
            .copy_(output_.narrow(0, going_on, rows(t) - going_on));
    }
  }

 private:
  int64_t rows(int64_t t) const { return t < 0 || t >= layout_.T ? 0 : layout_.rows(t); }
  int64_t after(int64_t t) const { return d_.descending ? t - 1 : t + 1; }
  int64_t before(int64_t t) const { return d_.descending ? t + 1 : t - 1; }

  /// The first `count` rows, as a view only where those are not all.
  static Tensor first_rows(const Tensor& t, int64_t count) {
    return t.size(0) == count ? t : t.narrow(0, 0, count);
  }

  /// The first row of step t.
  char* row_of(const Sequence& s, int64_t t, int64_t item_size) const {
    if (s.data == nullptr) return nullptr;
    const int64_t elements =
        layout_.packed() ? layout_.first_row[t] * s.row_stride : t * s.step_stride;
    return static_cast<char*>(s.data) + elements * item_size;
  }

  /// The state before step t of all its rows, or of the first ones; undefined if of none.
  Tensor previous(int64_t t, bool first) const {
    const int64_t continuing = std::min(rows(before(t)), rows(t));
    const bool has_initial = d_.state.defined() && !args_.backward;  // hx, for rows that begin here
    const int64_t count = has_initial ? rows(t) : continuing;
    if (count == 0 || (first && !d_.state.defined())) return Tensor();
    if (first) return first_rows(d_.state, count);
    const Tensor going_on = first_rows(previous_output_, continuing);
    if (continuing == count) return going_on;
    return at::cat({going_on, d_.state.narrow(0, continuing, count - continuing)});
  }

  ///   out_t = f( addend_t + s_{t-1} W_hh^T + b_ih + b_hh ), or ( addend_t + s_{t+1} W_hh ) f'(y_t)
  void step(int64_t t, bool first) {
    const Tensor s = previous(t, first);
    args_.product_rows = 0;
    if (s.defined()) {
      Tensor product = first_rows(product_, s.size(0));
      float_product_out(product, s, weight_);
      args_.product_rows = s.size(0);
    }
    args_.rows = rows(t);
    args_.product = product_.const_data_ptr();
    args_.addend = row_of(addend_, t, d_.addend.defined() ? d_.addend.itemsize() : 0);
    args_.y = row_of(y_, t, d_.out.itemsize());
    args_.out = row_of(out_, t, d_.out.itemsize());
    check_launch(step_epilogue(args_, current_stream()));
  }

  const Layout& layout_;
  const Range range_;
  const DirectionTensors& d_;
  Tensor weight_;  // s times it is the product
  const Sequence addend_, y_, out_;
  Tensor output_, previous_output_;  // of this step and of the one walked before, [rows, H]
  Tensor product_;                   // [B, H]
  StepArgs args_;                    // of every step, but for its pointers
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

/// What tier 2 asks for, see group_recurrence(): blocks wait for `out`, and one of them may write
/// final_state while another one still reads the state.
void prepare_for_groups(DirectionTensors& d) {
  d.out.view(d.out.itemsize() == 2 ? at::kShort : at::kInt).fill_(-1);
  if (!d.state.defined()) return;
  const bool aligned = reinterpret_cast<uintptr_t>(d.state.const_data_ptr()) % kGroupAlignment == 0;
  if (!aligned || d.state.is_same(d.final_state)) d.state = d.state.clone();
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
  std::vector<DirectionTensors> used = directions;
  if (plan.tier == Tier::kGroup) std::for_each(used.begin(), used.end(), prepare_for_groups);
  for (size_t d = 0; d < used.size(); ++d)
    a.direction[d] = direction_of(layout, backward, ranges[d], used[d]);
  if (plan.tier == Tier::kGroup)
    check_launch(group_recurrence(a, plan.rows, plan.groups, current_stream()));
  else
    check_launch(a.type == Type::kFloat ? ffma_recurrence(a, plan.rows, current_stream())
                                        : mma_recurrence(a, current_stream()));
}

}  // namespace fastrnn::cuda
