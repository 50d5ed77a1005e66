// SPDX-License-Identifier: Apache-2.0
//
// Products beside the one walk of a layer, which leaves the other threads idle: part by part of the
// sequence, the product before a walk, or those after it.
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "../layer.h"
#include "../parallel.h"

namespace fastrnn::cpu {

/// Parts of T steps. A walk waits for the first one's product, so it has a tile of rows only; each
/// next is twice as long, up to a twelfth of the sequence.
inline std::vector<Range> growing_parts(int64_t T, int64_t rows_of_step) {
  constexpr int64_t kFirstRows = 6, kParts = 12;
  const int64_t first = at::divup(kFirstRows, rows_of_step);
  const int64_t most = std::max(first, at::divup(T, kParts));
  std::vector<Range> parts;
  for (int64_t begin = 0, steps = first; begin < T; steps = std::min(2 * steps, most)) {
    parts.push_back({begin, std::min(T, begin + steps)});
    begin = parts.back().end;
  }
  return parts;
}

/// Calls walk(i) for the parts i < `parts`, in this order, in the calling thread; and product(c, i)
/// for each chain c < `chains` of products, a chain's parts in order, by whichever thread is free:
/// part i before the walk's part i, or after it.
template <typename Walk, typename Product>
void walk_beside(int64_t parts, int64_t chains, bool products_first, const Walk& walk,
                 const Product& product) {
  constexpr int64_t kPatience = 4000;  // looks, some microseconds
  struct alignas(64) Chain {
    std::atomic<bool> taken{false};  // a thread is at it
    std::atomic<int64_t> done{0};    // parts
  };
  std::vector<Chain> chain(chains);
  std::atomic<int64_t> walked{0}, finished{0};
  /// Makes what can be made of a chain now; false if there is nothing, or a thread is at it.
  const auto go_on = [&](int64_t c) {
    const auto is_ready = [&](int64_t part) {
      return part < (products_first ? parts : walked.load(std::memory_order_acquire));
    };
    // A look first: an exchange takes the cache line, even in vain.
    if (!is_ready(chain[c].done.load(std::memory_order_relaxed))) return false;
    if (chain[c].taken.exchange(true, std::memory_order_acquire)) return false;
    int64_t part = chain[c].done.load(std::memory_order_relaxed);
    const int64_t before = part;
    for (; is_ready(part) && !(products_first && part > before); ++part) {
      product(c, part);
      chain[c].done.store(part + 1, std::memory_order_release);
      if (part + 1 == parts) ++finished;
    }
    chain[c].taken.store(false, std::memory_order_release);
    return part > before;
  };
  /// Makes products until `is_over()`.
  const auto help = [&](int64_t first, const auto& is_over) {
    for (int64_t look = 0; !is_over(); ++look) {
      for (int64_t c = 0; c < chains; ++c)
        if (go_on((first + c) % chains)) look = 0;
      if (look >= kPatience) give_way();
    }
  };
  share(std::min(available_threads(), chains + 1), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = 0; begin == 0 && i < parts; ++i) {
      if (products_first)
        help(0, [&] { return chain[0].done.load(std::memory_order_acquire) > i; });
      walk(i);
      walked.store(i + 1, std::memory_order_release);
    }
    help(begin, [&] { return finished.load(std::memory_order_acquire) == chains; });
  });
}

}  // namespace fastrnn::cpu
