// SPDX-License-Identifier: Apache-2.0
//
// Launches, blocks, clusters and all that threads wait for, of the host for CUDA kernels.
#include "cuda_host.h"

#include <algorithm>
#include <array>
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

struct Barrier {
  int threads = 0;
  std::vector<Fiber*> waiting;
};

struct Cluster {
  unsigned threads = 0, arrived = 0, phase = 0;
  std::vector<Fiber*> waiting;
};

struct Block {
  GuardedBuffer* shared = nullptr;
  Cluster* cluster = nullptr;
  unsigned rank = 0;                 // in the cluster
  unsigned cluster_begin = 0;        // index of its block 0 among those that run concurrently
  unsigned started = 0, exited = 0;  // threads
  std::vector<unsigned> warps;       // lanes of each warp that wait for their warp
  std::array<Barrier, 16> barriers;
};

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

/// The launch that runs, and those of its blocks that run concurrently.
struct Launch {
  LaunchShape shape;
  unsigned threads = 0;  // of a block
  std::vector<Block> blocks;
  std::vector<Cluster> clusters;
  std::vector<std::unique_ptr<GuardedBuffer>> shared;

  explicit Launch(const LaunchShape& shape);
  ~Launch();
};

Launch* active = nullptr;

Launch::Launch(const LaunchShape& shape) : shape(shape), threads(volume(shape.block)) {
  const unsigned together = shape.cooperative ? volume(shape.grid) : shape.cluster;
  for (unsigned b = 0; b < together; ++b) {
    const std::string name = "shared memory " + std::to_string(b);
    shared.push_back(std::make_unique<GuardedBuffer>(shape.shared_bytes, 16, name));
  }
  active = this;
}

Launch::~Launch() { active = nullptr; }

std::string activity(const Fiber& fiber) {
  switch (fiber.state) {
    case State::kInWarp:
      return std::string("wait in ") + fiber.exchange.what;
    case State::kInBarrier:
      return "wait at barrier " + std::to_string(fiber.barrier_id);
    case State::kInCluster:
      return "wait at the cluster's barrier";
    case State::kPolling:
      return "poll";
    case State::kExited:
      return "have exited";
    default:
      return "run";
  }
}

/// Of each block that has work left (eight at most): how many threads do what.
std::string describe_threads() {
  std::string report;
  unsigned described = 0;
  const auto& fibers = scheduler.fibers(0);
  for (unsigned b = 0; b < active->blocks.size() && described < 8; ++b) {
    if (active->blocks[b].exited == active->threads) continue;
    std::map<std::string, std::vector<const Fiber*>> by_activity;
    for (unsigned t = 0; t < active->threads; ++t) {
      const Fiber* fiber = fibers[b * active->threads + t].get();
      by_activity[activity(*fiber)].push_back(fiber);
    }
    const dim3& at = by_activity.begin()->second.front()->place.block;
    report += (report.empty() ? "" : "; ") + text("block", at) + ": ";
    const char* separator = "";
    for (const auto& [what, who] : by_activity) {
      report += separator + std::to_string(who.size()) + " " + what +
                " (first: " + text("thread", who.front()->place.thread) + ")";
      separator = ", ";
    }
    ++described;
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
  require(volume(shape.block) <= 1024, "launch of more than 1024 threads per block");
  require(shape.shared_bytes <= 227 << 10, "launch with more than 227 KiB of shared memory");
  require(shape.cluster >= 1 && shape.cluster <= 16, "launch of a cluster of not 1 to 16 blocks");
  const unsigned together = shape.cooperative ? volume(shape.grid) : shape.cluster;
  // Each has a stack between two inaccessible pages, and Linux limits a process's mappings.
  require(together * volume(shape.block) <= 16384, "launch of more than 16384 concurrent threads");
  require(shape.grid.x % shape.cluster == 0, "launch of a grid that clusters do not divide");
}

/// The life of a thread around the kernel.
void run_thread(const std::function<void()>& kernel) {
  Block& block = *self().block;
  // Not before: what others write to a block that has not begun is lost.
  if (block.started++ == 0) block.shared->poison();
  kernel();
  if (++block.exited == active->threads) block.shared->set_open(false);
}

/// Makes blocks [first, first + count) of the grid, in the fibers.
void prepare_blocks(Launch& launch, unsigned first, unsigned count) {
  const LaunchShape& shape = launch.shape;
  const auto& fibers = scheduler.fibers(count * launch.threads);
  launch.blocks.assign(count, Block{});
  launch.clusters.assign(count / shape.cluster, Cluster{});
  for (unsigned b = 0; b < count; ++b) {
    Block& block = launch.blocks[b];
    block.shared = launch.shared[b].get();
    block.shared->set_open(true);
    block.cluster = &launch.clusters[b / shape.cluster];
    block.cluster->threads = shape.cluster * launch.threads;
    block.rank = b % shape.cluster;
    block.cluster_begin = b - block.rank;
    block.warps.assign((launch.threads + 31) / 32, 0);
    for (unsigned t = 0; t < launch.threads; ++t) {
      Fiber& fiber = *fibers[b * launch.threads + t];
      fiber.place = {position(t, shape.block), position(first + b, shape.grid), shape.block,
                     shape.grid, t % 32};
      fiber.block = &block;
      fiber.index = b * launch.threads + t;
      fiber.arrived = false;
      fiber.copies.clear();
    }
  }
}

void release_all(std::vector<Fiber*>& waiting) {
  for (Fiber* fiber : waiting) scheduler.make_ready(*fiber);
  waiting.clear();
  scheduler.made_progress();
}

/// How many lanes the warp of the fiber has.
unsigned lanes_of_warp(const Fiber& fiber) {
  const unsigned begin = (fiber.index - fiber.place.lane) % active->threads;
  return std::min(32u, active->threads - begin);
}

/// A warp is to come to a barrier as a whole.
void check_whole_warps(const std::vector<Fiber*>& waiting) {
  for (const Fiber* fiber : waiting) {
    const std::unique_ptr<Fiber>* warp = &scheduler.fibers(0)[fiber->index - fiber->place.lane];
    for (unsigned lane = 0; lane < lanes_of_warp(*fiber); ++lane) {
      if (warp[lane]->state != State::kInBarrier || warp[lane]->barrier_id != fiber->barrier_id) {
        fail("a barrier is complete with only a part of a warp");
      }
    }
  }
}

int block_threads() {
  self();
  return static_cast<int>(active->threads);
}

void wait_at_barrier(int id, int threads) {
  Fiber& me = self();
  Barrier& barrier = me.block->barriers[id];
  if (barrier.waiting.empty()) barrier.threads = threads;
  if (barrier.threads != threads) fail("threads disagree on how many a barrier waits for");
  me.state = State::kInBarrier;
  me.barrier_id = id;
  barrier.waiting.push_back(&me);
  if (static_cast<int>(barrier.waiting.size()) == threads) {
    if (threads != block_threads()) check_whole_warps(barrier.waiting);
    release_all(barrier.waiting);
  }
  scheduler.wait();
}

int launched = 0;

}  // namespace

int launches() { return launched; }

void launch(const LaunchShape& shape, std::function<void()> body) {
  ++launched;
  check(shape);
  Launch launch(shape);
  const unsigned together = static_cast<unsigned>(launch.shared.size());
  const unsigned groups = volume(shape.grid) / together;
  scheduler.run_thread = [&] { run_thread(body); };
  scheduler.describe_all = describe_threads;
  scheduler.start();
  const FaultHandlers handlers;
  for (const unsigned group : scheduler.ordered(groups)) {
    prepare_blocks(launch, group * together, together);
    const bool good = scheduler.run(together * launch.threads);
    for (auto& shared : launch.shared) shared->set_open(true);
    const std::string damage = GuardedBuffer::repair_all();
    if (!good) throw std::runtime_error(scheduler.failure + (damage.empty() ? "" : "; " + damage));
    if (!damage.empty()) throw std::runtime_error(damage);
  }
}

void set_order(Order order) { scheduler.order = order; }

void made_progress() { scheduler.made_progress(); }

void fail(const char* message) {
  if (scheduler.current == nullptr) throw std::runtime_error(message);
  scheduler.abandon(text(scheduler.current->place) + ": " + message);
}

void* shared_memory() { return self().block->shared->data(); }

void yield() {
  self();
  scheduler.poll();
}

void barrier(int id, int threads) {
  const int all = block_threads();
  if (id < 0 || id > 15) fail("a barrier's id is 0 to 15");
  if (threads < 1 || threads > all || (threads % 32 != 0 && threads != all)) {
    fail("a barrier waits for whole warps of the block");
  }
  wait_at_barrier(id, threads);
}

void block_sync() { wait_at_barrier(0, block_threads()); }

void warp_exchange(const void* mine, size_t bytes, void* all, unsigned mask, const char* what) {
  Fiber& me = self();
  mask &= kAllLanes >> (32 - lanes_of_warp(me));
  if ((mask >> me.place.lane & 1) == 0) {
    fail("a lane calls a function of its warp with a mask that lacks the lane");
  }
  unsigned& waiting = me.block->warps[me.index % active->threads / 32];
  waiting |= 1u << me.place.lane;
  me.exchange = {mine, bytes, all, mask, what};
  me.state = State::kInWarp;
  if ((waiting & mask) == mask) {
    const std::unique_ptr<Fiber>* warp = &scheduler.fibers(0)[me.index - me.place.lane];
    if (bytes != 0) std::memset(all, 0xFF, 32 * bytes);
    for (unsigned rest = mask; rest != 0; rest &= rest - 1) {
      const unsigned lane = static_cast<unsigned>(__builtin_ctz(rest));
      const Exchange& other = warp[lane]->exchange;
      if (other.mask != mask || other.bytes != bytes || std::strcmp(other.what, what) != 0) {
        fail((std::string("the lanes of a warp disagree on sizes, masks or functions: ") + what +
              " and " + other.what)
                 .c_str());
      }
      if (bytes != 0) std::memcpy(static_cast<char*>(all) + lane * bytes, other.mine, bytes);
    }
    for (unsigned rest = mask; rest != 0; rest &= rest - 1) {
      Fiber& other = *warp[__builtin_ctz(rest)];
      if (bytes != 0 && &other != &me) std::memcpy(other.exchange.all, all, 32 * bytes);
      scheduler.make_ready(other);
    }
    waiting &= ~mask;
  }
  scheduler.wait();
}

unsigned cluster_size() {
  self();
  return active->shape.cluster;
}

unsigned cluster_rank() { return self().block->rank; }

void cluster_arrive() {
  Fiber& me = self();
  Cluster& cluster = *me.block->cluster;
  if (me.arrived) fail("cluster_arrive twice without cluster_wait");
  me.arrived = true;
  me.phase = cluster.phase;
  if (++cluster.arrived == cluster.threads) {
    cluster.arrived = 0;
    cluster.phase += 1;
    release_all(cluster.waiting);
  }
}

void cluster_wait() {
  Fiber& me = self();
  if (!me.arrived) fail("cluster_wait without cluster_arrive");
  me.arrived = false;
  if (me.phase == me.block->cluster->phase) {
    me.state = State::kInCluster;
    me.block->cluster->waiting.push_back(&me);
  } else {
    scheduler.make_ready(me);
  }
  scheduler.wait();
}

void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

void* peer_shared(void* own_shared_address, unsigned rank) {
  const Block& own = *self().block;
  if (rank >= cluster_size()) fail("peer_shared of a rank that the cluster lacks");
  if (!own.shared->contains(own_shared_address, 0))
    fail("peer_shared of no address in own shared memory");
  const size_t offset =
      static_cast<size_t>(static_cast<char*>(own_shared_address) - own.shared->data());
  return active->blocks[own.cluster_begin + rank].shared->data() + offset;
}

void cp_async(void* dst, const void* src, size_t bytes, size_t src_bytes) {
  if (!self().block->shared->contains(dst, bytes))
    fail("cp_async to no shared memory of the block");
  self().copies.issue(dst, src, bytes, src_bytes);
}

void cp_async_commit() { self().copies.commit(); }
void cp_async_wait(unsigned newest) { self().copies.wait(newest); }
void cp_async_wait_all() { self().copies.wait_all(); }

}  // namespace cuda_host
