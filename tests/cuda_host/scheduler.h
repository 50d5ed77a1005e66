// SPDX-License-Identifier: Apache-2.0
//
// Fibers of the host for CUDA kernels and the choice of the one that runs next. Knows nothing of
// barriers: cuda_host.cpp says when a fiber waits and when it is ready again.
#pragma once

#include <setjmp.h>

#include <bitset>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda_host.h"
#include "memory.h"

namespace cuda_host {

constexpr size_t kStackBytes = 128 << 10;
constexpr unsigned kMostThreads = 1024;  // of a block
constexpr unsigned kMostFibers = 32 * kMostThreads;

/// What a lane that waits for its warp has brought along.
struct Exchange {
  const void* mine;
  size_t bytes;
  void* all;
};

/// One CUDA thread. Its stack serves those of many blocks, one after another.
struct Fiber {
  explicit Fiber(unsigned index);

  jmp_buf resume;        // where it goes on
  const unsigned index;  // in the block
  Place place;
  const char* waits_in = nullptr;  // a function's name; null: it does not wait
  Exchange exchange{};             // while it waits for its warp
  GuardedPages stack;
};

class Scheduler {
 public:
  Order order;                                // of the launches to come
  Fiber* current = nullptr;                   // null outside a launch
  std::string failure;                        // why the last run() returned false
  std::function<void()> run_thread;           // the life of `current`
  std::function<std::string()> describe_all;  // what every fiber waits for

  /// Starts a launch: the order and its random numbers begin anew.
  void start();
  /// `count` units in the order in which they are to run.
  std::vector<unsigned> ordered(unsigned count);
  /// `count` fibers at least, whose place the caller sets before run().
  const std::vector<std::unique_ptr<Fiber>>& fibers(unsigned count);
  /// Runs run_thread() in the first `count` fibers, until all have exited or one has failed.
  bool run(unsigned count);

  void make_ready(Fiber& fiber);
  /// `current` waits until all others wait.
  void wait_for_all();
  /// Runs others until `current` is ready and its turn has come.
  void wait();
  [[noreturn]] void abandon(std::string message);

 private:
  Fiber* next();
  [[noreturn]] void enter(Fiber& fiber);
  void draw_ranks();

  std::vector<std::unique_ptr<Fiber>> pool_;
  unsigned count_ = 0;              // fibers of this run
  unsigned left_ = 0;               // of which have not exited
  std::vector<unsigned> rank_;      // of a fiber; the ready one of the lowest rank runs
  std::vector<unsigned> fiber_;     // of a rank
  std::bitset<kMostFibers> ready_;  // ranks
  std::vector<Fiber*> polling_;     // in wait_for_all()
  bool progress_ = false;           // whether any has done anything but poll since they last ran
  unsigned until_draw_ = 0;         // switches until new ranks are drawn
  std::mt19937_64 random_;
  sigjmp_buf leave_;  // of run()

  friend void fiber_main();
};

extern Scheduler scheduler;

}  // namespace cuda_host
