// SPDX-License-Identifier: Apache-2.0
//
// Fibers of the host for CUDA kernels and the choice of the one that runs next. Knows nothing of
// blocks and barriers: cuda_host.cpp says when a fiber waits and when it is ready again.
#pragma once

#include <setjmp.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda_host.h"
#include "memory.h"

namespace cuda_host {

struct Block;

enum class State { kReady, kPolling, kInWarp, kInBarrier, kInCluster, kExited };

/// What a lane that waits for its warp has brought along.
struct Exchange {
  const void* mine;
  size_t bytes;
  void* all;
  unsigned mask;
  const char* what;
};

/// One CUDA thread. Its stack serves many threads, one after another.
struct Fiber {
  Fiber();

  jmp_buf resume;  // where it goes on
  Place place;
  Block* block = nullptr;
  unsigned index = 0;  // among the threads that run concurrently
  State state = State::kReady;
  Exchange exchange{};   // in kInWarp
  int barrier_id = 0;    // in kInBarrier
  bool arrived = false;  // at the cluster's barrier, and has not waited yet
  unsigned phase = 0;    // of that barrier, at the arrival
  AsyncCopies copies;
  GuardedPages stack;
};

/// A set of small numbers that yields the smallest.
class ReadySet {
 public:
  void clear(size_t size);
  void insert(size_t number);
  /// Removes and returns the smallest number, or -1.
  int64_t pop();

 private:
  std::vector<uint64_t> words_;    // a bit per number
  std::vector<uint64_t> summary_;  // a bit per word that is not 0
};

class Scheduler {
 public:
  Order order;                                // of the launches to come
  Fiber* current = nullptr;                   // null outside a launch
  std::string failure;                        // why the last run() returned false
  std::function<void()> run_thread;           // the life of `current`
  std::function<std::string()> describe_all;  // what every fiber is waiting for

  /// Starts a launch: the order and its random numbers begin anew.
  void start();
  /// `count` units in the order in which they are to run.
  std::vector<unsigned> ordered(unsigned count);
  /// `count` fibers, whose place, block and index the caller sets before run().
  const std::vector<std::unique_ptr<Fiber>>& fibers(unsigned count);
  /// Runs run_thread() in the first `count` fibers, until all have exited or one has failed.
  bool run(unsigned count);

  void make_ready(Fiber& fiber);
  /// Runs others until `current`, whose state the caller has set, is ready and its turn has come.
  void wait();
  void poll();
  void made_progress() { idle_rounds_ = 0; }
  [[noreturn]] void abandon(std::string message);

 private:
  Fiber* next();
  [[noreturn]] void enter(Fiber& fiber);
  void draw_ranks();
  void wake_polling();

  std::vector<std::unique_ptr<Fiber>> pool_;
  unsigned count_ = 0;           // fibers of this run
  unsigned left_ = 0;            // of which have not exited
  std::vector<unsigned> rank_;   // of a fiber; the ready one of the lowest rank runs
  std::vector<unsigned> fiber_;  // of a rank
  ReadySet ready_;               // ranks
  std::vector<Fiber*> polling_;
  unsigned idle_rounds_ = 0;  // rounds of nothing but polling
  unsigned until_draw_ = 0;   // switches until new ranks are drawn
  std::mt19937_64 random_;
  sigjmp_buf leave_;  // of run()

  friend void fiber_main();
};

extern Scheduler scheduler;

constexpr size_t kStackBytes = 128 << 10;

}  // namespace cuda_host
