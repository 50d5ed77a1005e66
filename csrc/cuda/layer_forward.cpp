// SPDX-License-Identifier: Apache-2.0
//
// Forward of one layer on a GPU: the input's product and the recurrence, chunk by chunk.
#include "call_offsets.h"
#include "products.h"
#include "walks.h"

namespace fastrnn::cuda {

namespace {

/// x W_ih^T over a chunk of direction d: written where the outputs will be, or a tensor of its own,
/// in float and in the order in which x lies in memory.
Tensor input_product(const Tensor& x, const Tensor& w_ih, const Tensor& out, bool in_place) {
  if (in_place) {
    product_out(as_rows(out), as_rows(x), w_ih.t());
    return out;
  }
  if (x.dim() == 2) return float_product(x, w_ih.t());
  const bool batch_major = !x.is_contiguous() && x.transpose(0, 1).is_contiguous() &&
                           x.size(0) * w_ih.size(0) <= kMaxRowStride;
  const Tensor ordered = batch_major ? x.transpose(0, 1) : x;
  const Tensor product = float_product(as_rows(ordered), w_ih.t())
                             .view({ordered.size(0), ordered.size(1), w_ih.size(0)});
  return batch_major ? product.transpose(0, 1) : product;
}

/// As the kernels read it.
Cell contiguous(const Cell& cell) {
  const auto whole = [](const Tensor& t) { return t.defined() ? t.contiguous() : t; };
  return {cell.w_ih.contiguous(), cell.w_hh.contiguous(), whole(cell.b_ih), whole(cell.b_hh)};
}

}  // namespace

void layer_forward(const Layout& layout, const Layer& layer, const Tensor& output,
                   const Tensor& h_n) {
  const int64_t D = layer.directions(), H = layer.hidden_size();
  const Plan plan =
      plan_layer({layout.T, layout.B, layer.input.size(-1), H, D, type_of(output)}, current_gpu());
  const Tensor first_row =
      plan.walk != Walk::kSteps ? CallOffsets::first_row(layout, output) : Tensor();
  const Tensor hx = layer.hx.defined() ? layer.hx.contiguous() : Tensor();
  std::vector<Cell> cells;
  for (const Cell& cell : layer.cells) cells.push_back(contiguous(cell));

  // Addends of the outputs' type can lie where the outputs will be, but a group waits there.
  const bool in_place =
      output.scalar_type() == compute_type(output.scalar_type()) && plan.walk != Walk::kGroup;
  const int64_t steps = plan.fuse_input || in_place ? layout.T : plan.chunk_steps;
  const Tensor x = plan.fuse_input ? addressable(layer.input) : layer.input;
  for (int64_t i = 0; i < parts_in({0, layout.T}, steps); ++i) {
    std::vector<Range> ranges;
    std::vector<DirectionTensors> directions;
    for (int64_t d = 0; d < D; ++d) {
      const bool descending = d == 1;
      const Range range = ranges.emplace_back(part_of({0, layout.T}, steps, i, descending));
      DirectionTensors& tensors = directions.emplace_back();
      tensors.cell = cells[d];
      tensors.out = narrow_direction(narrow_steps(layout, output, range), d, H);
      if (plan.fuse_input)
        tensors.x = x;
      else
        tensors.addend =
            input_product(narrow_steps(layout, x, range), cells[d].w_ih, tensors.out, in_place);
      tensors.final_state = h_n[d];
      // The state passes from chunk to chunk in h_n.
      tensors.state = i > 0 ? tensors.final_state : hx.defined() ? hx[d] : Tensor();
      tensors.descending = descending;
    }
    run_walks(layout, plan, first_row, layer.activation, /*backward=*/false, ranges, directions);
  }
}

}  // namespace fastrnn::cuda
