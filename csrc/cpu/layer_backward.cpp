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
  /// Where a chunk of the input's gradient goes: undefined where it is not wanted.
  struct Target {
    Tensor tensor;
    const DeltaWalk<T>* below;  // whose workspace it is; null: the call's

    Sequence<T> rows(const Layout& layout, Range range, int64_t block) const {
      return below ? below->rows_of(tensor, range, block)
                   : sequence_of<T>(layout, tensor, range.begin, 0);
    }
  };

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
  /// its caches; the input's only if there is one direction.
  void run_by_rows(std::vector<Chunk>& chunks, Target& target) {
    const int64_t D = static_cast<int64_t>(walks.size());
    const Range range = chunks[0].range;
    for (int64_t d = 0; d < D; ++d) {
      gradients[d].allocate(chunks[d], plan.row_blocks, chunks[d].delta.numel());
      chunks[d].x = gradients[d].input_of(chunks[d].range);
    }
    const bool with_input = D == 1 && target.tensor.defined();
    const Panels<T> w_ih =
        with_input ? Panels<T>(walks[0].cell().w_ih, /*transposed=*/false) : Panels<T>();
    run_walks(
        layout, plan, D, range, kernels<T>().backward,
        [&](int64_t d, int64_t block) {
          return weights[d].add_to(walks[d].args(chunks[d], block));
        },
        [&](int64_t d, int64_t block, Range rows) {
          gradients[d].add_rows(chunks[d], block, rows, block);
          if (with_input)
            multiply_steps(layout, range, rows,
                           read_only(walks[0].rows_of(chunks[0].delta, range, block)),
                           w_ih.product(), target.rows(layout, range, block), /*parallel=*/false);
        });
    if (with_input) target.tensor = Tensor();
  }

  /// All threads walk, then all make the gradients, of a slab of columns each.
  void run_by_slabs(std::vector<Chunk>& chunks) {
    const size_t D = walks.size();
    std::vector<BackwardArgs<T>> args;
    for (size_t d = 0; d < D; ++d) {
      if (plan.delta == Maker::kAten)
        walk_by_steps(walks[d], chunks[d]);
      else
        args.push_back(weights[d].add_to(walks[d].args(chunks[d], 0)));
    }
    if (!args.empty()) run_walks(layout, plan, args, kernels<T>().backward);
    weights.clear();  // not in memory during the products
    for (size_t d = 0; d < D; ++d) {
      chunks[d].grad_y = Tensor();
      gradients[d].add_slabs(chunks[d]);
    }
  }

  /// The one walk by one thread, the gradients of the steps behind it by the others.
  void run_beside(Chunk& c, Target& target) {
    c.x = gradients[0].input_of(c.range);
    const BackwardArgs<T> all = weights[0].add_to(walks[0].args(c, 0));
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
    const bool with_input = target.tensor.defined() && plan.input_grad == Maker::kPanels;
    const int64_t slabs = gradients[0].are_wanted() ? 2 * plan.threads : 0;
    const Panels<T> w_ih =
        with_input ? Panels<T>(walks[0].cell().w_ih, /*transposed=*/false) : Panels<T>();
    if (slabs > 0) gradients[0].allocate(c, slabs, c.delta.numel());
    const auto product = [&](int64_t chain, int64_t i) {
      if (chain < slabs)
        return gradients[0].add(c, parts[i], {0, layout.B}, 0, chain, slabs, chain,
                                gradients[0].is_empty() && i == 0);
      multiply_steps(layout, parts[i], {0, layout.B}, read_only(all.delta), w_ih.product(),
                     target.rows(layout, c.range, 0), /*parallel=*/false);
    };
    walk_beside(static_cast<int64_t>(parts.size()), slabs + with_input, /*products_first=*/false,
                walk, product);
    if (slabs > 0) gradients[0].set_added();
    if (with_input) target.tensor = Tensor();
  }

  /// A chunk of every direction. targets: of each; where there are two, they are added to.
  void run(std::vector<Chunk> chunks, std::vector<Target> targets) {
    if (plan.sharing == Sharing::kByRows)
      run_by_rows(chunks, targets[0]);
    else if (plan.sharing == Sharing::kBeside)
      run_beside(chunks[0], targets[0]);
    else
      run_by_slabs(chunks);
    weights.clear();
    for (size_t d = 0; d < walks.size(); ++d) {
      walks[d].keep_states(chunks[d]);
      if (targets[d].tensor.defined())
        add_input_gradient(walks[d], chunks[d], targets[d].tensor, walks.size() > 1);
    }
  }
};

/// Of the blocks of rows in the workspaces of a pass: those of threads that have rows of their own
/// in all layers, else one. Rows of packed data are together as they are.
template <typename T>
std::vector<int64_t> workspace_bounds(const Layout& layout,
                                      const std::vector<LayerBackward<T>>& parts) {
  const Plan& first = parts[0].plan;
  bool together = !layout.packed();
  for (const LayerBackward<T>& part : parts)
    together = together && part.plan.sharing == Sharing::kByRows &&
               part.plan.row_blocks == first.row_blocks;
  return together ? row_bounds(layout, {0, layout.T}, first.row_blocks)
                  : std::vector<int64_t>{0, layout.B};
}

/// T: the type computed in.
template <typename T>
std::vector<Cell> backward_as(const BackwardPass& pass) {
  const auto& [layout, layers, outputs, grad_output, grad_h_n, wanted] = pass;
  const int64_t count = static_cast<int64_t>(layers.size()), D = layers[0].directions();
  std::vector<LayerBackward<T>> parts;
  parts.reserve(count);  // walks and gradients refer to them
  int64_t steps = layout.T;
  for (const Layer& layer : layers) {
    parts.push_back({layout, plan_layer(layer_shape(layout, layer), available_threads())});
    steps = std::min(steps, parts.back().plan.chunk_steps);
  }
  const std::vector<int64_t> bounds = workspace_bounds(layout, parts);
  for (int64_t l = 0; l < count; ++l) {
    LayerBackward<T>& part = parts[l];
    part.walks.reserve(D);
    for (int64_t d = 0; d < D; ++d) {
      const auto options = layers[l].input.options().dtype(kScalarType<T>);
      const Tensor grad =
          grad_h_n.defined() ? readable(grad_h_n[l * D + d], kScalarType<T>) : Tensor();
      const Tensor first = wanted[l].hx.defined()
                               ? at::empty({layout.B, layers[l].hidden_size()}, options)
                               : Tensor();
      part.walks.push_back({layout, layers[l], part.plan, d, bounds, grad, first});
      part.gradients.emplace_back(part.walks.back(), wanted[l].cells[d]);
    }
  }
  for (int64_t i = 0; i < parts_in({0, layout.T}, steps); ++i) {
    Tensor from_above;
    for (int64_t l = count - 1; l >= 0; --l) {
      std::vector<Chunk> chunks;
      std::vector<typename LayerBackward<T>::Target> targets;
      parts[l].prepare();
      for (int64_t d = 0; d < D; ++d) {
        const DeltaWalk<T>& walk = parts[l].walks[d];
        Chunk& c = chunks.emplace_back(walk.chunk(steps, i, outputs[l]));
        c.from_above = from_above.defined();
        c.grad_y = from_above;
        if (l == count - 1 && grad_output.defined()) c.grad_y = walk.columns(grad_output, c.range);
        const bool in_place = c.from_above && parts[l].plan.delta != Maker::kAten;
        c.delta = in_place ? from_above : walk.make_delta(c.range);
        if (l > 0)
          targets.push_back({parts[l - 1].walks[0].make_delta(c.range), &parts[l - 1].walks[0]});
        else if (wanted[0].input.defined())
          targets.push_back({narrow_steps(layout, wanted[0].input, c.range), nullptr});
        else
          targets.push_back({Tensor(), nullptr});
      }
      parts[l].run(std::move(chunks), targets);
      from_above = targets[0].tensor;
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
