// SPDX-License-Identifier: Apache-2.0
//
// The gradients of one direction of a layer, from delta and what forward read:
//
//   grad_W_ih = delta^T x    grad_W_hh = delta^T h_prev    grad_b = sum delta
//   grad_x = delta W_ih      grad_hx = delta_0 W_hh        h_prev = hx, y_0, y_1, ...
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "delta_walk.h"

namespace fastrnn::cpu {

/// Sums over the chunks of a part of the batch.
template <typename T>
struct GradientSums {
  Tensor w_ih, w_hh;      // undefined where not wanted; not initialised until something is added
  std::vector<Sum<T>> b;  // [2, H], zeros at first, or empty: as WeightGradientArgs::grad_b
  bool is_empty = true;
};

/// Gradients of weights and biases. They are added up in Sum<T> by the kernels, in T by ATen.
template <typename T>
class WeightGradients {
 public:
  WeightGradients(const DeltaWalk<T>& walk, const std::array<bool, 4>& wanted)
      : walk_(walk), wanted_(wanted) {
    const Layer& layer = walk.layer;
    if (layer.hx.defined()) hx_ = readable(layer.hx[walk.d], kScalarType<T>);
    sums_.resize(walk.plan.sharing == Sharing::kByRows ? walk.plan.row_blocks : 1);
  }

  bool are_wanted() const { return wanted_[0] || wanted_[1] || wanted_[2] || wanted_[3]; }

  /// The input's steps as the kernels read them; undefined if they do not.
  Tensor input_of(Range range) const {
    if (!wanted_[0] || by_aten()) return Tensor();
    return readable(narrow_steps(walk_.layout, walk_.layer.input, range), kScalarType<T>);
  }

  /// Allocates the sums, and rows that the kernel packs for each of `shares` threads that add at
  /// the same time, bfloat16 only: at most `most`, else an eighth of delta's memory in all, if that
  /// is enough.
  void allocate(const Chunk& c, int64_t shares, int64_t most) {
    const int64_t H = walk_.hidden_size(), I = walk_.layer.input.size(-1);
    const auto options = c.delta.options().dtype(by_aten() ? kScalarType<T> : kScalarType<Sum<T>>);
    for (GradientSums<T>& sums : sums_) {
      if (wanted_[0] && !sums.w_ih.defined()) sums.w_ih = at::empty({H, I}, options);
      if (wanted_[1] && !sums.w_hh.defined()) sums.w_hh = at::empty({H, H}, options);
      if (wanted_[2] || wanted_[3]) sums.b.resize(2 * H);
    }
    const int64_t columns = kernels<T>().packed_columns;
    if (columns == 0 || by_aten()) return;
    constexpr int64_t kLeastRows = 128;
    const int64_t rows =
        std::clamp(c.delta.numel() / 8 / (shares * columns), kLeastRows, kernels<T>().packed_rows);
    const int64_t packed_rows = (std::min(rows, most) + 1) / 2 * 2;
    workspace_ = at::empty({shares, packed_rows, columns}, c.delta.options());
  }

  /// Adds part number `part` of `parts` of each gradient, of the steps `range` and the rows `rows`
  /// of a chunk, to sums number `i`. share: of the workspace.
  void add(const Chunk& c, Range range, Range rows, int64_t i, int64_t part, int64_t parts,
           int64_t share, bool is_first) {
    GradientSums<T>& sums = sums_[i];
    if (by_aten() && sums.b.empty()) return;
    WeightGradientArgs<T> a;
    const int64_t before = walk_.d == 1 ? range.end : range.begin - 1;
    const bool starts = before < 0 || before >= walk_.layout.T;
    a.steps = steps_of(walk_.layout, range.begin, range.end, /*descending=*/walk_.d == 1,
                       starts ? 0 : walk_.layout.rows(before));
    a.row_begin = rows.begin;
    a.row_end = rows.end;
    a.part = part;
    a.parts = parts;
    a.I = walk_.layer.input.size(-1);
    a.H = walk_.hidden_size();
    a.x = sequence_of<const T>(walk_.layout, c.x, c.range.begin, 0);
    a.y = sequence_of<const T>(walk_.layout, c.y, c.y_begin, 0);
    a.hx = matrix_of<T>(hx_);
    a.delta = read_only(walk_.rows_of(c.delta, c.range, i));
    a.overwrites = is_first;
    if (!by_aten() && wanted_[0]) a.grad_w_ih = mutable_data_of<Sum<T>>(sums.w_ih);
    if (!by_aten() && wanted_[1]) a.grad_w_hh = mutable_data_of<Sum<T>>(sums.w_hh);
    if (!sums.b.empty()) a.grad_b = sums.b.data();
    if (workspace_.defined()) {
      a.packed_rows = workspace_.size(1);
      a.workspace = mutable_data_of<T>(workspace_) + share * workspace_.stride(0);
    }
    kernels<T>().weight_gradients(a);
  }

  /// The same of all rows of a chunk by the thread that walked through them.
  void add_rows(const Chunk& c, int64_t block, Range rows, int64_t share) {
    if (!are_wanted()) return;
    add(c, c.range, rows, block, 0, 1, share, sums_[block].is_empty);
    sums_[block].is_empty = false;
  }

  /// All rows of a chunk, after the walk: the threads share the columns. x is made here, so that it
  /// is not in memory beside grad_y.
  void add_slabs(Chunk& c) {
    if (!are_wanted()) return;
    c.x = input_of(c.range);
    const int64_t slabs = walk_.plan.threads;
    allocate(c, slabs, c.delta.numel() / walk_.hidden_size());
    share(slabs, 1, [&](int64_t begin, int64_t end) {
      for (int64_t slab = begin; slab < end; ++slab)
        add(c, c.range, {0, walk_.layout.B}, 0, slab, slabs, slab, sums_[0].is_empty);
    });
    if (by_aten()) multiply_chunk(c);
    sums_[0].is_empty = false;
  }

  /// Whether nothing has been added, and that something has, where `add` was called by itself.
  bool is_empty() const { return sums_[0].is_empty; }
  void set_added() { sums_[0].is_empty = false; }

  /// The gradients in the type of the weights, undefined where not wanted.
  Cell finish() {
    for (size_t i = 1; i < sums_.size(); ++i) {
      if (sums_[i].is_empty) continue;
      add_numbers(sums_[0].w_ih, sums_[i].w_ih);
      add_numbers(sums_[0].w_hh, sums_[i].w_hh);
      for (size_t j = 0; j < sums_[0].b.size(); ++j) sums_[0].b[j] += sums_[i].b[j];
    }
    const GradientSums<T>& sums = sums_[0];
    Cell result;
    if (wanted_[0]) result.w_ih = in_type_of_weights(sums.w_ih);
    if (wanted_[1]) result.w_hh = in_type_of_weights(sums.w_hh);
    if (wanted_[2]) result.b_ih = bias_gradient();
    if (wanted_[3]) result.b_hh = bias_gradient();  // the same numbers, in a tensor of its own
    return result;
  }

 private:
  /// sum += part, in a loop: an operator costs more than a small layer's.
  static void add_numbers(const Tensor& sum, const Tensor& part) {
    if (!sum.defined()) return;
    Sum<T>* to = mutable_data_of<Sum<T>>(sum);
    const Sum<T>* from = data_of<Sum<T>>(part);
    for (int64_t i = 0; i < sum.numel(); ++i) to[i] += from[i];
  }

  Tensor in_type_of_weights(const Tensor& t) const {
    const at::ScalarType type = walk_.layer.input.scalar_type();
    return t.scalar_type() == type ? t : converted(t, type);
  }

  Tensor bias_gradient() const {
    const Tensor sum =
        at::empty({walk_.hidden_size()}, walk_.layer.input.options().dtype(kScalarType<Sum<T>>));
    std::memcpy(sum.mutable_data_ptr(), sums_[0].b.data(), sum.nbytes());
    return in_type_of_weights(sum);
  }

  /// The weights' gradients of a padded chunk by ATen's products.
  void multiply_chunk(const Chunk& c) {
    bool adds = !sums_[0].is_empty;
    if (wanted_[0])
      multiply(as_rows(c.delta).t(),
               as_rows(narrow_steps(walk_.layout, walk_.layer.input, c.range)), sums_[0].w_ih,
               adds);
    if (!wanted_[1]) return;
    const auto multiply_states = [&](Range range, const Tensor& previous) {
      const Tensor delta = as_rows(narrow_steps(walk_.layout, c.delta, range, c.range.begin));
      multiply(delta.t(), previous, sums_[0].w_hh, adds);
      adds = true;
    };
    const int64_t first = walk_.d == 1 ? walk_.layout.T - 1 : 0, before = walk_.d == 1 ? 1 : -1;
    const bool has_first = c.range.begin <= first && first < c.range.end;
    Range rest = c.range;  // steps whose previous state is an output
    if (has_first) (walk_.d == 1 ? --rest.end : ++rest.begin);
    if (rest.begin < rest.end)
      multiply_states(
          rest, as_rows(narrow_steps(walk_.layout, c.y, {rest.begin + before, rest.end + before},
                                     c.y_begin)));
    if (has_first && hx_.defined()) multiply_states({first, first + 1}, hx_);
    if (!adds) sums_[0].w_hh.zero_();
  }

  bool by_aten() const { return walk_.plan.weight_grads == Maker::kAten; }

  const DeltaWalk<T>& walk_;
  const std::array<bool, 4> wanted_;
  Tensor hx_;                          // [B, H] in T, or undefined
  std::vector<GradientSums<T>> sums_;  // of each block of rows, or of all
  Tensor workspace_;                   // [shares, rows, columns], or undefined
};

/// grad_x = [grad_x +] delta W_ih of a chunk, for the rows of the layer below or the call's.
template <typename T>
void add_input_gradient(const DeltaWalk<T>& walk, const Chunk& c, const Tensor& grad_x,
                        bool accumulate) {
  const Layout& layout = walk.layout;
  if (walk.plan.input_grad == Maker::kAten)
    return multiply(as_rows(c.delta), walk.cell().w_ih, as_rows(grad_x), accumulate);
  const bool converts = grad_x.scalar_type() != kScalarType<T>;
  const Tensor sum =
      converts ? at::empty(grad_x.sizes(), grad_x.options().dtype(kScalarType<T>)) : grad_x;
  const Panels<T> w_ih(walk.cell().w_ih, /*transposed=*/false);
  ProductArgs<T> a = w_ih.product();
  a.accumulate = accumulate && !converts;
  for (size_t i = 0; i + 1 < walk.bounds.size(); ++i)
    multiply_steps(layout, c.range, {walk.bounds[i], walk.bounds[i + 1]},
                   read_only(walk.rows_of(c.delta, c.range, i)), a,
                   sequence_of<T>(layout, sum, c.range.begin, 0), walk.plan.threads > 1);
  if (!converts) return;
  if (accumulate)
    run_in_parts(grad_x, sum, [](const Tensor& to, const Tensor& from) { to.add_(from); });
  else
    copy_into(sum, grad_x);
}

/// grad_hx [B, H] = delta_0 W_hh.
template <typename T>
void make_state_gradient(const DeltaWalk<T>& walk, const Tensor& grad_hx) {
  const Tensor& w_hh = walk.cell().w_hh;
  if (!walk.plan.converts) return multiply(walk.delta_first, w_hh, grad_hx);
  const Tensor product = at::empty(grad_hx.sizes(), walk.delta_first.options());
  multiply(walk.delta_first, readable(w_hh, kScalarType<T>), product);
  copy_into(product, grad_hx);
}

}  // namespace fastrnn::cpu
