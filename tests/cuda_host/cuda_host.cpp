// SPDX-License-Identifier: Apache-2.0
//
// Launches, blocks and all that threads wait for, of the host for CUDA kernels.
#include "cuda_host.h"

#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "faults.h"
#include "memory.h"
#include "scheduler.h"

namespace cuda_host {

const Place* place = nullptr;

namespace {

unsigned volume(const dim3& extent) { return extent.x * extent.y * extent.z; }

dim3 position(unsigned index, const dim3& extent) {
  return {index % extent.x, index / extent.x % extent.y, index / extent.x / extent.y};
}

std::string text(const char* name, const dim3& at) {
  return std::string(name) + " (" + std::to_string(at.x) + "," + std::to_string(at.y) + "," +
         std::to_string(at.z) + ")";
}

std::string text(const Place& at) {
  return text("block", at.block) + " " + text("thread", at.thread);
}

Fiber& self() {
  if (scheduler.current == nullptr) throw std::runtime_error("outside a launch");
  return *scheduler.current;
}

/// The launch that runs, and who waits in the block that runs.
struct Launch {
  const unsigned threads;  // of a block
  GuardedBuffer shared;
  std::vector<Fiber*> at_barrier;
  std::vector<unsigned> in_warp;  // lanes of each warp that wait for their warp

  explicit Launch(const LaunchShape& shape);
  ~Launch();
};

Launch* active = nullptr;

Launch::Launch(const LaunchShape& shape)
    : threads(volume(shape.block)),
      shared(shape.shared_bytes, 16, "shared memory"),
      in_warp((threads + 31) / 32) {
  active = this;
}

Launch::~Launch() { active = nullptr; }

/// Of a deadlock: how many threads of the block do what. Those that do not wait have exited.
std::string describe_threads() {
  std::map<std::string, std::vector<const Fiber*>> by_activity;
  const auto& fibers = scheduler.fibers(active->threads);
  for (unsigned t = 0; t < active->threads; ++t) {
    const Fiber* fiber = fibers[t].get();
    const bool waits = fiber->waits_in != nullptr;
    by_activity[waits ? std::string("wait in ") + fiber->waits_in : "have exited"].push_back(fiber);
  }
  std::string report = text("block", fibers[0]->place.block) + ": ";
  const char* separator = "";
  for (const auto& [what, who] : by_activity) {
    report += separator + std::to_string(who.size()) + " " + what +
              " (first: " + text("thread", who.front()->place.thread) + ")";
    separator = ", ";
  }
  return report;
}

// ---- Launches -------------------------------------------------------------------------------

void check(const LaunchShape& shape) {
  const auto require = [](bool condition, const char* message) {
    if (!condition) throw std::runtime_error(message);
  };
  require(active == nullptr, "launch inside a launch");
  require(volume(shape.grid) > 0 && volume(shape.block) > 0, "launch of no threads");
  require(volume(shape.block) <= kMostThreads, "launch of more than 1024 threads per block");
  require(shape.shared_bytes <= 227 << 10, "launch with more than 227 KiB of shared memory");
}

/// Makes a block of the grid, in the fibers.
void prepare_block(Launch& launch, const LaunchShape& shape, unsigned block) {
  launch.shared.poison();
  const auto& fibers = scheduler.fibers(launch.threads);
  for (unsigned t = 0; t < launch.threads; ++t) {
    fibers[t]->place = {position(t, shape.block), position(block, shape.grid), shape.grid, t % 32};
  }
}

int launched = 0;

}  // namespace

int launches() { return launched; }

void launch(const LaunchShape& shape, std::function<void()> body) {
  ++launched;
  check(shape);
  Launch launch(shape);
  scheduler.run_thread = std::move(body);
  scheduler.describe_all = describe_threads;
  scheduler.start();
  const FaultHandlers handlers;
  for (const unsigned block : scheduler.ordered(volume(shape.grid))) {
    prepare_block(launch, shape, block);
    const bool good = scheduler.run(launch.threads);
    const std::string damage = GuardedBuffer::repair_all();
    if (!good) throw std::runtime_error(scheduler.failure + (damage.empty() ? "" : "; " + damage));
    if (!damage.empty()) throw std::runtime_error(damage);
  }
}

void set_order(Order order) { scheduler.order = order; }

void fail(const char* message) {
  if (scheduler.current == nullptr) throw std::runtime_error(message);
  scheduler.abandon(text(scheduler.current->place) + ": " + message);
}

void* shared_memory() {
  self();
  return active->shared.data();
}

void block_sync() {
  Fiber& me = self();
  me.waits_in = "__syncthreads";
  std::vector<Fiber*>& waiting = active->at_barrier;
  waiting.push_back(&me);
  if (waiting.size() == active->threads) {
    for (Fiber* fiber : waiting) scheduler.make_ready(*fiber);
    waiting.clear();
  }
  scheduler.wait();
}

void warp_exchange(const void* mine, size_t bytes, void* all, const char* what) {
  Fiber& me = self();
  me.waits_in = what;
  me.exchange = {mine, bytes, all};
  const unsigned first = me.index - me.place.lane;
  const unsigned lanes = std::min(32u, active->threads - first);
  unsigned& waiting = active->in_warp[first / 32];
  if (++waiting == lanes) {
    waiting = 0;
    const std::unique_ptr<Fiber>* warp = &scheduler.fibers(active->threads)[first];
    std::memset(all, 0xFF, 32 * bytes);
    for (unsigned lane = 0; lane < lanes; ++lane) {
      const Fiber& other = *warp[lane];
      if (other.exchange.bytes != bytes || std::strcmp(other.waits_in, what) != 0) {
        fail((std::string("the lanes of a warp disagree on sizes or functions: ") + what + " and " +
              other.waits_in)
                 .c_str());
      }
      std::memcpy(static_cast<char*>(all) + lane * bytes, other.exchange.mine, bytes);
    }
    for (unsigned lane = 0; lane < lanes; ++lane) {
      Fiber& other = *warp[lane];
      if (&other != &me) std::memcpy(other.exchange.all, all, 32 * bytes);
      scheduler.make_ready(other);
    }
  }
  scheduler.wait();
}

}  // namespace cuda_host
