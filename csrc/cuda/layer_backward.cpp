// SPDX-License-Identifier: Apache-2.0
//
// Backward of one layer, from its input and output alone, as on the CPU:
//
//   delta_t = (grad_y_t + delta_{t+1} W_hh) f'(y_t)            recurrence.h
//   grad_x = delta W_ih     grad_W_ih = delta^T x     grad_b = sum delta
//   grad_hx = delta_0 W_hh  grad_W_hh = delta^T h_prev,  h_prev = hx, y_0, y_1, ...
//
// The products run over a chunk of steps at a time, so that delta's workspace does not grow with T.
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros_like.h>

#include "call_offsets.h"
#include "products.h"
#include "walks.h"

namespace fastrnn::cuda {

namespace {

/// sum += term; the first one makes it.
void add(Tensor& sum, const Tensor& term) {
  if (sum.defined())
    sum.add_(term);
  else
    sum = term;
}

/// The walk of one direction through its chunks, against the forward's time.
class DirectionBackward {
 public:
  DirectionBackward(const Layout& layout, const Layer& layer, int64_t d, const Tensor& first_row,
                    const Tensor& grad_h_n, const WantedGradients& wanted, bool several_chunks)
      : layout_(layout),
        input_(layer.input),
        first_row_(first_row),
        cell_(layer.cells[d]),
        d_(d),
        H_(layer.hidden_size()),
        wanted_(wanted.cells[d]) {
    cell_.w_hh = cell_.w_hh.contiguous();
    if (layer.hx.defined()) hx_ = layer.hx[d].contiguous();
    if (grad_h_n.defined()) grad_h_n_ = grad_h_n[d].contiguous();
    if (several_chunks || wanted.hx.defined())
      last_delta_ = at::empty({layout.B, H_}, input_.options());
  }

  bool reverse() const { return d_ == 1; }

  /// The recurrence over the steps `range`, the walk's first chunk or a later one.
  DirectionTensors tensors(Range range, bool first, const Tensor& output,
                           const Tensor& grad_output) const {
    const auto columns = [&](const Tensor& t) {
      return narrow_direction(narrow_steps(layout_, t, range), d_, H_);
    };
    DirectionTensors t;
    t.cell = cell_;
    t.y = columns(output);
    if (grad_output.defined()) t.addend = addressable(columns(grad_output));
    t.out = at::empty(t.y.sizes(), input_.options());
    t.grad_h_n = grad_h_n_;
    // delta passes from chunk to chunk here, and ends as that of each row's first step.
    t.final_state = last_delta_;
    if (!first) t.state = last_delta_;
    t.descending = !reverse();
    return t;
  }

  /// Everything that is made of a chunk's delta. grad_input: zeroed where `accumulate`, undefined
  /// if not wanted.
  void add_gradients(Range range, const Tensor& delta, const Tensor& output,
                     const Tensor& grad_input, bool accumulate) {
    const Tensor rows = as_rows(delta), delta_t = rows.t();
    if (wanted_[0]) add_product(sums_.w_ih, delta_t, as_rows(narrow_steps(layout_, input_, range)));
    if (wanted_[1]) add_recurrent_gradient(range, rows, output);
    if (wanted_[2] || wanted_[3])
      add(sums_.b_ih, at::sum(rows, {0}, /*keepdim=*/false, compute_type(rows.scalar_type())));
    if (grad_input.defined())
      product_out(as_rows(narrow_steps(layout_, grad_input, range)), rows, cell_.w_ih, accumulate);
  }

  /// The gradients, undefined where not wanted. grad_hx [B, H] or undefined.
  Cell finish(const Tensor& grad_hx) const {
    // cuDNN takes it from the recurrence, which in small layers is exact.
    if (grad_hx.defined())
      product_out(grad_hx, last_delta_, cell_.w_hh, /*accumulate=*/false, /*exact=*/true);
    const auto rounded = [&](const Tensor& t) {
      return t.defined() ? t.to(input_.scalar_type()) : t;
    };
    Cell result{rounded(sums_.w_ih), rounded(sums_.w_hh), {}, {}};
    // A single step without hx has no previous state.
    if (wanted_[1] && !result.w_hh.defined()) result.w_hh = at::zeros_like(cell_.w_hh);
    // Both biases have the same gradient, each in its own tensor.
    const Tensor bias = rounded(sums_.b_ih);
    if (wanted_[2]) result.b_ih = bias;
    if (wanted_[3]) result.b_hh = wanted_[2] ? bias.clone() : bias;
    return result;
  }

 private:
  /// grad_W_hh += delta^T h_prev
  void add_recurrent_gradient(Range range, const Tensor& rows, const Tensor& output) {
    const Tensor y = narrow_direction(output, d_, H_);
    if (layout_.packed()) {
      add_packed_recurrent_gradient(range, rows, y);
      return;
    }
    const int64_t B = layout_.B, first = reverse() ? layout_.T - 1 : 0;
    const bool has_first = range.begin <= first && first < range.end;
    // Steps whose previous state is an output: all but `first`.
    const int64_t from = has_first && !reverse() ? range.begin + 1 : range.begin;
    const int64_t to = has_first && reverse() ? range.end - 1 : range.end;
    const auto delta_t = [&](int64_t begin, int64_t end) {
      return rows.narrow(0, (begin - range.begin) * B, (end - begin) * B).t();
    };
    const int64_t shift = reverse() ? 1 : -1;
    if (from < to)
      add_product(sums_.w_hh, delta_t(from, to), as_rows(y.narrow(0, from + shift, to - from)));
    if (has_first && hx_.defined()) add_product(sums_.w_hh, delta_t(first, first + 1), hx_);
  }

  void add_packed_recurrent_gradient(Range range, const Tensor& rows, const Tensor& y) {
    PreviousArgs a;
    a.type = type_of(y);
    a.begin = range.begin;
    a.end = range.end;
    a.T = layout_.T;
    a.B = layout_.B;
    a.H = H_;
    a.first_row = first_row_.const_data_ptr<int64_t>();
    a.descending = reverse();
    a.y = y.const_data_ptr();
    a.y_stride = y.stride(0);
    a.hx = read_of(hx_);
    const Tensor previous = at::empty(rows.sizes(), rows.options());
    a.out = previous.mutable_data_ptr();
    check_launch(gather_previous(a, current_stream()));
    add_product(sums_.w_hh, rows.t(), previous);
  }

  const Layout& layout_;
  const Tensor& input_;
  const Tensor& first_row_;
  Cell cell_;
  const int64_t d_, H_;
  const std::array<bool, 4> wanted_;
  Tensor hx_, grad_h_n_, last_delta_;  // [B, H] or undefined
  Cell sums_;                          // of compute_type; b_hh is not used
};

}  // namespace

std::vector<Cell> layers_backward(const BackwardPass& pass) {
  const Layout& layout = pass.layout;
  const Layer& layer = pass.layers[0];
  const Tensor &output = pass.outputs[0], &grad_output = pass.grad_output;
  const Tensor& grad_h_n = pass.grad_h_n;
  const WantedGradients& wanted = pass.wanted[0];
  const int64_t D = layer.directions(), H = layer.hidden_size();
  const Plan plan =
      plan_layer({layout.T, layout.B, layer.input.size(-1), H, D, type_of(output)}, current_gpu());
  // The steps walk reads Layout's own. The gradient of w_hh gathers rows of packed data in a
  // kernel.
  const bool gathers = std::any_of(wanted.cells.begin(), wanted.cells.end(),
                                   [](const std::array<bool, 4>& cell) { return cell[1]; });
  const Tensor first_row =
      plan.walk != Walk::kSteps || gathers ? CallOffsets::first_row(layout, output) : Tensor();
  // Two directions add up in a zeroed tensor, since their chunks meet it in opposite orders.
  const bool accumulate = D == 2;
  if (accumulate && wanted.input.defined()) wanted.input.zero_();
  std::vector<DirectionBackward> walks;
  walks.reserve(D);
  for (int64_t d = 0; d < D; ++d)
    walks.emplace_back(layout, layer, d, first_row, grad_h_n, wanted, plan.chunk_steps < layout.T);
  for (int64_t i = 0; i < parts_in({0, layout.T}, plan.chunk_steps); ++i) {
    std::vector<Range> ranges;
    std::vector<DirectionTensors> directions;
    for (const DirectionBackward& walk : walks) {
      const Range range =
          part_of({0, layout.T}, plan.chunk_steps, i, /*descending=*/!walk.reverse());
      ranges.push_back(range);
      directions.push_back(walk.tensors(range, /*first=*/i == 0, output, grad_output));
    }
    run_walks(layout, plan, first_row, layer.activation, /*backward=*/true, ranges, directions);
    for (int64_t d = 0; d < D; ++d)
      walks[d].add_gradients(ranges[d], directions[d].out, output, wanted.input, accumulate);
  }
  std::vector<Cell> results;
  for (int64_t d = 0; d < D; ++d)
    results.push_back(walks[d].finish(wanted.hx.defined() ? wanted.hx[d] : Tensor()));
  return results;
}

}  // namespace fastrnn::cuda
