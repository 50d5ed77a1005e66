// SPDX-License-Identifier: Apache-2.0
//
// Loops whose turns the threads of PyTorch's pool share, unless these threads come too late.
//
// A parallel region ends when each of its threads has been there. Where other processes keep the
// cores busy, a thread may get one after some 20 ms only, whatever there is to do. So there is an
// account of the time that regions have saved, with a small income: while it is overdrawn, the
// caller runs the same turns alone. So it does after a rest, for a while, if threads take long to
// wake up. Results do not depend on who runs a turn.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <sched.h>
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

/// What regions have saved, in nanoseconds, by the time counted_at: at most so much, that a single
/// wait is nothing, and so little that a wait is over in a second. All time that passes adds a part
/// of it: that much of it may be lost by waiting, and no more.
constexpr int64_t kMostSaved = 20'000'000, kLeastSaved = -125'000'000, kTimePerIncome = 8;
inline std::atomic<int64_t> saved{kMostSaved}, counted_at{0};

inline int64_t saved_at(int64_t time) {
  const int64_t income = (time - counted_at.load(std::memory_order_relaxed)) / kTimePerIncome;
  return std::min(kMostSaved, saved.load(std::memory_order_relaxed) + income);
}

/// The time of now() until which calling threads look at their own clock too, which takes as long
/// as a small region: not before one was late.
inline std::atomic<int64_t> watched_until{0};

/// How long this thread has waited inside its turns, in nanoseconds.
inline thread_local int64_t waited = 0;

/// For a turn that needs what another thread is late with: perhaps that one waits for this core.
inline void give_way() {
  const int64_t begin = now();
  sched_yield();
  waited += now() - begin;
}

/// Threads without work sleep after some milliseconds. Where the caller has slept too, one that is
/// woken may get its core only milliseconds later, for a call of some microseconds. So a thread is
/// not woken before the caller has had work for as long as that took the last times: at most so
/// long, and half as long after each second, since it may take less by then. Nanoseconds.
constexpr int64_t kAwake = 4'000'000, kMostRest = 1'000'000, kHalfLife = 1'000'000'000;

/// Of a calling thread, each of which has a pool of its own.
struct Rest {
  int64_t last_region = 0, last_share = 0;  // the ends of the last ones
  int64_t busy_alone = 0;                   // in `share`, since it was called after a rest
  int64_t wake_time = 0, woken_at = 0;

  bool are_asleep(int64_t time) const { return time - last_region > kAwake; }
  /// What it takes to wake them, as far as that matters.
  int64_t cost(int64_t time) const {
    return wake_time >> std::clamp<int64_t>((time - woken_at) / kHalfLife, 0, 62);
  }
  void woken(int64_t begin, int64_t end, int64_t wait) {
    wake_time = (cost(begin) + std::min(wait, kMostRest)) / 2;
    woken_at = end;
  }
};
inline thread_local Rest rest;

/// What the call takes that this thread is in, about; 0: not known.
inline thread_local int64_t expected = 0;

/// While there is one, its thread is in a call of so many multiply-adds.
class Call {
 public:
  explicit Call(int64_t multiply_adds) { expected = multiply_adds / kPerNanosecond; }
  ~Call() { expected = 0; }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

 private:
  static constexpr int64_t kPerNanosecond = 25;
};

/// run(begin, end) for ranges that make up [0, count), each of `grain` turns or more; by the caller
/// alone if not `parallel`.
template <typename Run>
void share(int64_t count, int64_t grain, const Run& run, bool parallel = true) {
  constexpr int64_t kLate = 3'000'000, kWatch = 1'000'000'000;  // a long wait, and then how long
  const int64_t threads = parallel ? std::min(available_threads(), at::divup(count, grain)) : 1;
  if (threads <= 1) return run(0, count);
  const int64_t begin = now(), saved_before = saved_at(begin);
  const bool asleep = rest.are_asleep(begin);
  if (begin - rest.last_share > kAwake) rest.busy_alone = 0;
  const int64_t busy = std::max(rest.busy_alone, expected);
  if (saved_before < 0 || (asleep && busy * (threads - 1) / threads < rest.cost(begin))) {
    run(0, count);
    rest.last_share = now();
    rest.busy_alone += rest.last_share - begin;
    return;
  }
  const bool watched = begin < watched_until.load(std::memory_order_relaxed);
  const int64_t own_begin = watched ? own_now() : 0, waited_before = waited;
  int64_t own = 0;  // the calling thread's share
  at::parallel_for(0, count, grain, [&](int64_t first, int64_t last) {
    run(first, last);
    if (at::get_thread_num() != 0) return;
    own = now() - begin - (waited - waited_before);
    if (watched) own = std::min(own, own_now() - own_begin);
  });
  const int64_t end = now(), wait = end - begin - own;
  if (asleep) rest.woken(begin, end, wait);
  rest.last_region = rest.last_share = end;
  if (wait > kLate) watched_until.store(end + kWatch, std::memory_order_relaxed);
  saved.store(std::clamp(saved_before + (threads - 1) * own - wait, kLeastSaved, kMostSaved),
              std::memory_order_relaxed);
  counted_at.store(end, std::memory_order_relaxed);
}

/// While there is one, its thread is in turns of share_with_operators, perhaps in all of them
/// alone.
class Turn {
 public:
  Turn() : outer_(inside) { inside = true; }
  ~Turn() { inside = outer_; }
  static inline thread_local bool inside = false;

 private:
  const bool outer_;
};

/// share(count, 1, run), where run calls operators: threads of the pool have no state of the
/// caller's, and without this operators on its tensors would go through autograd's checks.
template <typename Run>
void share_with_operators(int64_t count, const Run& run) {
  share(count, 1, [&](int64_t begin, int64_t end) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    const Turn turn;
    run(begin, end);
  });
}

/// run(i) for i < count, side by side, where run calls operators.
template <typename Run>
void run_with_operators(int64_t count, const Run& run) {
  share_with_operators(count, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run(i);
  });
}

}  // namespace fastrnn
