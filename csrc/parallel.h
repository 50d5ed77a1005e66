// SPDX-License-Identifier: Apache-2.0
//
// Loops whose turns the threads of PyTorch's pool share, unless these threads come too late.
//
// A parallel region ends when each of its threads has been there. Where other processes keep the
// cores busy, a thread may get one after some 20 ms only, whatever there is to do. So when a region
// took longer than the calling thread would have needed for all of it, the caller runs the same
// turns alone for a while, before it tries again. Results do not depend on who runs a turn.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <time.h>

#include <algorithm>
#include <atomic>

namespace fastrnn {

/// What a call may use.
inline int64_t available_threads() {
#ifdef INTRA_OP_PARALLEL
  return at::in_parallel_region() ? 1 : at::get_num_threads();
#else
  return 1;  // without OpenMP at::parallel_for has the calling thread only
#endif
}

/// Nanoseconds of a clock; of the calling thread's, which stands still while it has no core.
inline int64_t nanoseconds(clockid_t clock) {
  timespec time;
  clock_gettime(clock, &time);
  return time.tv_sec * int64_t{1'000'000'000} + time.tv_nsec;
}
inline int64_t now() { return nanoseconds(CLOCK_MONOTONIC); }
inline int64_t own_now() { return nanoseconds(CLOCK_THREAD_CPUTIME_ID); }

/// Times of now() until which calling threads run alone, and until which they look at their own
/// clock too. To look at that takes as long as a small region: not before one was late.
inline std::atomic<int64_t> alone_until{0}, watched_until{0};

/// run(begin, end) for ranges that make up [0, count), each of `grain` turns or more.
template <typename Run>
void share(int64_t count, int64_t grain, const Run& run) {
  // Shorter waits are nothing to speak of. For so many times as long the thread stays alone, which
  // bounds what it loses by trying, and at most so long.
  constexpr int64_t kLate = 3'000'000, kTimesAlone = 8, kLongest = 1'000'000'000;
  const int64_t threads = std::min(available_threads(), (count + grain - 1) / grain);
  if (threads <= 1) return run(0, count);
  const int64_t begin = now();
  if (begin < alone_until.load(std::memory_order_relaxed)) return run(0, count);
  const bool watched = begin < watched_until.load(std::memory_order_relaxed);
  const int64_t own_begin = watched ? own_now() : begin;
  int64_t own = 0;  // the calling thread's share
  at::parallel_for(0, count, grain, [&](int64_t first, int64_t last) {
    run(first, last);
    if (at::get_thread_num() == 0) own = (watched ? own_now() : now()) - own_begin;
  });
  const int64_t end = now(), wait = end - begin - own;
  if (wait <= kLate) return;
  watched_until.store(end + kLongest, std::memory_order_relaxed);
  if (wait > (threads - 1) * own)
    alone_until.store(end + std::min(kTimesAlone * wait, kLongest), std::memory_order_relaxed);
}

/// run(i) for i < count, side by side, where run calls operators: threads of the pool have no state
/// of the caller's, and without this operators on its tensors would go through autograd's checks.
template <typename Run>
void run_with_operators(int64_t count, const Run& run) {
  share(count, 1, [&](int64_t begin, int64_t end) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    for (int64_t i = begin; i < end; ++i) run(i);
  });
}

}  // namespace fastrnn
