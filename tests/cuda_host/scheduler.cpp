// SPDX-License-Identifier: Apache-2.0
//
// See scheduler.h. Contexts are made once with ucontext, then switched with _setjmp and _longjmp:
// swapcontext would call the system twice each time, to save and restore the signal mask.
#undef _FORTIFY_SOURCE  // its longjmp refuses to go to another stack
#include "scheduler.h"

#include <ucontext.h>

#include <algorithm>
#include <numeric>

namespace cuda_host {

Scheduler scheduler;

namespace {

enum { kExited = 1, kFailed = 2 };  // how run() was left

Fiber* fiber_being_made;
ucontext_t maker;

}  // namespace

/// Of every fiber: parks at once, then lives one thread's life each time it is resumed from there.
void fiber_main() {
  Fiber* self = fiber_being_made;
  if (_setjmp(self->resume) == 0) setcontext(&maker);
  for (;;) {
    std::string thrown;
    try {
      scheduler.run_thread();
    } catch (const std::exception& error) {
      thrown = error.what();  // abandon() must not leave from within a handler
    }
    if (!thrown.empty()) scheduler.abandon("exception: " + thrown);
    scheduler.left_ -= 1;
    scheduler.wait();
  }
}

Fiber::Fiber(unsigned index) : index(index), stack(kStackBytes) {
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stack.begin();
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
  fiber_being_made = this;
  swapcontext(&maker, &context);
}

void Scheduler::start() { random_.seed(order.seed); }

std::vector<unsigned> Scheduler::ordered(unsigned count) {
  std::vector<unsigned> units(count);
  std::iota(units.begin(), units.end(), 0u);
  if (order.kind == Order::kDescending) std::reverse(units.begin(), units.end());
  if (order.kind == Order::kShuffled) std::shuffle(units.begin(), units.end(), random_);
  return units;
}

const std::vector<std::unique_ptr<Fiber>>& Scheduler::fibers(unsigned count) {
  while (pool_.size() < count) {
    pool_.push_back(std::make_unique<Fiber>(static_cast<unsigned>(pool_.size())));
  }
  return pool_;
}

/// Draws who goes first from now on.
void Scheduler::draw_ranks() {
  std::vector<unsigned> ready;
  for (unsigned rank = 0; rank < count_; ++rank) {
    if (ready_[rank]) ready.push_back(fiber_[rank]);
  }
  fiber_ = ordered(count_);
  for (unsigned rank = 0; rank < count_; ++rank) rank_[fiber_[rank]] = rank;
  ready_.reset();
  for (const unsigned fiber : ready) ready_.set(rank_[fiber]);
  until_draw_ = 1 + static_cast<unsigned>(random_() % (4 * count_));
}

bool Scheduler::run(unsigned count) {
  count_ = left_ = count;
  rank_.resize(count);
  ready_.reset();
  polling_.clear();
  progress_ = true;
  draw_ranks();
  for (unsigned i = 0; i < count; ++i) make_ready(*pool_[i]);
  const int left = sigsetjmp(leave_, 1);
  if (left == 0) enter(*next());
  current = nullptr;
  place = nullptr;
  if (left == kFailed) pool_.clear();  // the fibers are in the middle of something
  return left == kExited;
}

void Scheduler::enter(Fiber& fiber) {
  current = &fiber;
  place = &fiber.place;
  _longjmp(fiber.resume, 1);
}

void Scheduler::make_ready(Fiber& fiber) {
  fiber.waits_in = nullptr;
  ready_.set(rank_[fiber.index]);
}

Fiber* Scheduler::next() {
  if (order.kind == Order::kShuffled && --until_draw_ == 0) draw_ranks();
  size_t rank = ready_._Find_first();  // of libstdc++
  if (rank == ready_.size() && progress_ && !polling_.empty()) {
    progress_ = false;
    for (Fiber* fiber : polling_) make_ready(*fiber);
    polling_.clear();
    rank = ready_._Find_first();
  }
  if (rank == ready_.size()) {
    if (left_ == 0) siglongjmp(leave_, kExited);
    abandon("deadlock: " + describe_all());
  }
  ready_.reset(rank);
  return pool_[fiber_[rank]].get();
}

void Scheduler::wait_for_all() {
  polling_.push_back(current);
  if (_setjmp(current->resume) == 0) enter(*next());
}

void Scheduler::wait() {
  progress_ = true;
  // Saved first: next() may leave run(), and the fiber then goes on in the next run.
  if (_setjmp(current->resume) == 0) enter(*next());
}

void Scheduler::abandon(std::string message) {
  failure = std::move(message);
  siglongjmp(leave_, kFailed);
}

}  // namespace cuda_host
