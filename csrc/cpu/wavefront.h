// SPDX-License-Identifier: Apache-2.0
//
// Layers of a stack side by side: while one thread takes a part of the sequence through the upper
// layers, another takes the part after it through the lower ones.
#pragma once

#include <atomic>
#include <vector>

#include "layer_common.h"

namespace fastrnn::cpu {

/// Calls run(layer, part) once for every layer and part, after run(layer - 1, part) and
/// run(layer, part - 1). A part has one thread, so that what passes between threads is a layer's
/// last state; a thread that never comes is not missed, since the others claim its parts.
template <typename Run>
void run_wavefront(int64_t layers, int64_t parts, int64_t threads, const Run& run) {
  constexpr int64_t kPatience = 4000;  // turns of waiting, some microseconds
  struct alignas(64) Progress {
    std::atomic<int64_t> parts{0};  // that a layer has done
  };
  std::vector<Progress> done(layers);
  std::atomic<int64_t> next_part{0};
  std::atomic<bool> failed{false};
  const auto take_parts = [&] {
    for (int64_t part = next_part++; part < parts; part = next_part++) {
      for (int64_t layer = 0; layer < layers; ++layer) {
        std::atomic<int64_t>& progress = done[layer].parts;
        for (int64_t turn = 0; progress.load(std::memory_order_acquire) < part; ++turn) {
          if (failed) return;
          if (turn >= kPatience) give_way();
        }
        run(layer, part);
        progress.store(part + 1, std::memory_order_release);
      }
    }
  };
  run_with_operators(threads, [&](int64_t) {
    try {
      take_parts();
    } catch (...) {
      failed = true;
      throw;
    }
  });
}

}  // namespace fastrnn::cpu
