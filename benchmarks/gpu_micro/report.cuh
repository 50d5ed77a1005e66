// SPDX-License-Identifier: Apache-2.0
//
// What a kernel of gpu_micro reports, and how it waits.
#pragma once

#include "primitives.cuh"

/// Zeroed before each launch.
struct Report {
  long long cycles, nanoseconds;  // of all rounds, on the multiprocessor of block 0
  unsigned wrong;                 // values that are not what they must be
  unsigned late;                  // threads that gave up waiting
};

/// Times what the first thread of block 0 does between the constructor and stop().
class Stopwatch {
 public:
  __device__ Stopwatch() : nanoseconds_(read_nanoseconds()), cycles_(read_cycles()) {}

  __device__ void stop(Report* report) const {
    const long long cycles = read_cycles() - cycles_;
    const long long nanoseconds = read_nanoseconds() - nanoseconds_;
    if (blockIdx.x != 0 || threadIdx.x != 0) return;
    report->cycles = cycles;
    report->nanoseconds = nanoseconds;
  }

 private:
  long long nanoseconds_, cycles_;
};

/// Polls until ready() is true, but not for ever: a protocol that is wrong must not hang the GPU.
/// The clock is read on every 64th poll only, so that it does not slow the others down.
template <class Ready>
__device__ bool wait_until(Ready ready) {
  constexpr int kMaxPolls = 1 << 20;
  constexpr long long kMaxCycles = 100'000'000;  // about 50 ms
  long long start = 0;
  for (int poll = 0; poll < kMaxPolls; ++poll) {
    if (ready()) return true;
    if (poll % 64 != 63) continue;
    const long long now = read_cycles();
    if (start == 0) start = now;
    if (now - start > kMaxCycles) return false;
  }
  return false;
}

/// Adds to the report what this thread has found; once, at the end of a kernel.
__device__ inline void add_findings(Report* report, unsigned wrong, bool late) {
  if (wrong != 0) atomicAdd(&report->wrong, wrong);
  if (late) atomicAdd(&report->late, 1u);
}
