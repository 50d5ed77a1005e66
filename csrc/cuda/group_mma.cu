// SPDX-License-Identifier: Apache-2.0
//
// The kernels of tier 2: by type, by the smallest size for H units, and by rows of a group.
#include <iterator>

#include "group_recurrence.cuh"

namespace fastrnn::cuda {

namespace {

template <typename T, int kSize = 0>
const char* run(const RecurrenceArgs& args, int rows, int64_t groups, Stream stream) {
  constexpr const auto& kAll = *[] {
    if constexpr (sizeof(T) == 4)
      return &kGroupSizes32;
    else
      return &kGroupSizes16;
  }();
  constexpr GroupSizes kSizes = kAll[kSize];
  if constexpr (kSize + 1 < static_cast<int>(std::size(kAll)))
    if (args.H > kSizes.hidden) return run<T, kSize + 1>(args, rows, groups, stream);
  constexpr int kChunks = kSizes.hidden / group_chunk(sizeof(T)) / kGroupWarps;
  if constexpr (kSizes.max_row_tiles >= 4)
    if (rows == 32) return run_groups<T, kSizes.tiles, kChunks, 4>(args, groups, stream);
  if constexpr (kSizes.max_row_tiles >= 2)
    if (rows == 16) return run_groups<T, kSizes.tiles, kChunks, 2>(args, groups, stream);
  return run_groups<T, kSizes.tiles, kChunks, 1>(args, groups, stream);
}

}  // namespace

const char* group_recurrence(const RecurrenceArgs& args, int rows, int64_t groups, Stream stream) {
  switch (args.type) {
    case Type::kHalf:
      return run<Half>(args, rows, groups, stream);
    case Type::kBFloat16:
      return run<BFloat16>(args, rows, groups, stream);
    default:
      return run<float>(args, rows, groups, stream);
  }
}

}  // namespace fastrnn::cuda
