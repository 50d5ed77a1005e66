// SPDX-License-Identifier: Apache-2.0
//
// Backward of one direction of a layer, from its input and output alone:
//
//   delta_t = (grad_y_t + delta_{t+1} W_hh) f'(y_t)            recurrence.h
//   grad_x = delta W_ih     grad_W_ih = delta^T x     grad_b = sum delta
//   grad_hx = delta_0 W_hh  grad_W_hh = delta^T h_prev,  h_prev = hx, y_0, y_1, ...
//
// The products run over a chunk of steps at a time, so that delta's workspace does not grow with T.
// Included by layer_backward.cpp alone.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include <cstring>

#include "layer_common.h"

namespace fastrnn::cpu {

namespace {

/// sum += a b; the first product makes it.
void add_product(Tensor& sum, const Tensor& a, const Tensor& b) {
  const bool first = !sum.defined();
  if (first) sum = at::empty({a.size(0), b.size(1)}, a.options());
  multiply(a, b, sum, /*accumulate=*/!first);
}

/// The sum of all rows. ATen's waits for all threads, however late they come, as its products do;
/// where these are not fast, a row of ones times the rows.
Tensor sum_of_rows(const Tensor& rows) {
  if (has_fast_product(rows.scalar_type())) return rows.sum(0);
  Tensor sum;
  add_product(sum, at::ones({1, rows.size(0)}, rows.options()), rows);
  return sum[0];
}

/// Consecutive steps of one direction: what the recurrence reads and writes.
struct Chunk {
  Range range;
  int64_t y_begin;          // first step of y
  Tensor y, grad_y, delta;  // [.., H]; grad_y may be undefined, or delta itself
  bool from_above = false;  // grad_y is a workspace, like delta, and not the call's
};

/// The walk of one direction through its chunks, against the forward's time. T: the type computed
/// in. A chunk's tensors are of type T where our kernels make the gradients, else of the caller's.
template <typename T>
class DirectionBackward {
 public:
  DirectionBackward(const Layout& layout, const Plan& plan, const Layer& layer, int64_t d,
                    const Tensor& grad_h_n, const WantedGradients& wanted)
      : layout_(layout),
        plan_(plan),
        input_(layer.input),
        cell_(layer.cells[d]),
        activation_(layer.activation),
        d_(d),
        H_(layer.hidden_size()),
        wanted_(wanted.cells[d]),
        chunk_type_(plan.own_gradients ? kType : layer.input.scalar_type()) {
    if (layer.hx.defined()) hx_ = readable(layer.hx[d], chunk_type_);
    if (grad_h_n.defined()) grad_h_n_ = readable(grad_h_n[d], kType);
    if (wanted.hx.defined()) delta_first_ = at::empty({layout.B, H_}, input_.options());
  }

  bool reverse() const { return d_ == 1; }

  /// I and H.
  std::pair<int64_t, int64_t> sizes() const { return {cell_.w_ih.size(1), H_}; }

  /// Chunk number i of the walk, without grad_y and delta.
  Chunk chunk(int64_t i, const Tensor& output) const {
    Chunk c;
    c.range = part_of({0, layout_.T}, plan_.backward_steps, i, /*descending=*/!reverse());
    // The outputs of the chunk, and of the neighbouring step whose state enters it.
    c.y_begin = reverse() ? c.range.begin : std::max<int64_t>(0, c.range.begin - 1);
    const int64_t y_end = reverse() ? std::min(layout_.T, c.range.end + 1) : c.range.end;
    c.y = columns(output, {c.y_begin, y_end});
    return c;
  }

  /// This direction's columns of a chunk of [.., D * H].
  Tensor columns(const Tensor& t, Range range) const {
    return readable(narrow_direction(narrow_steps(layout_, t, range), d_, H_), chunk_type_);
  }

  Tensor make_delta(Range range) const { return make_delta(range, chunk_type_); }

  /// delta of a chunk whose tensors are of type T, to read or to write.
  template <typename Value>
  Sequence<Value> delta_of(const Chunk& c) const {
    return sequence_of<Value>(layout_, c.delta, c.range.begin, 0, layout_.rows_before);
  }

  /// The recurrence's arguments for a chunk whose tensors are of type T.
  BackwardArgs<T> recurrence_args(const Chunk& c) const {
    BackwardArgs<T> a;
    a.steps = steps_of(layout_, c.range.begin, c.range.end, /*descending=*/!reverse(), carry_rows_);
    a.H = H_;
    a.activation = activation_;
    a.w_hh_panels = w_hh_panels_.data();
    a.w_hh = matrix_of<T>(w_hh_);
    a.grad_y = sequence_of<const T>(layout_, c.grad_y, c.range.begin, 0,
                                    c.from_above ? layout_.rows_before : layout_.first_row);
    a.grad_h_n = matrix_of<T>(grad_h_n_);
    a.carry = matrix_of<T>(carry_);
    a.y = sequence_of<const T>(layout_, c.y, c.y_begin, 0);
    a.delta = delta_of<T>(c);
    return a;
  }

  /// W_hh is packed anew for every chunk, which costs little beside the chunk, so that it is not in
  /// memory during the chunk's products, if they come after the walk.
  void pack() {
    if (layout_.T == 1) return;
    if (plan_.backward_packs)
      w_hh_panels_ = Panels<T>(cell_.w_hh, /*transposed=*/false);
    else
      w_hh_ = readable(cell_.w_hh, kType);
  }
  void unpack() {
    w_hh_panels_ = {};
    w_hh_ = Tensor();
  }

  /// Keeps what is read of delta later: of the last step walked, and of each row's first step.
  void keep_states(const Chunk& c) {
    keep_first_delta(c);
    const int64_t last = last_step(c);
    if (last == (reverse() ? layout_.T - 1 : 0)) {
      carry_ = Tensor();
      return;
    }
    carry_rows_ = layout_.rows(last);
    carry_ = converted(rows_at(c, last, 0, carry_rows_), c.delta.scalar_type());
  }

  /// The recurrence with a product by ATen in each step, made where delta_t will be:
  ///   delta_t = ( grad_y_t + delta_{t+1} W_hh ) f'(y_t)
  /// Not added to grad_y by ATen: a sum that starts from a large term loses digits. So grad_y must
  /// not be delta's memory here.
  void run_by_steps(const Chunk& c) {
    Plan alone = plan_;
    alone.column_blocks = 1;  // there is no product to share
    for (int64_t i = 0; i < parts_in(c.range, 1); ++i) {
      Chunk step;
      step.range = part_of(c.range, 1, i, /*descending=*/!reverse());
      step.y_begin = step.range.begin;
      step.y = narrow_steps(layout_, c.y, step.range, c.y_begin);
      step.delta = narrow_steps(layout_, c.delta, step.range, c.range.begin);
      if (c.grad_y.defined())
        step.grad_y = narrow_steps(layout_, c.grad_y, step.range, c.range.begin);
      const Tensor carry = std::move(carry_);  // the product is made here: the kernel adds none
      BackwardArgs<T> a = recurrence_args(step);
      a.steps.carry_rows = 0;
      if (carry.defined()) {
        multiply(carry, cell_.w_hh, step.delta[0]);
        a.grad_h_n = step.grad_y.defined() ? matrix_of<T>(step.grad_y[0]) : Matrix<const T>{};
        a.grad_y = sequence_of<const T>(layout_, step.delta, step.range.begin, 0);
      }
      run_parts(layout_, alone, std::vector{a}, kernels<T>().backward);
      carry_ = step.delta[0];
    }
  }

  /// The recurrence of a 16-bit chunk: a few steps at a time are converted to float32 and back;
  /// what passes from step to step stays in float32.
  void run_converted(const Chunk& c) {
    for (int64_t i = 0; i < parts_in(c.range, plan_.convert_steps); ++i) {
      Chunk part;
      part.range = part_of(c.range, plan_.convert_steps, i, /*descending=*/!reverse());
      part.y_begin = part.range.begin;
      part.y = readable(narrow_steps(layout_, c.y, part.range, c.y_begin), kType);
      if (c.grad_y.defined())
        part.grad_y = readable(narrow_steps(layout_, c.grad_y, part.range, c.range.begin), kType);
      part.delta = make_delta(part.range, kType);
      run_parts(layout_, plan_, std::vector{recurrence_args(part)}, kernels<T>().backward);
      copy(part.delta, narrow_steps(layout_, c.delta, part.range, c.range.begin));
      keep_states(part);
    }
  }

  /// Whether the weights' gradients are made beside the walk, by parts of a chunk.
  bool makes_gradients_beside() const {
    return plan_.gradient_steps < layout_.T && wants_weights();
  }

  /// The recurrence of a part of a chunk, after the parts of later steps, by one thread.
  void walk_part(const Chunk& c, Range part) const {
    BackwardArgs<T> a = recurrence_args(c);
    a.row_end = layout_.B;
    a.steps.begin = part.begin;
    a.steps.end = part.end;
    if (part.end < c.range.end) {
      a.steps.carry_rows = layout_.rows(part.end);
      a.carry = {a.delta.row(part.end, 0), a.delta.row_stride};
    }
    kernels<T>().backward(a);
  }

  /// The weights' gradients by our kernel: one pass over a chunk's steps, or several over parts.
  struct OuterProducts {
    WeightGradientArgs<T> args;
    Tensor x, workspace;

    /// Part `i` of args.parts, over the steps `range`, the state before which has `carry_rows`.
    void add(int64_t i, Range range, int64_t carry_rows, bool is_first) const {
      WeightGradientArgs<T> a = args;
      a.overwrites = a.overwrites && is_first;
      a.part = i;
      a.steps.begin = range.begin;
      a.steps.end = range.end;
      a.steps.carry_rows = carry_rows;
      if (a.workspace) a.workspace += i * a.packed_rows * kernels<T>().packed_columns;
      kernels<T>().weight_gradients(a);
    }
  };

  /// For `parts` parts of each gradient, of so many rows at a time.
  OuterProducts outer_products(const Chunk& c, int64_t parts, int64_t rows_at_once) {
    OuterProducts products;
    if (wanted_[0]) products.x = readable(narrow_steps(layout_, input_, c.range), kType);
    WeightGradientArgs<T>& a = products.args;
    a.steps = steps_of(layout_, c.range.begin, c.range.end, /*descending=*/reverse(), 0);
    a.I = cell_.w_ih.size(1);
    a.H = H_;
    a.x = sequence_of<const T>(layout_, products.x, c.range.begin, 0);
    a.y = sequence_of<const T>(layout_, c.y, c.y_begin, 0);
    a.hx = matrix_of<T>(hx_);
    a.delta = delta_of<const T>(c);
    a.overwrites = !sums_.w_ih.defined() && !sums_.w_hh.defined();
    if (a.overwrites && wanted_[0]) sums_.w_ih = at::empty({H_, a.I}, sum_options());
    if (a.overwrites && wanted_[1]) sums_.w_hh = at::empty({H_, H_}, sum_options());
    if (wanted_[0]) a.grad_w_ih = mutable_data_of<Sum<T>>(sums_.w_ih);
    if (wanted_[1]) a.grad_w_hh = mutable_data_of<Sum<T>>(sums_.w_hh);
    if (wanted_[2] || wanted_[3]) grad_b_.resize(H_);  // zeros before the first chunk
    if (!grad_b_.empty()) a.grad_b = grad_b_.data();
    a.parts = parts;
    const int64_t columns = kernels<T>().packed_columns;
    if (columns > 0) {
      // An eighth of delta's memory, if that is enough rows.
      constexpr int64_t kLeastRows = 128;
      const int64_t rows = c.delta.numel() / 8 / (a.parts * columns);
      a.packed_rows =
          std::min(std::clamp(rows, kLeastRows, kernels<T>().packed_rows), rows_at_once);
      a.packed_rows = (a.packed_rows + 1) / 2 * 2;
      products.workspace = at::empty({a.parts, a.packed_rows, columns}, c.delta.options());
      a.workspace = mutable_data_of<T>(products.workspace);
    }
    return products;
  }

  /// Rows of the state before the steps `range`, in forward order.
  int64_t rows_before(Range range) const {
    const int64_t before = reverse() ? range.end : range.begin - 1;
    return before >= 0 && before < layout_.T ? layout_.rows(before) : 0;
  }

  /// Of W_ih, for delta W_ih.
  Panels<T> input_panels() const { return Panels<T>(cell_.w_ih, /*transposed=*/false); }

  /// The weights' gradients of a chunk, where they are not made beside the walk.
  void add_weight_gradients(const Chunk& c) {
    if (plan_.own_gradients)
      add_outer_products(c);
    else
      add_products(c);
  }

  /// grad_input: of the chunk's steps, added to where `accumulate`.
  void add_input_gradient(const Chunk& c, const Tensor& grad_input, bool accumulate) {
    if (plan_.own_input_gradient) return multiply_delta(c, grad_input, accumulate);
    const Tensor out = as_rows(grad_input);
    TORCH_INTERNAL_ASSERT(out.is_alias_of(grad_input));
    multiply(as_rows(c.delta), cell_.w_ih, out, accumulate);
  }

  /// The gradients, undefined where not wanted, and as they were added up: our kernel's may be
  /// wider than the caller's dtype. grad_hx [B, H] or undefined.
  Cell finish(const Tensor& grad_hx) {
    if (grad_hx.defined()) multiply(delta_first_, cell_.w_hh, grad_hx);
    if (!grad_b_.empty()) {
      sums_.b_ih = at::empty({H_}, sum_options());
      std::memcpy(sums_.b_ih.mutable_data_ptr(), grad_b_.data(), sums_.b_ih.nbytes());
    }
    Cell result = sums_;
    // A single step without hx has no previous state.
    if (wanted_[1] && !sums_.w_hh.defined()) result.w_hh = at::zeros({H_, H_}, sum_options());
    // Both biases have the same gradient, each in its own tensor.
    if (wanted_[3]) result.b_hh = sums_.b_ih;
    if (!wanted_[2]) result.b_ih = Tensor();
    if (wanted_[2] && wanted_[3]) {
      result.b_hh = at::empty({H_}, sum_options());
      copy_contiguous(sums_.b_ih, result.b_hh);
    }
    return result;
  }

 private:
  static constexpr at::ScalarType kType = kScalarType<T>;

  at::TensorOptions sum_options() const {
    return plan_.own_gradients ? input_.options().dtype(kScalarType<Sum<T>>) : input_.options();
  }

  Tensor make_delta(Range range, at::ScalarType type) const {
    const auto options = input_.options().dtype(type);
    if (layout_.packed())
      return at::empty({layout_.offset(range.end) - layout_.offset(range.begin), H_}, options);
    return at::empty({range.end - range.begin, layout_.B, H_}, options);
  }

  bool wants_weights() const { return wanted_[0] || wanted_[1] || wanted_[2] || wanted_[3]; }

  int64_t last_step(const Chunk& c) const { return reverse() ? c.range.end - 1 : c.range.begin; }

  /// Rows [first, first + count) of delta at step t.
  Tensor rows_at(const Chunk& c, int64_t t, int64_t first, int64_t count) const {
    const int64_t start = layout_.offset(t) - layout_.offset(c.range.begin) + first;
    return c.delta.view({-1, H_}).narrow(0, start, count);
  }

  /// Copies the rows whose first step, in forward order, lies in the chunk.
  void keep_first_delta(const Chunk& c) {
    if (!delta_first_.defined()) return;
    if (!reverse()) {
      if (c.range.begin == 0) copy(rows_at(c, 0, 0, layout_.B), delta_first_);
      return;
    }
    for (int64_t t = c.range.begin; t < c.range.end; ++t) {
      const int64_t ongoing = t + 1 < layout_.T ? layout_.rows(t + 1) : 0;
      const int64_t count = layout_.rows(t) - ongoing;
      if (count > 0) copy(rows_at(c, t, ongoing, count), delta_first_.narrow(0, ongoing, count));
    }
  }

  void add_outer_products(const Chunk& c) {
    if (!wants_weights()) return;
    const OuterProducts products =
        outer_products(c, plan_.parallel ? available_threads() : 1, c.delta.numel() / H_);
    share(products.args.parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) products.add(i, c.range, rows_before(c.range), true);
    });
  }

  /// grad_x = [grad_x +] delta W_ih by our kernel.
  void multiply_delta(const Chunk& c, const Tensor& grad_input, bool accumulate) {
    if (grad_input.scalar_type() != kType) {
      const Tensor product = at::empty(grad_input.sizes(), grad_input.options().dtype(kType));
      multiply_delta(c, product, /*accumulate=*/false);
      if (accumulate)
        run_in_parts(grad_input, product, [](const Tensor& t, const Tensor& p) { t.add_(p); });
      else
        copy(product, grad_input);
      return;
    }
    const Panels<T> w_ih = input_panels();
    ProductArgs<T> a = w_ih.product();
    a.accumulate = accumulate;
    // Of a part of a packed batch: a workspace has its rows alone, the call's tensor others
    // between.
    const bool has_others = grad_input.numel() != c.delta.numel() / H_ * a.N;
    multiply_steps(layout_, c.range, delta_of<const T>(c), a,
                   sequence_of<T>(layout_, grad_input, c.range.begin, 0,
                                  has_others ? layout_.first_row : layout_.rows_before),
                   plan_.parallel);
  }

  /// Weight gradients by matrix products.
  void add_products(const Chunk& c) {
    const Tensor rows = as_rows(c.delta), delta_t = rows.t();
    if (wanted_[2] || wanted_[3]) {
      const Tensor sum = sum_of_rows(rows);
      if (sums_.b_ih.defined())
        sums_.b_ih.add_(sum);
      else
        sums_.b_ih = sum;
    }
    if (wanted_[0])
      add_product(sums_.w_ih, delta_t, as_rows(narrow_steps(layout_, input_, c.range)));
    if (!wanted_[1]) return;
    if (layout_.packed()) {
      add_product(sums_.w_hh, delta_t, gather_previous(c));
      return;
    }
    const int64_t first = reverse() ? layout_.T - 1 : 0;
    const bool has_first = c.range.begin <= first && first < c.range.end;
    // Steps whose previous state is an output: all but `first`.
    const int64_t from = has_first && !reverse() ? c.range.begin + 1 : c.range.begin;
    const int64_t to = has_first && reverse() ? c.range.end - 1 : c.range.end;
    if (from < to) {
      const int64_t shift = reverse() ? 1 : -1;
      add_product(sums_.w_hh,
                  as_rows(narrow_steps(layout_, c.delta, {from, to}, c.range.begin)).t(),
                  as_rows(narrow_steps(layout_, c.y, {from + shift, to + shift}, c.y_begin)));
    }
    if (has_first && hx_.defined())
      add_product(sums_.w_hh, rows_at(c, first, 0, layout_.B).t(), hx_);
  }

  /// h_prev of packed rows, gathered: row (t, b) is y at b's previous step, or hx, or zero.
  Tensor gather_previous(const Chunk& c) const {
    const Tensor previous = at::empty_like(c.delta);
    const size_t row_bytes = H_ * previous.element_size();
    const size_t y_stride = c.y.stride(0) * previous.element_size();
    char* out = static_cast<char*>(previous.mutable_data_ptr());
    const char* states = static_cast<const char*>(c.y.const_data_ptr());
    const char* initial = hx_.defined() ? static_cast<const char*>(hx_.const_data_ptr()) : nullptr;
    const size_t hx_stride = initial ? hx_.stride(0) * previous.element_size() : 0;
    const int64_t origin = layout_.position(c.y_begin);
    for (int64_t t = c.range.begin; t < c.range.end; ++t) {
      const int64_t before = reverse() ? t + 1 : t - 1;
      const int64_t ongoing =
          before < 0 || before >= layout_.T ? 0 : std::min(layout_.rows(before), layout_.rows(t));
      for (int64_t b = 0; b < layout_.rows(t); ++b, out += row_bytes) {
        if (b < ongoing)
          std::memcpy(out, states + (layout_.position(before) - origin + b) * y_stride, row_bytes);
        else if (initial)
          std::memcpy(out, initial + b * hx_stride, row_bytes);
        else
          std::memset(out, 0, row_bytes);
      }
    }
    return previous;
  }

  const Layout& layout_;
  const Plan& plan_;
  const Tensor& input_;
  const Cell& cell_;
  const Activation activation_;
  const int64_t d_, H_;
  const std::array<bool, 4> wanted_;
  const at::ScalarType chunk_type_;
  Tensor hx_, grad_h_n_;  // [B, H] or undefined; hx_ as chunks, grad_h_n_ in T
  // W_hh for the kernels, untransposed, in T, between pack() and unpack(): packed, or as it is.
  Panels<T> w_hh_panels_;
  Tensor w_hh_;
  Tensor carry_;  // delta of the last step walked, [carry_rows_, H]; in T for the kernels
  int64_t carry_rows_ = 0;
  Tensor delta_first_;  // [B, H] delta at each row's first forward step; undefined if not wanted
  Cell sums_;           // undefined before the first chunk; b_hh is not used
  std::vector<Sum<T>> grad_b_;  // in place of sums_.b_ih, by our kernel: [H] or empty
};

}  // namespace

}  // namespace fastrnn::cpu
