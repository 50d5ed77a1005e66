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

constexpr unsigned kIdleRounds = 20000;
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
    self->state = State::kExited;
    scheduler.left_ -= 1;
    scheduler.made_progress();
    scheduler.wait();
  }
}

Fiber::Fiber() : stack(kStackBytes) {
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stack.begin();
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
  fiber_being_made = this;
  swapcontext(&maker, &context);
}

void ReadySet::clear(size_t size) {
  words_.assign(size / 64 + 1, 0);
  summary_.assign(words_.size() / 64 + 1, 0);
}

void ReadySet::insert(size_t number) {
  words_[number / 64] |= uint64_t{1} << number % 64;
  summary_[number / 4096] |= uint64_t{1} << number / 64 % 64;
}

int64_t ReadySet::pop() {
  for (size_t s = 0; s < summary_.size(); ++s) {
    if (summary_[s] == 0) continue;
    const size_t w = s * 64 + static_cast<size_t>(__builtin_ctzll(summary_[s]));
    const int bit = __builtin_ctzll(words_[w]);
    words_[w] &= words_[w] - 1;
    if (words_[w] == 0) summary_[s] &= summary_[s] - 1;
    return static_cast<int64_t>(w * 64) + bit;
  }
  return -1;
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
  while (pool_.size() < count) pool_.push_back(std::make_unique<Fiber>());
  return pool_;
}

/// Draws who goes first from now on. Those that poll take part: else they would always be last, as
/// if what they wait for came late.
void Scheduler::draw_ranks() {
  wake_polling();
  std::vector<unsigned> ready;
  for (int64_t rank; (rank = ready_.pop()) >= 0;) ready.push_back(fiber_[rank]);
  fiber_ = ordered(count_);
  for (unsigned rank = 0; rank < count_; ++rank) rank_[fiber_[rank]] = rank;
  for (const unsigned fiber : ready) ready_.insert(rank_[fiber]);
  until_draw_ = 1 + static_cast<unsigned>(random_() % (4 * count_));
}

bool Scheduler::run(unsigned count) {
  count_ = left_ = count;
  idle_rounds_ = 0;
  polling_.clear();
  rank_.resize(count);
  ready_.clear(count);
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
  fiber.state = State::kReady;
  ready_.insert(rank_[fiber.index]);
}

void Scheduler::wake_polling() {
  for (Fiber* fiber : polling_) make_ready(*fiber);
  polling_.clear();
}

Fiber* Scheduler::next() {
  if (order.kind == Order::kShuffled && --until_draw_ == 0) draw_ranks();
  int64_t rank = ready_.pop();
  if (rank < 0) {
    if (left_ == 0) siglongjmp(leave_, kExited);
    if (polling_.empty()) abandon("deadlock: " + describe_all());
    if (++idle_rounds_ > kIdleRounds) abandon("endless polling: " + describe_all());
    wake_polling();
    rank = ready_.pop();
  }
  return pool_[fiber_[rank]].get();
}

void Scheduler::wait() {
  // Saved first: next() may leave run(), and the fiber then goes on in the next run.
  if (_setjmp(current->resume) == 0) enter(*next());
}

void Scheduler::poll() {
  current->state = State::kPolling;
  polling_.push_back(current);
  wait();
}

void Scheduler::abandon(std::string message) {
  failure = std::move(message);
  siglongjmp(leave_, kFailed);
}

}  // namespace cuda_host
