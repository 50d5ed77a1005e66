// SPDX-License-Identifier: Apache-2.0
//
// Which steps a block of threads walks through.
#pragma once

#include "primitives.cuh"
#include "recurrence.h"

namespace fastrnn::cuda {

/// The steps of the rows of the batch from `row` on, and which rows are alive at them.
struct WalkedSteps {
  const Steps& steps;
  int count, first, stride;  // how many steps; the first one, 1 or -1 to the next

  __device__ __forceinline__ WalkedSteps(const Steps& s, const RecurrenceDirection& d, int64_t row)
      : steps(s), stride(d.descending ? -1 : 1) {
    // Rows are sorted by length: the steps at which `row` is alive are [0, alive).
    int64_t alive = d.end;
    if (packed()) {
      int64_t low = d.begin, high = d.end;
      while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (rows(middle) > row)
          low = middle + 1;
        else
          high = middle;
      }
      alive = low;
    }
    count = static_cast<int>(alive > d.begin ? alive - d.begin : 0);
    first = static_cast<int>(d.descending ? alive - 1 : d.begin);
  }

  __device__ __forceinline__ bool packed() const { return steps.first_row != nullptr; }
  __device__ __forceinline__ int64_t step(int i) const { return first + i * stride; }
  /// Rows of the batch that are alive at step t.
  __device__ __forceinline__ int64_t rows(int64_t t) const {
    return packed() ? steps.first_row[t + 1] - steps.first_row[t] : steps.B;
  }
  /// Those at the step before the walk's first one.
  __device__ __forceinline__ int64_t rows_before() const {
    const int64_t before = first - stride;
    return before < 0 || before >= steps.T ? 0 : rows(before);
  }
};

}  // namespace fastrnn::cuda
