// SPDX-License-Identifier: Apache-2.0
//
// Side by side what one thread does part by part of a sequence, and what such parts need or are
// needed for: layers, the products before a walk, and those after it.
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "../layer.h"
#include "../parallel.h"

namespace fastrnn::cpu {

/// Work on all parts of a sequence, one after the other.
struct Stage {
  int64_t layer, task;  // what it is, for the caller
  int64_t cost;         // compared with others
  int64_t after;        // index of the stage whose same part comes before; -1: none
  int64_t thread = 0;   // that it falls to
};

/// Gives every thread neighbours in the list, of about the same cost in all.
inline void divide(std::vector<Stage>& stages, int64_t threads) {
  int64_t total = 0, before = 0;
  for (const Stage& stage : stages) total += stage.cost;
  for (Stage& stage : stages) {
    stage.thread = (2 * before + stage.cost) * threads / (2 * total);
    before += stage.cost;
  }
}

/// Parts of T steps. Since other stages wait for the first one, it has `first` steps only; each
/// next is half as long again, up to `most` steps.
inline std::vector<Range> growing_parts(int64_t T, int64_t first, int64_t most) {
  std::vector<Range> parts;
  for (int64_t begin = 0, steps = first; begin < T; steps += (steps + 1) / 2) {
    parts.push_back({begin, std::min(T, begin + std::min(steps, most))});
    begin = parts.back().end;
  }
  return parts;
}

/// Calls run(stage, part) for all stages and parts: each after the part before in the stage, and
/// after the same part in stage `after`; and before a stage's first part prepare(stage), early
/// where its thread has nothing else to do. A thread whose stages wait takes up others that nobody
/// is at: those which no stage waits for, and after some time, when a thread must be late, all.
template <typename Prepare, typename Run>
void run_pipeline(const std::vector<Stage>& stages, int64_t parts, int64_t threads,
                  const Prepare& prepare, const Run& run) {
  constexpr int64_t kPatience = 4000;  // looks at stages while waiting, some microseconds or more
  struct alignas(64) Progress {
    std::atomic<bool> taken{false};  // a thread is at it
    std::atomic<int64_t> next{-1};   // the first part that is not done; -1: not prepared
  };
  const int64_t count = static_cast<int64_t>(stages.size());
  std::vector<bool> is_awaited(count);  // by other stages
  for (const Stage& stage : stages)
    if (stage.after >= 0) is_awaited[stage.after] = true;
  std::vector<Progress> progress(count);
  std::atomic<int64_t> left{count};
  std::atomic<bool> failed{false};
  /// Parts that the stage before has done.
  const auto ready = [&](int64_t s) {
    const int64_t after = stages[s].after;
    return after < 0 ? parts : progress[after].next.load(std::memory_order_acquire);
  };
  /// Does what can be done now of a stage, but one part at most where others wait for it; if
  /// `early`, prepares it even without a part. Returns false if there is nothing, or a thread is at
  /// it.
  const auto go_on = [&](int64_t s, bool early) {
    Progress& p = progress[s];
    // A look first: an exchange takes the cache line, even in vain.
    int64_t next = p.next.load(std::memory_order_relaxed);
    const bool prepares = early && next < 0;
    if (next == parts || (std::max<int64_t>(next, 0) >= ready(s) && !prepares)) return false;
    if (p.taken.exchange(true, std::memory_order_acquire)) return false;
    next = p.next.load(std::memory_order_relaxed);
    if (next < 0) {
      prepare(stages[s]);
      p.next.store(next = 0, std::memory_order_relaxed);
    }
    for (bool more = true; more && next < ready(s); more = !is_awaited[s]) {
      run(stages[s], next);
      p.next.store(++next, std::memory_order_release);
      if (next == parts) --left;
    }
    p.taken.store(false, std::memory_order_release);
    return true;
  };
  share_with_operators(threads, [&](int64_t begin, int64_t end) {
    const auto is_own = [&](int64_t s) {
      return begin <= stages[s].thread && stages[s].thread < end;
    };
    /// Of the latest stages first, as far as others wait for them.
    const auto do_own = [&](bool early) {
      for (const bool awaited : {true, false}) {
        for (int64_t s = count - 1; s >= 0; --s)
          if (is_own(s) && is_awaited[s] == awaited && go_on(s, early)) return true;
      }
      return false;
    };
    const auto help = [&](bool with_all) {
      for (int64_t s = 0; s < count; ++s)
        if ((with_all || !is_awaited[s]) && go_on(s, /*early=*/false)) return true;
      return false;
    };
    try {
      for (int64_t turn = 0; left > 0 && !failed; ++turn) {
        const bool is_late = turn >= kPatience / count;
        if (do_own(/*early=*/turn > 0))
          turn = -1;
        else if (!help(/*with_all=*/is_late) && is_late)
          give_way();
      }
    } catch (...) {
      failed = true;
      throw;
    }
  });
}

}  // namespace fastrnn::cpu
