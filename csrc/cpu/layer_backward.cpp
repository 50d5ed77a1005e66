// SPDX-License-Identifier: Apache-2.0
//
// Backward of one layer, from its input and output alone:
//
//   delta_t = (grad_y_t + delta_{t+1} W_hh) f'(y_t)            recurrence.h
//   grad_x = delta W_ih     grad_W_ih = delta^T x     grad_b = sum delta
//   grad_hx = delta_0 W_hh  grad_W_hh = delta^T h_prev,  h_prev = hx, y_0, y_1, ...
//
// The products run over a chunk of steps at a time, so that delta's workspace does not grow with T.
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include <cstring>

#include "layer_common.h"

namespace fastrnn::cpu {

namespace {

/// A zeroed tensor to add a gradient up in: `wanted` itself where it has the type computed in;
/// undefined where it is.
Tensor accumulator(const Tensor& wanted, at::ScalarType type) {
  if (!wanted.defined()) return wanted;
  return wanted.scalar_type() == type ? wanted.zero_()
                                      : at::zeros(wanted.sizes(), wanted.options().dtype(type));
}

/// Copies a sum to its destination, unless it was made there.
void deliver(const Tensor& sum, const Tensor& destination) {
  if (!destination.defined() || destination.is_same(sum)) return;
  if (destination.scalar_type() == sum.scalar_type())
    copy_contiguous(sum, destination);
  else
    destination.copy_(sum);
}

/// out = a b, or out += a b.
void multiply_into(Tensor out, const Tensor& a, const Tensor& b, bool accumulate) {
  if (accumulate)
    out.addmm_(a, b);
  else
    at::mm_out(out, a, b);
}

template <typename T>
struct Chunk;

/// The walk of one direction of one layer through its chunks, against the forward's time.
template <typename T>
struct DirectionBackward {
  const Layout& layout;
  const Plan& plan;
  Activation activation;
  bool reverse;          // of the forward
  bool both_directions;  // another walk adds to the same grad_input
  int64_t H;
  // In the type computed in. w_hh_panels: of W_hh, untransposed.
  Tensor w_ih, w_hh, w_hh_panels, hx, grad_h_n;
  CellGradients sums;  // float or double accumulators; undefined where not wanted
  Tensor delta_first;  // [B, H] delta at each row's first forward step; undefined if not wanted

  // What the previous chunk leaves: delta of its last step.
  Tensor carry;
  int64_t carry_rows = 0;

  DirectionBackward(const Layout& layout, const Plan& plan, const Cell& cell, Activation activation,
                    bool reverse, bool both_directions, const Tensor& hx, const Tensor& grad_h_n,
                    const CellGradients& wanted, bool wants_hx)
      : layout(layout),
        plan(plan),
        activation(activation),
        reverse(reverse),
        both_directions(both_directions),
        H(cell.w_hh.size(0)),
        hx(hx),
        grad_h_n(grad_h_n) {
    const at::ScalarType type = c10::CppTypeToScalarType<T>::value;
    w_ih = cell.w_ih.to(type);
    w_hh = cell.w_hh.to(type);
    w_hh_panels = pack_weight<T>(w_hh, /*transposed=*/false);
    sums.w_ih = accumulator(wanted.w_ih, type);
    sums.w_hh = accumulator(wanted.w_hh, type);
    // Both biases have the same gradient: one sum, in whichever is wanted.
    sums.b_ih = accumulator(wanted.b_ih.defined() ? wanted.b_ih : wanted.b_hh, type);
    if (wants_hx) delta_first = at::zeros({layout.B, H}, w_hh.options());
  }

  BackwardArgs<T> kernel_args(const Chunk<T>& chunk) const;

  /// Remembers what the next chunk and grad_hx need of this one. delta: rows of [begin, end).
  void keep_boundary(const Tensor& delta, int64_t begin, int64_t end) {
    const bool more_chunks = begin != 0 || end != layout.T;
    if (!more_chunks && !delta_first.defined()) return;
    const Tensor rows = delta.view({-1, H});
    const int64_t last = reverse ? end - 1 : begin;
    carry_rows = layout.rows(last);
    const Tensor boundary = rows.narrow(0, layout.offset(last) - layout.offset(begin), carry_rows);
    if (more_chunks) carry = boundary.clone();
    if (!delta_first.defined()) return;
    // Rows that begin, in forward order, at step t: all at 0, or those that step t + 1 lacks.
    for (int64_t t = begin; t < (reverse ? end : std::min<int64_t>(end, begin == 0 ? 1 : begin));
         ++t) {
      const int64_t ongoing = reverse && t + 1 < layout.T ? layout.rows(t + 1) : 0;
      const int64_t count = layout.rows(t) - ongoing;
      if (count == 0) continue;
      delta_first.narrow(0, ongoing, count)
          .copy_(rows.narrow(0, layout.offset(t) - layout.offset(begin) + ongoing, count));
    }
  }

  /// All weight gradients of steps [begin, end), by our own outer product where the hidden size is
  /// small, else by ATen's.
  void add_weight_gradients(const Chunk<T>& chunk, const Tensor& input) {
    if (!sums.w_ih.defined() && !sums.w_hh.defined() && !sums.b_ih.defined()) return;
    const Tensor x =
        sums.w_ih.defined()
            ? readable(narrow_steps(layout, input, chunk.begin, chunk.end), w_ih.scalar_type())
            : Tensor();
    if (plan.own_outer_product) {
      add_outer_products(chunk, x);
      return;
    }
    const Tensor rows = chunk.delta.view({-1, H});
    if (sums.b_ih.defined()) sums.b_ih.add_(rows.sum(0));
    if (sums.w_ih.defined()) sums.w_ih.addmm_(rows.t(), as_rows(x));
    if (sums.w_hh.defined()) {
      const Tensor y =
          layout.packed() || layout.B == 0
              ? chunk.y
              : chunk.y.as_strided({chunk.y.size(0) * layout.B, H}, {chunk.y.stride(1), 1});
      add_grad_w_hh(chunk.delta, y, chunk.y_begin, chunk.begin, chunk.end);
    }
  }

  void add_outer_products(const Chunk<T>& chunk, const Tensor& x) {
    WeightGradientArgs<T> a;
    a.steps = layout.steps(chunk.begin, chunk.end, /*descending=*/reverse, 0);
    const int64_t before = reverse ? chunk.end : chunk.begin - 1;
    if (before >= 0 && before < layout.T) a.steps.carry_rows = layout.rows(before);
    a.I = w_ih.size(1);
    a.H = H;
    a.x = sequence_of<const T>(layout, x, chunk.begin, 0);
    a.y = sequence_of<const T>(layout, chunk.y, chunk.y_begin, 0);
    a.hx = matrix_of<T>(hx);
    a.delta = sequence_of<const T>(layout, chunk.delta, chunk.begin, 0);
    const auto target = [](const Tensor& t) {
      return t.defined() ? t.mutable_data_ptr<T>() : nullptr;
    };
    a.grad_w_ih = target(sums.w_ih);
    a.grad_w_hh = target(sums.w_hh);
    a.grad_b = target(sums.b_ih);
    a.parts = plan.parallel ? available_threads() : 1;
    const auto run = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        WeightGradientArgs<T> part = a;
        part.part = i;
        kernels<T>().weight_gradients(part);
      }
    };
    if (a.parts == 1)
      run(0, 1);
    else
      at::parallel_for(0, a.parts, 1, run);
  }

  /// grad_W_hh += delta^T h_prev over steps [begin, end). y: the rows of this direction's columns,
  /// [rows, H], its first row that of step y_begin.
  void add_grad_w_hh(const Tensor& delta, const Tensor& y, int64_t y_begin, int64_t begin,
                     int64_t end) {
    const Tensor rows = delta.view({-1, H});
    if (layout.packed()) {
      sums.w_hh.addmm_(rows.t(), gather_previous(y, y_begin, begin, end));
      return;
    }
    const int64_t B = layout.B, first = reverse ? layout.T - 1 : 0;
    const bool has_first = begin <= first && first < end;
    // Steps whose previous state is an output: all but `first`.
    const int64_t from = has_first && !reverse ? begin + 1 : begin;
    const int64_t to = has_first && reverse ? end - 1 : end;
    if (from < to) {
      const int64_t shift = reverse ? 1 : -1;
      sums.w_hh.addmm_(rows.narrow(0, (from - begin) * B, (to - from) * B).t(),
                       y.narrow(0, (from + shift - y_begin) * B, (to - from) * B));
    }
    if (has_first && hx.defined()) sums.w_hh.addmm_(rows.narrow(0, (first - begin) * B, B).t(), hx);
  }

  /// h_prev of packed rows, gathered: row (t, b) is y at b's previous step, or hx, or zero.
  Tensor gather_previous(const Tensor& y, int64_t y_begin, int64_t begin, int64_t end) const {
    const int64_t count = layout.offset(end) - layout.offset(begin);
    const Tensor previous = at::empty({count, H}, w_hh.options());
    T* out = previous.mutable_data_ptr<T>();
    const T* states = y.const_data_ptr<T>();
    const T* initial = hx.defined() ? hx.const_data_ptr<T>() : nullptr;
    const int64_t origin = layout.offset(y_begin);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t before = reverse ? t + 1 : t - 1;
      const int64_t ongoing =
          before < 0 || before >= layout.T ? 0 : std::min(layout.rows(before), layout.rows(t));
      for (int64_t b = 0; b < layout.rows(t); ++b, out += H) {
        const T* from = b < ongoing ? states + (layout.offset(before) - origin + b) * y.stride(0)
                        : initial   ? initial + b * hx.stride(0)
                                    : nullptr;
        if (from)
          std::memcpy(out, from, H * sizeof(T));
        else
          std::memset(out, 0, H * sizeof(T));
      }
    }
    return previous;
  }

  /// grad_x = delta W_ih over steps [begin, end).
  void add_grad_input(const Tensor& delta, const Tensor& grad_input, int64_t begin,
                      int64_t end) const {
    const Tensor rows = delta.view({-1, H});
    if (!grad_input.defined()) return;
    const Tensor target = narrow_steps(layout, grad_input, begin, end);
    // Two directions add up in a zeroed tensor, since their chunks meet it in opposite orders.
    const bool accumulate = both_directions;
    if (target.scalar_type() == w_ih.scalar_type())
      multiply_into(target.view({-1, w_ih.size(1)}), rows, w_ih, accumulate);
    else if (accumulate)
      target.add_(rows.mm(w_ih).view(target.sizes()));
    else
      target.copy_(rows.mm(w_ih).view(target.sizes()));
  }

  void write(const CellGradients& out, const Tensor& grad_hx) const {
    deliver(sums.w_ih, out.w_ih);
    deliver(sums.w_hh, out.w_hh);
    deliver(sums.b_ih, out.b_ih);
    deliver(sums.b_ih, out.b_hh);
    if (grad_hx.defined()) grad_hx.copy_(delta_first.mm(w_hh));
  }
};

/// What one chunk of one direction reads and writes; keeps converted tensors alive.
template <typename T>
struct Chunk {
  int64_t begin, end, y_begin;
  Tensor y, grad_y, delta;  // [.., H] of this direction
  BackwardArgs<T> args;

  /// Chunk number i, counted in the order in which backward walks.
  Chunk(const DirectionBackward<T>& walk, int64_t i, int64_t d, const Tensor& output,
        const Tensor& grad_output) {
    const Layout& layout = walk.layout;
    const int64_t T_ = layout.T, steps = walk.plan.backward_steps;
    begin = walk.reverse ? i * steps : std::max<int64_t>(0, T_ - (i + 1) * steps);
    end = walk.reverse ? std::min(T_, (i + 1) * steps) : T_ - i * steps;
    // The outputs of the chunk, and of the neighbouring step whose state enters it.
    y_begin = walk.reverse ? begin : std::max<int64_t>(0, begin - 1);
    const int64_t y_end = walk.reverse ? std::min(T_, end + 1) : end;
    const at::ScalarType type = walk.w_hh.scalar_type();
    const auto columns = [&](const Tensor& t, int64_t from, int64_t to) {
      return readable(narrow_direction(narrow_steps(layout, t, from, to), d, walk.H), type);
    };
    y = columns(output, y_begin, y_end);
    if (grad_output.defined()) grad_y = columns(grad_output, begin, end);
    delta = layout.packed() ? at::empty({layout.offset(end) - layout.offset(begin), walk.H},
                                        walk.w_hh.options())
                            : at::empty({end - begin, layout.B, walk.H}, walk.w_hh.options());
    args = walk.kernel_args(*this);
  }
};

template <typename T>
BackwardArgs<T> DirectionBackward<T>::kernel_args(const Chunk<T>& chunk) const {
  BackwardArgs<T> a;
  a.steps = layout.steps(chunk.begin, chunk.end, /*descending=*/!reverse, carry_rows);
  a.H = H;
  a.activation = activation;
  a.w_hh_panels = w_hh_panels.const_data_ptr<T>();
  a.grad_y = sequence_of<const T>(layout, chunk.grad_y, chunk.begin, 0);
  a.grad_h_n = matrix_of<T>(grad_h_n);
  a.carry = matrix_of<T>(carry);
  a.y = sequence_of<const T>(layout, chunk.y, chunk.y_begin, 0);
  a.delta = sequence_of<T>(layout, chunk.delta, chunk.begin, 0);
  return a;
}

template <typename T>
void backward_as(const Layout& layout, const Plan& plan, const Tensor& input, const Tensor& hx,
                 const std::vector<Cell>& cells, Activation activation, const Tensor& output,
                 const Tensor& grad_output, const Tensor& grad_h_n, const LayerGradients& grads) {
  const at::ScalarType type = c10::CppTypeToScalarType<T>::value;
  const int64_t D = static_cast<int64_t>(cells.size());
  const Tensor state = readable(hx, type), grad_state = readable(grad_h_n, type);
  std::vector<DirectionBackward<T>> walks;
  for (int64_t d = 0; d < D; ++d) {
    walks.emplace_back(
        layout, plan, cells[d], activation, d == 1, D == 2, state.defined() ? state[d] : Tensor(),
        grad_state.defined() ? grad_state[d] : Tensor(), grads.cells[d], grads.hx.defined());
  }
  if (D == 2 && grads.input.defined()) grads.input.zero_();
  const int64_t chunks = (layout.T + plan.backward_steps - 1) / plan.backward_steps;
  for (int64_t i = 0; i < chunks; ++i) {
    std::vector<Chunk<T>> parts;
    for (int64_t d = 0; d < D; ++d) parts.emplace_back(walks[d], i, d, output, grad_output);
    for_each_part(layout, plan, D, [&](int64_t d, int64_t row_begin, int64_t row_end) {
      BackwardArgs<T> part = parts[d].args;
      part.row_begin = row_begin;
      part.row_end = row_end;
      kernels<T>().backward(part);
    });
    for (int64_t d = 0; d < D; ++d) {
      const Chunk<T>& c = parts[d];
      walks[d].keep_boundary(c.delta, c.begin, c.end);
      walks[d].add_weight_gradients(c, input);
      walks[d].add_grad_input(c.delta, grads.input, c.begin, c.end);
    }
  }
  for (int64_t d = 0; d < D; ++d)
    walks[d].write(grads.cells[d], grads.hx.defined() ? grads.hx[d] : Tensor());
}

}  // namespace

void layer_backward(const Layout& layout, const Tensor& input, const Tensor& hx,
                    const std::vector<Cell>& cells, Activation activation, const Tensor& output,
                    const Tensor& grad_output, const Tensor& grad_h_n,
                    const LayerGradients& gradients) {
  const int64_t D = static_cast<int64_t>(cells.size()), H = output.size(-1) / D;
  const Plan plan = plan_layer(layer_shape(layout, input, H, D), available_threads());
  if (output.scalar_type() == at::kDouble)
    backward_as<double>(layout, plan, input, hx, cells, activation, output, grad_output, grad_h_n,
                        gradients);
  else
    backward_as<float>(layout, plan, input, hx, cells, activation, output, grad_output, grad_h_n,
                       gradients);
}

}  // namespace fastrnn::cpu
