// SPDX-License-Identifier: Apache-2.0
//
// Backward of layers: the order of their chunks, and who makes what of a chunk. Layers in one
// direction take turns at each chunk, the upper one first: its gradient of that chunk is then the
// lower one's workspace.
#include "beside.h"
#include "delta_walk.h"
#include "engine.h"
#include "gradients.h"

namespace fastrnn::cpu {

namespace {

/// One layer: its plan, its directions, and the gradients wanted of it.
template <typename T>
struct LayerBackward {
  const Layout& layout;
  const Plan plan;
  std::vector<DeltaWalk<T>> walks = {};
  std::vector<WeightGradients<T>> gradients = {};
  std::vector<DeltaWeights<T>> weights = {};  // of the chunk that is walked

  /// Before a chunk's tensors are made: while a weight is packed there may be two copies of it.
  void prepare() {
    weights.clear();
    for (const DeltaWalk<T>& walk : walks) weights.emplace_back(walk);
  }

  /// Each thread walks through rows of its own, and makes the gradients of them while they are in
  /// its caches. targets: as for `run`; the input's gradient is made here if only one direction
  /// adds to it.
  void run_by_rows(std::vector<Chunk>& chunks, std::vector<Tensor>& targets) {
    std::vector<BackwardArgs<T>> args;
    const int64_t D = static_cast<int64_t>(walks.size());
    for (int64_t d = 0; d < D; ++d) {
      args.push_back(weights[d].add_to(walks[d].args(chunks[d])));
      gradients[d].make_workspace(chunks[d], plan.row_blocks, chunks[d].delta.numel());
      chunks[d].x = gradients[d].input_of(chunks[d].range);
    }
    Panels<T> w_ih;
    Sequence<T> grad_x;
    if (D == 1 && targets[0].defined() && targets[0].scalar_type() == kScalarType<T>) {
      w_ih = {walks[0].cell().w_ih, /*transposed=*/false};
      grad_x = sequence_of<T>(layout, targets[0], chunks[0].range.begin, 0);
    }
    run_walks(layout, plan, args, kernels<T>().backward, [&](int64_t d, int64_t block, Range rows) {
      gradients[d].add_rows(chunks[d], block, rows, block);
      if (grad_x.data == nullptr) return;
      const Sequence<T>& delta = args[0].delta;
      multiply_steps(layout, chunks[0].range, rows,
                     {delta.data, delta.step_stride, delta.row_stride, delta.first_row},
                     w_ih.product(), grad_x, /*parallel=*/false);
    });
    if (grad_x.data != nullptr) targets[0] = Tensor();
  }

  /// All threads walk, then all make the gradients, of a slab of columns each.
  void run_by_slabs(std::vector<Chunk>& chunks) {
    const int64_t D = static_cast<int64_t>(walks.size());
    if (plan.delta == Maker::kAten) {
      for (int64_t d = 0; d < D; ++d) walk_by_steps(walks[d], chunks[d]);
    } else {
      std::vector<BackwardArgs<T>> args;
      for (int64_t d = 0; d < D; ++d) args.push_back(weights[d].add_to(walks[d].args(chunks[d])));
      run_walks(layout, plan, args, kernels<T>().backward);
    }
    weights.clear();  // not in memory during the products
    for (int64_t d = 0; d < D; ++d) {
      chunks[d].grad_y = Tensor();  // a copy of it is not in memory beside one of x
      chunks[d].x = gradients[d].input_of(chunks[d].range);
      gradients[d].add_slabs(chunks[d]);
    }
  }

  /// The one walk by one thread, the gradients of the steps behind it by the others.
  void run_beside(Chunk& c, Tensor& target) {
    c.x = gradients[0].input_of(c.range);
    const BackwardArgs<T> all = weights[0].add_to(walks[0].args(c));
    std::vector<Range> parts = growing_parts(c.range.end - c.range.begin, layout.B);
    for (Range& part : parts) part = {part.begin + c.range.begin, part.end + c.range.begin};
    if (!walks[0].reverse()) std::reverse(parts.begin(), parts.end());
    const auto walk = [&](int64_t i) {
      BackwardArgs<T> a = all;
      a.row_end = layout.B;
      a.steps.begin = parts[i].begin;
      a.steps.end = parts[i].end;
      if (i > 0) {
        a.steps.carry_rows = layout.rows(parts[i].end);
        a.carry = {a.delta.row(parts[i].end, 0), a.delta.row_stride};
      }
      kernels<T>().backward(a);
    };
    const bool with_input = target.defined() && plan.input_grad == Maker::kPanels;
    const int64_t slabs = gradients[0].are_wanted() ? 2 * plan.threads : 0;
    Panels<T> w_ih;
    Sequence<T> grad_x;
    if (with_input) {
      w_ih = {walks[0].cell().w_ih, /*transposed=*/false};
      grad_x = sequence_of<T>(layout, target, c.range.begin, 0);
    }
    if (slabs > 0) gradients[0].make_workspace(c, slabs, c.delta.numel());
    const auto product = [&](int64_t chain, int64_t i) {
      if (chain < slabs)
        return gradients[0].add(c, parts[i], {0, layout.B}, 0, chain, slabs, chain,
                                gradients[0].is_empty() && i == 0);
      multiply_steps(
          layout, parts[i], {0, layout.B},
          {all.delta.data, all.delta.step_stride, all.delta.row_stride, all.delta.first_row},
          w_ih.product(), grad_x, /*parallel=*/false);
    };
    walk_beside(static_cast<int64_t>(parts.size()), slabs + with_input, /*products_first=*/false,
                walk, product);
    if (slabs > 0) gradients[0].set_added();
    if (with_input) target = Tensor();
  }

  /// A chunk of every direction. targets: of each, the chunk of the input's gradient, added to
  /// where there are two; undefined where not wanted.
  void run(std::vector<Chunk> chunks, std::vector<Tensor> targets) {
    if (plan.sharing == Sharing::kByRows)
      run_by_rows(chunks, targets);
    else if (plan.sharing == Sharing::kBeside)
      run_beside(chunks[0], targets[0]);
    else
      run_by_slabs(chunks);
    weights.clear();
    for (size_t d = 0; d < walks.size(); ++d) {
      walks[d].keep_states(chunks[d]);
      if (targets[d].defined())
        add_input_gradient(walks[d], chunks[d], targets[d], /*accumulate=*/walks.size() > 1);
    }
  }
};

/// T: the type computed in.
template <typename T>
std::vector<Cell> backward_as(const BackwardPass& pass) {
  const auto& [layout, layers, outputs, grad_output, grad_h_n, wanted] = pass;
  const int64_t count = static_cast<int64_t>(layers.size()), D = layers[0].directions();
  std::vector<LayerBackward<T>> parts;
  parts.reserve(count);
  int64_t steps = layout.T;
  for (int64_t l = 0; l < count; ++l) {
    parts.push_back({layout, plan_layer(layer_shape(layout, layers[l]), available_threads())});
    LayerBackward<T>& part = parts.back();
    steps = std::min(steps, part.plan.chunk_steps);
    for (int64_t d = 0; d < D; ++d) {
      const Tensor grad =
          grad_h_n.defined() ? readable(grad_h_n[l * D + d], kScalarType<T>) : Tensor();
      const Tensor first = wanted[l].hx.defined()
                               ? at::empty({layout.B, layers[l].hidden_size()},
                                           layers[l].input.options().dtype(kScalarType<T>))
                               : Tensor();
      part.walks.push_back({layout, layers[l], part.plan, d, grad, first});
      part.gradients.emplace_back(part.walks.back(), wanted[l].cells[d]);
    }
  }
  for (int64_t i = 0; i < parts_in({0, layout.T}, steps); ++i) {
    Tensor from_above;
    for (int64_t l = count - 1; l >= 0; --l) {
      std::vector<Chunk> chunks;
      std::vector<Tensor> targets;
      parts[l].prepare();
      for (int64_t d = 0; d < D; ++d) {
        const DeltaWalk<T>& walk = parts[l].walks[d];
        Chunk& c = chunks.emplace_back(walk.chunk(steps, i, outputs[l]));
        c.grad_y = from_above;
        if (l == count - 1 && grad_output.defined()) c.grad_y = walk.columns(grad_output, c.range);
        const bool in_place = from_above.defined() && parts[l].plan.delta != Maker::kAten;
        c.delta = in_place ? from_above : walk.make_delta(c.range);
        targets.push_back(l > 0 ? parts[l - 1].walks[0].make_delta(c.range)
                          : wanted[0].input.defined()
                              ? narrow_steps(layout, wanted[0].input, c.range)
                              : Tensor());
      }
      parts[l].run(std::move(chunks), targets);
      from_above = targets[0];
    }
  }
  std::vector<Cell> results;
  for (int64_t l = 0; l < count; ++l) {
    for (int64_t d = 0; d < D; ++d) {
      if (wanted[l].hx.defined()) make_state_gradient(parts[l].walks[d], wanted[l].hx[d]);
      results.push_back(parts[l].gradients[d].finish());
    }
  }
  return results;
}

}  // namespace

std::vector<Cell> layers_backward(const BackwardPass& pass) {
  // Directions add up in a zeroed tensor, since their chunks meet it in opposite orders.
  if (const Tensor& sum = pass.wanted[0].input; pass.layers[0].directions() == 2 && sum.defined())
    run_in_parts(sum, sum, [](const Tensor& t, const Tensor&) { t.zero_(); });
  return with_kernel_type(pass.outputs[0].scalar_type(),
                          [&](auto number) { return backward_as<decltype(number)>(pass); });
}

}  // namespace fastrnn::cpu
