// SPDX-License-Identifier: Apache-2.0
//
// Backward of parts of the batch side by side: each thread goes through all chunks and layers with
// rows of its own, so that what it has written, in forward too, is in its caches when it reads it
// again, and no thread waits for another before the end. Included by layer_backward.cpp alone.
#pragma once

#include "layer_common.h"

namespace fastrnn::cpu {

namespace {

/// The same pass for `rows` of the batch, whose layout is `part`: of each tensor a view that begins
/// with them.
BackwardPass narrow_batch(const BackwardPass& whole, const Layout& part, Range rows) {
  BackwardPass pass{part,           whole.layers, whole.outputs, whole.grad_output,
                    whole.grad_h_n, whole.wanted};
  const bool packed = part.packed();
  const auto narrow_states = [&](Tensor& t) { t = narrow_rows(t, rows); };
  const auto narrow = [&](Tensor& t) {
    if (packed && t.defined())
      t = t.narrow(0, rows.begin, t.size(0) - rows.begin);
    else
      t = narrow_rows(t, rows);
  };
  for (Layer& layer : pass.layers) {
    narrow(layer.input);
    narrow_states(layer.hx);
  }
  for (Tensor& output : pass.outputs) narrow(output);
  narrow(pass.grad_output);
  narrow_states(pass.grad_h_n);
  for (WantedGradients& wanted : pass.wanted) {
    narrow(wanted.input);
    narrow_states(wanted.hx);
  }
  return pass;
}

constexpr Tensor Cell::* kGradients[] = {&Cell::w_ih, &Cell::w_hh, &Cell::b_ih, &Cell::b_hh};

/// sum += part, of every gradient that is there, in a loop: an operator costs more than a small
/// layer's.
template <typename T>
void add(const Cell& sum, const Cell& part) {
  for (Tensor Cell::* gradient : kGradients) {
    if (!(sum.*gradient).defined()) continue;
    Sum<T>* to = mutable_data_of<Sum<T>>(sum.*gradient);
    const Sum<T>* from = data_of<Sum<T>>(part.*gradient);
    const int64_t count = (sum.*gradient).numel();
    for (int64_t i = 0; i < count; ++i) to[i] += from[i];
  }
}

/// Every gradient in the type of the weights.
void round(Cell& cell, at::ScalarType type) {
  for (Tensor Cell::* gradient : kGradients) {
    Tensor& t = cell.*gradient;
    if (t.defined() && t.scalar_type() != type) t = converted(t, type);
  }
}

/// Of each layer, for so many threads.
std::vector<Plan> plans_of(const BackwardPass& pass, int64_t threads) {
  std::vector<Plan> plans;
  plans.reserve(pass.layers.size());
  for (const Layer& layer : pass.layers)
    plans.push_back(plan_layer(layer_shape(pass.layout, layer), threads));
  return plans;
}

/// The same for a part of the batch, which one thread runs with the kernels that the whole has.
std::vector<Plan> plans_of_part(const BackwardPass& part, const std::vector<Plan>& whole) {
  std::vector<Plan> plans = plans_of(part, /*threads=*/1);
  for (size_t l = 0; l < plans.size(); ++l) {
    for (bool Plan::* choice :
         {&Plan::own_gradients, &Plan::own_input_gradient, &Plan::backward_packs})
      plans[l].*choice = whole[l].*choice;
  }
  return plans;
}

/// Runs a pass as a whole, or parts of the batch side by side, by backward(pass, plans of its
/// layers). T: the type computed in.
template <typename T, typename Backward>
std::vector<Cell> run_by_parts(const BackwardPass& pass, const Backward& backward) {
  const int64_t threads = available_threads();
  const std::vector<Plan> plans = plans_of(pass, threads);
  int64_t parts = threads;
  for (const Plan& plan : plans) parts = std::min(parts, plan.batch_parts);
  const auto rounded = [&](std::vector<Cell> cells) {
    for (Cell& cell : cells) round(cell, pass.layers[0].input.scalar_type());
    return cells;
  };
  if (parts == 1) return rounded(backward(pass, plans));
  // Made here: threads that count references to one tensor disturb each other.
  const std::vector<int64_t> bounds = row_bounds(pass.layout, {0, pass.layout.T}, parts);
  std::vector<Layout> layouts;
  layouts.reserve(parts);  // passes refer to them
  std::vector<BackwardPass> passes;
  for (size_t i = 1; i < bounds.size(); ++i) {
    const Range rows{bounds[i - 1], bounds[i]};
    layouts.push_back(narrow_layout(pass.layout, rows));
    passes.push_back(narrow_batch(pass, layouts.back(), rows));
  }
  std::vector<std::vector<Cell>> cells(passes.size());
  run_with_operators(passes.size(), [&](int64_t i) {
    cells[i] = backward(passes[i], plans_of_part(passes[i], plans));
  });
  for (size_t i = 1; i < cells.size(); ++i)
    for (size_t c = 0; c < cells[i].size(); ++c) add<T>(cells[0][c], cells[i][c]);
  return rounded(std::move(cells[0]));
}

}  // namespace

}  // namespace fastrnn::cpu
