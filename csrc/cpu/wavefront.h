// SPDX-License-Identifier: Apache-2.0
//
// Side by side what one thread does part by part of a sequence, and what needs those parts: layers,
// the products before a walk, and those after it.
#pragma once

#include <atomic>
#include <vector>

#include "layer_common.h"

namespace fastrnn::cpu {

constexpr int64_t kPatience = 4000;  // turns of waiting, some microseconds or more

/// Calls run(thread, layer, part, in_order) once for every layer and part, by thread number
/// `thread` or whoever does its work, after it has run the layer before. In run, in_order(walk)
/// calls walk when the part before has been walked in this layer; the rest waits for nothing. A
/// part has one thread, so that what passes between threads is a layer's last state; a thread that
/// never comes is not missed, since the others claim its parts.
template <typename Run>
void run_wavefront(int64_t layers, int64_t parts, int64_t threads, const Run& run) {
  struct alignas(64) Progress {
    std::atomic<int64_t> parts{0};  // that have been walked in a layer
  };
  std::vector<Progress> done(layers);
  std::atomic<int64_t> next_part{0};
  std::atomic<bool> failed{false};
  const auto take_parts = [&](int64_t thread) {
    for (int64_t part = next_part++; part < parts; part = next_part++) {
      for (int64_t layer = 0; layer < layers && !failed; ++layer) {
        run(thread, layer, part, [&](const auto& walk) {
          std::atomic<int64_t>& progress = done[layer].parts;
          for (int64_t turn = 0; progress.load(std::memory_order_acquire) < part; ++turn) {
            if (failed) return;
            if (turn >= kPatience) give_way();
          }
          walk();
          progress.store(part + 1, std::memory_order_release);
        });
      }
    }
  };
  run_with_operators(threads, [&](int64_t thread) {
    try {
      take_parts(thread);
    } catch (...) {
      failed = true;
      throw;
    }
  });
}

/// Calls lead(part) for all parts, one after the other in one thread, and follow(slab, part) for
/// every slab and part, after lead(part), in the order of the parts: in other threads, and in that
/// one when all is led. Neither throws.
template <typename Lead, typename Follow>
void run_led(int64_t parts, int64_t slabs, int64_t threads, const Lead& lead,
             const Follow& follow) {
  struct alignas(64) Progress {
    std::atomic<bool> taken{false};  // a thread is in the slab
    std::atomic<int64_t> parts{0};   // that are done
  };
  std::vector<Progress> done(slabs);
  std::atomic<int64_t> led{0};
  /// Whether the slab is done, after what can be done now.
  const auto go_on = [&](int64_t slab) {
    Progress& p = done[slab];
    // A look first: an exchange takes the cache line, even in vain.
    int64_t part = p.parts.load(std::memory_order_relaxed);
    if (part == led.load(std::memory_order_relaxed)) return part == parts;
    if (p.taken.exchange(true, std::memory_order_acquire)) return false;
    part = p.parts.load(std::memory_order_relaxed);
    for (; part < led.load(std::memory_order_acquire); ++part) follow(slab, part);
    p.parts.store(part, std::memory_order_relaxed);
    p.taken.store(false, std::memory_order_release);
    return part == parts;
  };
  const auto finish = [&](int64_t first, int64_t last) {
    for (int64_t left = 1, turn = 0; left > 0; ++turn) {
      left = 0;
      for (int64_t slab = first; slab < last; ++slab) left += !go_on(slab);
      if (turn >= kPatience) give_way();
    }
  };
  share(threads, 1, [&](int64_t begin, int64_t end) {
    if (begin == 0) {
      for (int64_t part = 0; part < parts; ++part) {
        lead(part);
        led.store(part + 1, std::memory_order_release);
      }
    } else {
      const int64_t followers = threads - 1;  // each has slabs of its own
      finish(slabs * (begin - 1) / followers, slabs * (end - 1) / followers);
    }
    finish(0, slabs);
  });
}

}  // namespace fastrnn::cpu
