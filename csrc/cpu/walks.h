// SPDX-License-Identifier: Apache-2.0
//
// Walks side by side: the shape of a layer, and the split of its batch and its steps over threads.
#pragma once

#include <algorithm>

#include "plan.h"
#include "tensors.h"

namespace fastrnn::cpu {

inline LayerShape layer_shape(const Layout& layout, const Layer& layer) {
  LayerShape s;
  s.T = layout.T;
  s.B = layout.B;
  s.I = layer.input.size(-1);
  s.H = layer.hidden_size();
  s.total_rows = layout.total_rows;
  s.packed = layout.packed();
  s.directions = layer.directions();
  set_type(s, layer.input.scalar_type());
  return s;
}

/// The blocks of the batch, as row bounds: equal numbers of rows x steps in each of the steps
/// `range`, so that long packed sequences share evenly.
inline std::vector<int64_t> row_bounds(const Layout& layout, Range range, int64_t row_blocks) {
  std::vector<int64_t> bounds{0};
  if (layout.packed() && row_blocks > 1) {
    const int64_t total = layout.position(range.end) - layout.position(range.begin);
    int64_t t = range.end, done = 0;
    for (int64_t b = 0; b < layout.rows(range.begin); ++b) {
      while (layout.batch_sizes[t - 1] <= b) --t;  // t: end of sequence b
      done += t - range.begin;
      const int64_t next = static_cast<int64_t>(bounds.size());
      if (next < row_blocks && done * row_blocks >= next * total) bounds.push_back(b + 1);
    }
  } else {
    for (int64_t i = 1; i < row_blocks; ++i) bounds.push_back(layout.B * i / row_blocks);
  }
  bounds.push_back(layout.B);
  return bounds;
}

/// Runs a kernel on every block of rows, of `directions` side by side, each by a thread or by a
/// team of threads: with make(direction, block), but for the rows and the team. Then, where a block
/// has one thread, after(direction, block, rows). steps: from which the blocks are cut.
template <typename Args, typename Make, typename After>
void run_walks(const Layout& layout, const Plan& plan, int64_t directions, Range steps,
               void (*kernel)(const Args&), const Make& make, const After& after) {
  const std::vector<int64_t> bounds = row_bounds(layout, steps, plan.row_blocks);
  const int64_t blocks = static_cast<int64_t>(bounds.size()) - 1, slabs = plan.column_blocks;
  const int64_t walks = directions * blocks;
  std::vector<Slab> done(slabs > 1 ? walks * slabs : 0);
  // A thread with several slabs of one walk computes all of them in each round.
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t place = begin; place < end;) {
      const int64_t walk = place / slabs, last = std::min(end, (walk + 1) * slabs);
      const int64_t block = walk % blocks;
      Args args = make(walk / blocks, block);
      args.row_begin = bounds[block];
      args.row_end = bounds[block + 1];
      if (last - place < slabs)
        args.team = {&done[walk * slabs], slabs, place % slabs, last - walk * slabs, give_way};
      kernel(args);
      if (slabs == 1) after(walk / blocks, block, Range{bounds[block], bounds[block + 1]});
      place = last;
    }
  };
  share(walks * slabs, 1, run, plan.threads > 1);
}

/// The same, with one set of arguments for each direction.
template <typename Args>
void run_walks(const Layout& layout, const Plan& plan, const std::vector<Args>& directions,
               void (*kernel)(const Args&)) {
  const Steps& steps = directions[0].steps;
  run_walks(
      layout, plan, static_cast<int64_t>(directions.size()), {steps.begin, steps.end}, kernel,
      [&](int64_t d, int64_t) { return directions[d]; }, [](int64_t, int64_t, Range) {});
}

}  // namespace fastrnn::cpu
