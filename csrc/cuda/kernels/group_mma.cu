// SPDX-License-Identifier: Apache-2.0
//
// The kernels of the group walk: by type, size and rows of a group.
#include <iterator>

#include "group_walk.cuh"

namespace fastrnn::cuda {

namespace {

template <typename T>
constexpr auto& sizes_of() {
  if constexpr (sizeof(T) == 4)
    return kGroupSizes32;
  else
    return kGroupSizes16;
}

template <typename T, int kSize, int kRowTiles>
const char* run(const RecurrenceArgs& args, const GroupPlan& plan, Stream stream) {
  constexpr GroupSizes kSizes = sizes_of<T>()[kSize];
  if constexpr (kRowTiles < kSizes.most_row_tiles)
    if (plan.row_tiles > kRowTiles) return run<T, kSize, 2 * kRowTiles>(args, plan, stream);
  constexpr int kChunks = kSizes.hidden / group_chunk(sizeof(T)) / kGroupWarps;
  return run_groups<T, kSizes.tiles, kChunks, kRowTiles>(args, kSizes.blocks(args.H),
                                                         plan.at_a_time, stream);
}

template <typename T, int kSize = 0>
const char* run(const RecurrenceArgs& args, const GroupPlan& plan, Stream stream) {
  if constexpr (kSize + 1 < static_cast<int>(std::size(sizes_of<T>())))
    if (plan.size > kSize) return run<T, kSize + 1>(args, plan, stream);
  return run<T, kSize, sizes_of<T>()[kSize].least_row_tiles>(args, plan, stream);
}

}  // namespace

const char* group_mma(const RecurrenceArgs& args, const GroupPlan& plan, Stream stream) {
  switch (args.type) {
    case Type::kHalf:
      return run<Half>(args, plan, stream);
    case Type::kBFloat16:
      return run<BFloat16>(args, plan, stream);
    default:
      return run<float>(args, plan, stream);
  }
}

}  // namespace fastrnn::cuda
