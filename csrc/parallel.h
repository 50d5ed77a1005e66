// SPDX-License-Identifier: Apache-2.0
//
// Loops whose turns the threads of PyTorch's pool share, unless they come too late: a region ends
// when its last thread has been there, on busy cores after 20 ms, whatever there is to do. Results
// do not depend on who runs a turn.
#pragma once

#include <ATen/Parallel.h>
#include <sched.h>

#include <algorithm>
#include <chrono>

namespace fastrnn {
#ifdef INTRA_OP_PARALLEL
inline int64_t available_threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }
#else  // without OpenMP at::parallel_for has the calling thread only
inline int64_t available_threads() { return 1; }
#endif
inline int64_t now() {  // nanoseconds, as all times here
  return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
}

/// What a calling thread knows of its pool.
struct Pool {
  // Time that may be lost by waiting: one stall of 20 ms, and an eighth of all time; without
  // credit the caller goes alone, for a second at most. Threads that have been idle for kAwake
  // sleep. To wake them can take longer than a small call: not before the caller is busy.
  static constexpr int64_t kMostCredit = 20'000'000, kLeastCredit = -125'000'000, kRegain = 8;
  static constexpr int64_t kAwake = 4'000'000, kBusy = 1'000'000;
  int64_t credit = kMostCredit, counted_at = 0, waited = 0;  // waited: in this region's turns
  int64_t last_region = 0, last_share = 0, busy_since = 0, expected = 0;  // expected: of the call

  bool goes_alone(int64_t time) {
    credit = std::min(kMostCredit, credit + (time - counted_at) / kRegain);
    counted_at = time;
    if (time - last_share > kAwake) busy_since = time;
    return credit < 0 || (time - last_region > kAwake && time - busy_since + expected < kBusy);
  }
};
inline thread_local Pool pool;

/// For a turn that waits for another thread, which may be waiting for this core.
inline void give_way() {
  pool.waited -= now();
  sched_yield();
  pool.waited += now();
}

/// run(begin, end) for ranges that make up [0, count), each of `grain` turns or more.
template <typename Run>
void share(int64_t count, int64_t grain, const Run& run, bool parallel = true) {
  const int64_t threads = parallel ? std::min(available_threads(), at::divup(count, grain)) : 1;
  if (threads <= 1) return run(0, count);
  const int64_t begin = now();
  const bool alone = pool.goes_alone(begin);
  int64_t own = pool.waited = 0;  // time of the caller's turns
  const auto run_turns = [&](int64_t first, int64_t last) {
    run(first, last);
    if (alone || at::get_thread_num() == 0) own = now() - begin - pool.waited;
  };
  alone ? run_turns(0, count) : at::parallel_for(0, count, grain, run_turns);
  const int64_t end = pool.last_share = now();
  if (!alone) pool.last_region = end;
  // Lost: what goes beyond the time that the caller alone would have taken, about.
  const int64_t lost = alone ? 0 : std::max<int64_t>(0, end - begin - threads * own);
  pool.credit = std::max(Pool::kLeastCredit, pool.credit - lost);
}

}  // namespace fastrnn
