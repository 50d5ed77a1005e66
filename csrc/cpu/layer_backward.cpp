// SPDX-License-Identifier: Apache-2.0
//
// Backward of layers: the order in which directions and layers walk through their chunks.
#include "batch_parts.h"
#include "direction_backward.h"
#include "pipeline.h"

namespace fastrnn::cpu {

namespace {

/// delta of one chunk of each of `walks`.
template <typename T>
void run_recurrence(const Layout& layout, const Plan& plan, DirectionBackward<T>* walks,
                    const std::vector<Chunk>& chunks) {
  const size_t count = chunks.size();
  if (plan.backward_step_products) {
    for (size_t d = 0; d < count; ++d) {
      walks[d].run_by_steps(chunks[d]);
      walks[d].keep_states(chunks[d]);
    }
    return;
  }
  for (size_t d = 0; d < count; ++d) walks[d].pack();
  if (plan.converts && !plan.own_gradients) {  // chunks of 16 bits, converted a few steps at a time
    walks[0].run_converted(chunks[0]);
  } else {
    std::vector<BackwardArgs<T>> args;
    for (size_t d = 0; d < count; ++d) args.push_back(walks[d].recurrence_args(chunks[d]));
    run_parts(layout, plan, args, kernels<T>().backward);
    for (size_t d = 0; d < count; ++d) walks[d].keep_states(chunks[d]);
  }
  for (size_t d = 0; d < count; ++d) walks[d].unpack();
}

/// All of backward for a chunk of the layers from `lowest` on, as a pipeline of parts: a layer's
/// walk, its input's gradient, through which the layer below walks, and its weights' gradients, in
/// slabs. grad_input: of the lowest layer; undefined if it is not made here.
template <typename T>
void run_side_by_side(const Layout& layout, std::vector<DirectionBackward<T>>& walks,
                      int64_t lowest, const std::vector<Chunk>& chunks, int64_t steps,
                      const Tensor& grad_input) {
  enum Task { kWalk, kInputGradient, kWeightGradients };  // and slabs from there on
  const int64_t count = static_cast<int64_t>(chunks.size());
  const int64_t threads = std::min(available_threads(), count * (layout.B + 1));
  std::vector<typename DirectionBackward<T>::OuterProducts> products(count);
  std::vector<Stage> stages;
  int64_t above = -1;
  for (int64_t l = count - 1; l >= 0; --l) {
    DirectionBackward<T>& walk = walks[lowest + l];
    const auto [I, H] = walk.sizes();
    const int64_t vectors = kernels<T>().padded_columns(H) / kernels<T>().padded_columns(1);
    const int64_t slabs = std::min(at::divup(2 * threads, count), vectors);
    products[l] = walk.outer_products(chunks[l], slabs, steps * layout.B);
    const int64_t after = static_cast<int64_t>(stages.size());
    stages.push_back({l, kWalk, 2 * H, above});
    above = after + 1;
    if (l > 0 || grad_input.defined()) stages.push_back({l, kInputGradient, I, after});
    for (int64_t slab = 0; slab < slabs; ++slab)
      stages.push_back({l, kWeightGradients + slab, at::divup(I + H, slabs), after});
  }
  divide(stages, threads);
  std::vector<Panels<T>> w_ih(count);
  const auto prepare = [&](const Stage& stage) {
    if (stage.task == kWalk) walks[lowest + stage.layer].pack();
    if (stage.task == kInputGradient)
      w_ih[stage.layer] = walks[lowest + stage.layer].input_panels();
  };
  const Range range = chunks[0].range;
  const auto range_of = [&](int64_t part) {
    return part_of(range, steps, part, /*descending=*/true);
  };
  const auto run = [&](const Stage& stage, int64_t part) {
    const int64_t l = stage.layer;
    const Chunk& c = chunks[l];
    const DirectionBackward<T>& walk = walks[lowest + l];
    if (stage.task == kWalk) return walk.walk_part(c, range_of(part));
    if (stage.task >= kWeightGradients)
      return products[l].add(stage.task - kWeightGradients, range_of(part),
                             walk.rows_before(range_of(part)), part == 0);
    multiply_steps(layout, range_of(part), walk.template delta_of<const T>(c), w_ih[l].product(),
                   l > 0 ? walks[lowest + l - 1].template delta_of<T>(chunks[l - 1])
                         : sequence_of<T>(layout, grad_input, range.begin, 0),
                   /*parallel=*/false);
  };
  run_pipeline(stages, parts_in(range, steps), threads, prepare, run);
  for (int64_t l = 0; l < count; ++l) {
    walks[lowest + l].keep_states(chunks[l]);
    walks[lowest + l].unpack();
  }
}

/// Layers of one direction: each runs a chunk when the layer above has, whose gradient of that
/// chunk is then its workspace, or all of them side by side. T: the type computed in.
template <typename T>
std::vector<Cell> stack_backward(const BackwardPass& pass, std::vector<Plan> plans) {
  const auto& [layout, layers, outputs, grad_output, grad_h_n, wanted] = pass;
  const int64_t count = static_cast<int64_t>(layers.size());
  int64_t steps = layout.T, part_steps = layout.T;
  for (const Plan& plan : plans) {
    steps = std::min(steps, plan.backward_steps);
    part_steps = std::min(part_steps, plan.gradient_steps);
  }
  std::vector<DirectionBackward<T>> walks;
  walks.reserve(count);
  bool together = true;
  for (int64_t l = 0; l < count; ++l) {
    plans[l].backward_steps = steps;
    walks.emplace_back(layout, plans[l], layers[l], 0,
                       grad_h_n.defined() ? grad_h_n.narrow(0, l, 1) : Tensor(), wanted[l]);
    together =
        together && walks[l].makes_gradients_beside() && (l == 0 || plans[l].own_input_gradient);
  }
  const int64_t group = together ? count : 1;  // layers at a time
  for (int64_t i = 0; i < parts_in({0, layout.T}, steps); ++i) {
    Tensor grad_y;  // of the chunk, from the layers above
    for (int64_t lowest = count - group; lowest >= 0; lowest -= group) {
      std::vector<Chunk> chunks(group);
      for (int64_t l = group - 1; l >= 0; --l) {
        const Plan& plan = plans[lowest + l];
        Chunk& c = chunks[l] = walks[lowest + l].chunk(i, outputs[lowest + l]);
        if (l < group - 1) grad_y = walks[lowest + l].make_delta(c.range);
        if (grad_y.defined()) {
          c.grad_y = grad_y;
          c.from_above = true;
          if (!plan.backward_step_products) c.delta = grad_y;
        } else if (grad_output.defined()) {
          c.grad_y = walks[lowest + l].columns(grad_output, c.range);
        }
        if (!c.delta.defined()) c.delta = walks[lowest + l].make_delta(c.range);
      }
      const Chunk& c = chunks[0];
      DirectionBackward<T>& walk = walks[lowest];
      grad_y = Tensor();
      if (lowest > 0)
        grad_y = walks[lowest - 1].make_delta(c.range);
      else if (wanted[0].input.defined())
        grad_y = narrow_steps(layout, wanted[0].input, c.range);
      if (walk.makes_gradients_beside()) {
        const bool with_input = plans[lowest].own_input_gradient;
        run_side_by_side(layout, walks, lowest, chunks, part_steps, with_input ? grad_y : Tensor());
        if (with_input) continue;
      } else {
        run_recurrence(layout, plans[lowest], &walk, chunks);
        walk.add_weight_gradients(c);
      }
      if (grad_y.defined()) walk.add_input_gradient(c, grad_y, /*accumulate=*/false);
    }
  }
  std::vector<Cell> results;
  for (int64_t l = 0; l < count; ++l)
    results.push_back(walks[l].finish(wanted[l].hx.defined() ? wanted[l].hx[0] : Tensor()));
  return results;
}

/// Both directions of a layer.
template <typename T>
std::vector<Cell> bidirectional_backward(const BackwardPass& pass, const std::vector<Plan>& plans) {
  const Layout& layout = pass.layout;
  const Layer& layer = pass.layers[0];
  const Tensor &output = pass.outputs[0], &grad_output = pass.grad_output;
  const WantedGradients& wanted = pass.wanted[0];
  const Plan& plan = plans[0];
  std::vector<Cell> results;
  // They walk at the same time, or one after the other.
  const int64_t together = plan.converts ? 1 : 2;
  for (int64_t begin = 0; begin < 2; begin += together) {
    std::vector<DirectionBackward<T>> walks;
    walks.reserve(together);
    for (int64_t d = begin; d < begin + together; ++d)
      walks.emplace_back(layout, plan, layer, d, pass.grad_h_n, wanted);
    for (int64_t i = 0; i < parts_in({0, layout.T}, plan.backward_steps); ++i) {
      std::vector<Chunk> chunks;
      for (const auto& walk : walks) {
        Chunk& c = chunks.emplace_back(walk.chunk(i, output));
        if (grad_output.defined()) c.grad_y = walk.columns(grad_output, c.range);
        c.delta = walk.make_delta(c.range);
      }
      run_recurrence(layout, plan, walks.data(), chunks);
      for (int64_t d = 0; d < together; ++d) {
        walks[d].add_weight_gradients(chunks[d]);
        if (!wanted.input.defined()) continue;
        walks[d].add_input_gradient(chunks[d], narrow_steps(layout, wanted.input, chunks[d].range),
                                    /*accumulate=*/true);
      }
    }
    for (int64_t d = 0; d < together; ++d)
      results.push_back(walks[d].finish(wanted.hx.defined() ? wanted.hx[begin + d] : Tensor()));
  }
  return results;
}

}  // namespace

std::vector<Cell> layers_backward(const BackwardPass& pass) {
  const bool bidirectional = pass.layers[0].directions() == 2;
  // Directions add up in a zeroed tensor, since their chunks meet it in opposite orders.
  if (const Tensor& sum = pass.wanted[0].input; bidirectional && sum.defined())
    run_in_parts(sum, sum, [](const Tensor& t, const Tensor&) { t.zero_(); });
  return with_kernel_type(pass.outputs[0].scalar_type(), [&](auto number) {
    using T = decltype(number);
    return bidirectional ? run_by_parts<T>(pass, bidirectional_backward<T>)
                         : run_by_parts<T>(pass, stack_backward<T>);
  });
}

}  // namespace fastrnn::cpu
