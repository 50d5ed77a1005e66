// SPDX-License-Identifier: Apache-2.0
//
// The steps walk: in each step a product by cuBLAS, and one kernel for all else.
#include <ATen/ops/empty.h>

#include <algorithm>

#include "cublas.h"
#include "walks.h"

namespace fastrnn::cuda {

namespace {

/// Its time is that of the calls from the host, so a step makes no tensor unless rows end there.
class StepsWalk {
 public:
  StepsWalk(const Layout& layout, Activation activation, bool backward, Range range,
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

}  // namespace

void walk_by_steps(const Layout& layout, Activation activation, bool backward, Range range,
                   const DirectionTensors& direction) {
  StepsWalk(layout, activation, backward, range, direction).run();
}

}  // namespace fastrnn::cuda
