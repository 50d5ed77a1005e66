// SPDX-License-Identifier: Apache-2.0
//
// Launches, blocks and all that threads wait for, of the host for CUDA kernels.
#include "cuda_host.h"

#include <algorithm>
#include <map>
#include <memory>
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

/// A block that runs, and who waits in it.
struct Block {
  GuardedBuffer shared;
  std::vector<Fiber*> at_barrier;
  std::vector<unsigned> in_warp;  // lanes of each warp that wait for their warp

  explicit Block(const LaunchShape& shape)
      : shared(shape.shared_bytes, 16, "shared memory"), in_warp((volume(shape.block) + 31) / 32) {}
};

/// The launch that runs. Its fibers are those of its blocks, one block after another.
struct Launch {
  const unsigned threads;                      // of a block
  std::vector<std::unique_ptr<Block>> blocks;  // that run at the same time

  explicit Launch(const LaunchShape& shape);
  ~Launch();
  Block& block_of(const Fiber& fiber) { return *blocks[fiber.index / threads]; }
  unsigned fibers() const { return threads * static_cast<unsigned>(blocks.size()); }
};

Launch* active = nullptr;

Launch::Launch(const LaunchShape& shape) : threads(volume(shape.block)) {
  const unsigned count = shape.resident ? volume(shape.grid) : 1;
  for (unsigned i = 0; i < count; ++i) blocks.push_back(std::make_unique<Block>(shape));
  active = this;
}

Launch::~Launch() { active = nullptr; }

/// Of a deadlock: how many threads do what. Those that do not wait have exited.
std::string describe_threads() {
  std::map<std::string, std::vector<const Fiber*>> by_activity;
  const auto& fibers = scheduler.fibers(active->fibers());
  for (unsigned t = 0; t < active->fibers(); ++t) {
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
  require(!shape.resident || volume(shape.grid) * volume(shape.block) <= kMostFibers,
          "launch of more than 32768 threads at the same time");
  require(shape.shared_bytes <= 227 << 10, "launch with more than 227 KiB of shared memory");
}

/// Makes a block of the grid, the launch's number i of those that run at the same time.
void prepare_block(Launch& launch, const LaunchShape& shape, unsigned i, unsigned block) {
  launch.blocks[i]->shared.poison();
  const auto& fibers = scheduler.fibers(launch.fibers());
  for (unsigned t = 0; t < launch.threads; ++t) {
    fibers[i * launch.threads + t]->place = {position(t, shape.block), position(block, shape.grid),
                                             shape.grid, t % 32};
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
  const std::vector<unsigned> order = scheduler.ordered(volume(shape.grid));
  for (size_t first = 0; first < order.size(); first += launch.blocks.size()) {
    for (unsigned i = 0; i < launch.blocks.size(); ++i)
      prepare_block(launch, shape, i, order[first + i]);
    const bool good = scheduler.run(launch.fibers());
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

void* shared_memory() { return active->block_of(self()).shared.data(); }

void block_sync() {
  Fiber& me = self();
  me.waits_in = "__syncthreads";
  std::vector<Fiber*>& waiting = active->block_of(me).at_barrier;
  waiting.push_back(&me);
  if (waiting.size() == active->threads) {
    for (Fiber* fiber : waiting) scheduler.make_ready(*fiber);
    waiting.clear();
  }
  scheduler.wait();
}

void let_others_run() {
  self().waits_in = "let_others_run";
  scheduler.wait_for_all();
}

void warp_exchange(const void* mine, size_t bytes, void* all, const char* what) {
  Fiber& me = self();
  me.waits_in = what;
  me.exchange = {mine, bytes, all};
  const unsigned first = me.index - me.place.lane;
  const unsigned in_block = first % active->threads;
  const unsigned lanes = std::min(32u, active->threads - in_block);
  unsigned& waiting = active->block_of(me).in_warp[in_block / 32];
  if (++waiting == lanes) {
    waiting = 0;
    const std::unique_ptr<Fiber>* warp = &scheduler.fibers(active->fibers())[first];
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
