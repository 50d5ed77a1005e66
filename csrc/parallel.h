// SPDX-License-Identifier: Apache-2.0
//
// Loops whose turns the threads of PyTorch's pool share, unless these threads come too late.
//
// A parallel region ends when its last thread has been there. Where other processes keep the cores
// busy, that can take 20 ms, whatever there is to do. So each calling thread has a credit of time
// that may be lost by waiting; while it is used up, the caller runs the same turns alone. Results
// do not depend on who runs a turn.
#pragma once

#include <ATen/Parallel.h>
#include <sched.h>
#include <time.h>

#include <algorithm>

namespace fastrnn {

/// What a call may use.
inline int64_t available_threads() {
#ifdef INTRA_OP_PARALLEL
  return at::in_parallel_region() ? 1 : at::get_num_threads();
#else
  return 1;  // without OpenMP at::parallel_for has the calling thread only
#endif
}

inline int64_t now() {  // nanoseconds
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * int64_t{1'000'000'000} + time.tv_nsec;
}

/// What a calling thread knows of its pool. All times in nanoseconds.
struct Pool {
  // One stall of 20 ms is tolerated. Credit comes back at an eighth of all time that passes: so
  // much may be lost in the long run. Alone for a second at most.
  static constexpr int64_t kMostCredit = 20'000'000, kLeastCredit = -125'000'000, kRegain = 8;
  // Idle threads sleep after some milliseconds. Where the caller slept too, to wake them can take
  // longer than a small call: they are woken when the caller has been busy for a while.
  static constexpr int64_t kAwake = 4'000'000, kBusy = 1'000'000;

  int64_t credit = kMostCredit, counted_at = 0;
  int64_t last_region = 0, last_share = 0, busy_since = 0;
  int64_t expected = 0;  // of the call that the thread is in; 0: not known
  int64_t waited = 0;    // in give_way, since it was cleared

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
  const int64_t begin = now();
  sched_yield();
  pool.waited += now() - begin;
}

/// run(begin, end) for ranges that make up [0, count), each of `grain` turns or more; by the caller
/// alone if not `parallel`.
template <typename Run>
void share(int64_t count, int64_t grain, const Run& run, bool parallel = true) {
  const int64_t threads = parallel ? std::min(available_threads(), at::divup(count, grain)) : 1;
  if (threads <= 1) return run(0, count);
  const int64_t begin = now();
  if (pool.goes_alone(begin)) {
    run(0, count);
    pool.last_share = now();
    return;
  }
  int64_t own = 0;  // the time of the caller's turns
  pool.waited = 0;
  at::parallel_for(0, count, grain, [&](int64_t first, int64_t last) {
    run(first, last);
    if (at::get_thread_num() == 0) own = now() - begin - pool.waited;
  });
  const int64_t end = now();
  pool.last_region = pool.last_share = end;
  // Beyond what the caller alone would have taken, about.
  pool.credit =
      std::max(Pool::kLeastCredit, pool.credit - std::max<int64_t>(0, end - begin - threads * own));
}

}  // namespace fastrnn
