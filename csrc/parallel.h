// SPDX-License-Identifier: Apache-2.0
//
// Loops whose turns the threads of PyTorch's pool share, unless these threads come too late.
//
// A parallel region ends when each of its threads has been there. Where other processes keep the
// cores busy, a thread may get one after some 20 ms only, whatever there is to do. So there is an
// account of the time that regions have saved: if it is overdrawn, the caller runs the same turns
// alone for a while, before it tries again. Results do not depend on who runs a turn.
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

/// What regions have saved, in nanoseconds: at most so much, that a single wait is nothing.
constexpr int64_t kMostSaved = 20'000'000;
inline std::atomic<int64_t> saved{kMostSaved};

/// Times of now() until which calling threads run alone, and until which they look at their own
/// clock too. To look at that takes as long as a small region: not before one was late.
inline std::atomic<int64_t> alone_until{0}, watched_until{0};

/// run(begin, end) for ranges that make up [0, count), each of `grain` turns or more.
template <typename Run>
void share(int64_t count, int64_t grain, const Run& run) {
  // A wait that is long. A loss is followed by so many times as much alone, which bounds what is
  // lost by trying; at most so long.
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
  if (wait > kLate) watched_until.store(end + kLongest, std::memory_order_relaxed);
  const int64_t now_saved = saved.load(std::memory_order_relaxed) + (threads - 1) * own - wait;
  saved.store(std::clamp<int64_t>(now_saved, 0, kMostSaved), std::memory_order_relaxed);
  if (now_saved < 0)
    alone_until.store(end + std::min(-kTimesAlone * now_saved, kLongest),
                      std::memory_order_relaxed);
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
