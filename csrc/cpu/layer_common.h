// SPDX-License-Identifier: Apache-2.0
//
// What layer_forward.cpp and layer_backward.cpp share: the shape of a layer, and the split of the
// batch over threads.
#pragma once

#include <algorithm>

#include "panels.h"
#include "plan.h"
#include "views.h"

namespace fastrnn::cpu {

inline LayerShape layer_shape(const Layout& layout, const Layer& layer) {
  LayerShape s;
  s.T = layout.T;
  s.B = layout.B;
  s.I = layer.input.size(-1);
  s.H = layer.hidden_size();
  s.total_rows = layout.total_rows;
  s.state_rows = layout.total_rows - (layer.hx.defined() ? 0 : layout.B);
  s.packed = layout.packed();
  s.directions = layer.directions();
  set_type(s, layer.input.scalar_type());
  return s;
}

/// The parts of the batch, as row bounds: equal numbers of rows x steps in each of the steps
/// `range`, so that long packed sequences share evenly.
inline std::vector<int64_t> row_bounds(const Layout& layout, Range range, int64_t row_blocks) {
  std::vector<int64_t> bounds{0};
  if (layout.packed() && row_blocks > 1) {
    const int64_t total = layout.offset(range.end) - layout.offset(range.begin);
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

/// Some rows of the batch, in steps that have any of them.
inline Layout narrow_layout(Layout layout, Range rows) {
  layout.B = rows.end - rows.begin;
  layout.total_rows = layout.T * layout.B;
  if (!layout.packed()) return layout;
  while (layout.batch_sizes[layout.T - 1] <= rows.begin) --layout.T;
  layout.batch_sizes.resize(layout.T);
  layout.first_row.resize(layout.T + 1);
  layout.rows_before.resize(layout.T + 1);
  for (int64_t t = 0; t < layout.T; ++t) {
    layout.batch_sizes[t] = std::min(layout.batch_sizes[t], rows.end) - rows.begin;
    layout.rows_before[t + 1] = layout.rows_before[t] + layout.batch_sizes[t];
  }
  layout.total_rows = layout.rows_before[layout.T];
  return layout;
}

/// Those rows of a [T, B, N] or [D, B, H] tensor, as a view, if there is one.
inline Tensor narrow_rows(const Tensor& t, Range rows) {
  return t.defined() ? t.narrow(1, rows.begin, rows.end - rows.begin) : t;
}

/// Runs a kernel on every part of the batch, of all `directions` side by side, each by a thread or
/// by a team of threads.
template <typename Args>
void run_parts(const Layout& layout, const Plan& plan, const std::vector<Args>& directions,
               void (*kernel)(const Args&)) {
  std::vector<Args> walks;
  for (const Args& args : directions) {
    const auto bounds = row_bounds(layout, {args.steps.begin, args.steps.end}, plan.row_blocks);
    for (size_t i = 1; i < bounds.size(); ++i) {
      Args& walk = walks.emplace_back(args);
      walk.row_begin = bounds[i - 1];
      walk.row_end = bounds[i];
    }
  }
  const int64_t team = plan.column_blocks, places = static_cast<int64_t>(walks.size()) * team;
  std::vector<Slab> slabs(team > 1 ? places : 0);
  const auto run = [&](int64_t begin, int64_t end) {
    const bool alone = end - begin == places;  // one thread is no team
    for (int64_t i = begin; i < end; i += alone ? team : 1) {
      Args walk = walks[i / team];
      if (!alone && team > 1)
        walk.team = {slabs.data() + i / team * team, team, i % team, give_way};
      kernel(walk);
    }
  };
  share(places, 1, run, plan.parallel);
}

}  // namespace fastrnn::cpu
