// SPDX-License-Identifier: Apache-2.0
//
// Backward of layers: the order in which directions and layers walk through their chunks.
#include "batch_parts.h"
#include "direction_backward.h"

namespace fastrnn::cpu {

namespace {

/// Whether a chunk, the first of its walk or not, has ATen's product with W_hh in each step.
bool takes_step_products(const Plan& plan, bool first) {
  return plan.backward_step_products || (plan.packs_once && !first);
}

/// Whether chunks of 16-bit tensors stay so, and are converted a few steps at a time.
bool converts_in_parts(const Plan& plan) { return plan.converts && !plan.own_gradients; }

/// delta of one chunk of each of `walks`, their first or a later one.
template <typename T>
void run_recurrence(const Layout& layout, const Plan& plan, bool first, DirectionBackward<T>* walks,
                    const std::vector<Chunk>& chunks) {
  const size_t count = chunks.size();
  if (takes_step_products(plan, first)) {
    for (size_t d = 0; d < count; ++d) {
      walks[d].run_by_steps(chunks[d]);
      walks[d].keep_carry(chunks[d]);
    }
    return;
  }
  for (size_t d = 0; d < count; ++d) walks[d].pack();
  if (walks[0].makes_gradients_beside()) {
    walks[0].walk_beside_gradients(chunks[0]);
  } else if (converts_in_parts(plan)) {
    if constexpr (std::is_same_v<T, float>) walks[0].run_converted(chunks[0]);
  } else {
    std::vector<BackwardArgs<T>> args;
    for (size_t d = 0; d < count; ++d) args.push_back(walks[d].recurrence_args(chunks[d]));
    run_parts(layout, plan, args, kernels<T>().backward);
  }
  for (size_t d = 0; d < count; ++d) {
    if (!converts_in_parts(plan)) walks[d].keep_carry(chunks[d]);
    walks[d].unpack();
  }
}

/// Layers of one direction: each runs a chunk when the layer above has, whose gradient of that
/// chunk is then its workspace. T: the type computed in.
template <typename T>
std::vector<Cell> stack_backward(const BackwardPass& pass, std::vector<Plan> plans) {
  const auto& [layout, layers, outputs, grad_output, grad_h_n, wanted] = pass;
  const int64_t count = static_cast<int64_t>(layers.size());
  int64_t steps = layout.T;
  for (const Plan& plan : plans) steps = std::min(steps, plan.backward_steps);
  std::vector<DirectionBackward<T>> walks;
  walks.reserve(count);
  for (int64_t l = 0; l < count; ++l) {
    plans[l].backward_steps = steps;
    walks.emplace_back(layout, plans[l], layers[l], 0,
                       grad_h_n.defined() ? grad_h_n.narrow(0, l, 1) : Tensor(), wanted[l]);
  }
  for (int64_t i = 0; i < parts_in({0, layout.T}, steps); ++i) {
    Tensor grad_y;  // of the chunk, from the layer above
    for (int64_t l = count - 1; l >= 0; --l) {
      Chunk c = walks[l].chunk(i, outputs[l]);
      if (grad_y.defined()) {
        c.grad_y = grad_y;
        c.from_above = true;
        if (!takes_step_products(plans[l], i == 0)) c.delta = grad_y;
      } else if (grad_output.defined()) {
        c.grad_y = walks[l].columns(grad_output, c.range);
      }
      if (!c.delta.defined()) c.delta = walks[l].make_delta(c.range);
      run_recurrence(layout, plans[l], /*first=*/i == 0, &walks[l], {c});
      grad_y = Tensor();
      if (l > 0)
        grad_y = walks[l - 1].make_delta(c.range);
      else if (wanted[0].input.defined())
        grad_y = narrow_steps(layout, wanted[0].input, c.range);
      walks[l].add_gradients(c, grad_y, /*accumulate=*/false);
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
      run_recurrence(layout, plan, /*first=*/i == 0, walks.data(), chunks);
      for (int64_t d = 0; d < together; ++d) {
        Tensor grad_input;
        if (wanted.input.defined())
          grad_input = narrow_steps(layout, wanted.input, chunks[d].range);
        walks[d].add_gradients(chunks[d], grad_input, /*accumulate=*/true);
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
