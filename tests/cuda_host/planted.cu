// SPDX-License-Identifier: Apache-2.0
//
// Small kernels, each right with Bug::kNone and wrong in one way with another Bug: they show that
// the host for CUDA kernels finds what it promises to find. Driven by test_cuda_host.py.
#include <cstdlib>
#include <stdexcept>

#include "cuda_host.h"

using namespace cuda_host;

/// test_cuda_host.py reads the names here.
enum class Bug : int {
  kNone,
  kNoBarrier,         // the barrier after a write to shared memory
  kDivergentBarrier,  // thread 0 goes around it
  kPartOfWarp,        // a barrier counts the right number of threads, but the wrong ones
  kUninitialised,     // the last element of shared memory is not written
  kReadPastEnd,
  kWritePastEnd,
  kWriteBeforeStart,
  kReadBeforeStart,
  kUnwritten,       // the last element of the output
  kLaneExits,       // lane 5 does not take part
  kLaneAtBarrier,   // lane 5 waits elsewhere
  kLaneElsewhere,   // lane 5 calls another function of the warp
  kNoFirstBarrier,  // writes to a block that may not have begun
  kNoLastBarrier,   // reads what may have gone
  kNoWait,
  kWaitForTooFew,
  kTooFewArrivals,
  kTooManyArrivals,
  kTooFewBytes,
  kSourceChanges,
  kDivision,
  kStackOverflow,
  kNull,
  kTrap,
  kAbort,
  kThrow,
};

namespace {

__device__ __forceinline__ float* floats() { return static_cast<float*>(shared_memory()); }

/// out[block] = the sum of x over the block's threads, by halves.
__global__ void block_sum(const float* x, float* out, Bug bug) {
  float* sums = floats();
  const unsigned t = threadIdx.x;
  if (bug != Bug::kUninitialised || t + 1 != blockDim.x) {
    sums[t] = x[blockIdx.x * blockDim.x + t];
  }
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    const bool skips = bug == Bug::kNoBarrier || (bug == Bug::kDivergentBarrier && t == 0);
    if (!skips) __syncthreads();
    if (t < half) sums[t] += sums[t + half];
  }
  if (t == 0) out[blockIdx.x] = sums[0];
}

/// y = 2 x, a grid that need not divide n.
__global__ void doubled(const float* x, float* y, int n, Bug bug) {
  int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const int end = bug == Bug::kReadPastEnd || bug == Bug::kWritePastEnd ? n + 1 : n;
  if (i >= end || (bug == Bug::kUnwritten && i == n - 1)) return;
  if (bug == Bug::kDivision) i %= static_cast<int>(threadIdx.x);
  if (bug == Bug::kTrap) __builtin_trap();
  if (bug == Bug::kAbort) std::abort();
  if (bug == Bug::kThrow) throw std::runtime_error("thrown by a kernel");
  if (bug == Bug::kNull && i == 3) x = nullptr;
  const bool last = i == n;
  const float value = x[last && bug == Bug::kWritePastEnd ? 0 : i];
  if (bug == Bug::kReadPastEnd && last) i = 0;
  if (bug == Bug::kReadBeforeStart && i == 0) {
    y[0] = x[-1];
  } else {
    y[bug == Bug::kWriteBeforeStart ? i - 1 : i] = 2 * value;
  }
}

/// out[0 .. 5][t]: xor, from lane 3 of 8, up, down, a sum of doubles by shuffles; ballots.
__global__ void shuffles(const float* x, float* out, Bug bug) {
  const unsigned t = threadIdx.x, n = blockDim.x;
  if (bug == Bug::kLaneExits && t == 5) return;
  if (bug == Bug::kLaneAtBarrier && t == 5) __syncthreads();
  const float value = x[t];
  if (bug == Bug::kLaneElsewhere && t == 5) __shfl_up_sync(kAllLanes, value, 1);
  out[t] = __shfl_xor_sync(kAllLanes, value, 3);
  out[n + t] = __shfl_sync(kAllLanes, value, 3, 8);
  out[2 * n + t] = __shfl_up_sync(kAllLanes, value, 2);
  out[3 * n + t] = __shfl_down_sync(kAllLanes, value, 2, 16);
  double sum = value;
  for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(kAllLanes, sum, bits);
  out[4 * n + t] = static_cast<float>(sum);
  const unsigned positive = __ballot_sync(kAllLanes, value > 0);
  const bool mixed = __any_sync(kAllLanes, value > 0) && !__all_sync(kAllLanes, value > 0);
  out[5 * n + t] = static_cast<float>(__builtin_popcount(positive)) + (mixed ? 100 : 0);
  // The halves of a warp may go separate ways.
  if (t % 32 < 16) __syncwarp(0x0000ffffu);
}

/// c = a b for [32, K] a and [K, 32] b: lane i holds row i of a and of c, and column i of b. Each
/// warp takes its share of K; warp 0 adds the shares.
__global__ void product(const float* a, const float* b, float* c, int K, Bug bug) {
  struct Fragments {
    float a, b;
  };
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  float row[32] = {};
  for (int k = static_cast<int>(warp); k < K; k += static_cast<int>(warps)) {
    Fragments all[32];
    warp_gather(Fragments{a[lane * K + k], b[k * 32 + lane]}, all);
    for (int j = 0; j < 32; ++j) row[j] += all[lane].a * all[j].b;
  }
  float* shares = floats();
  for (int j = 0; j < 32; ++j) shares[threadIdx.x * 32 + j] = row[j];
  if (bug != Bug::kNoBarrier) __syncthreads();
  if (warp != 0) return;
  for (int j = 0; j < 32; ++j) {
    float sum = 0;
    for (unsigned w = 0; w < warps; ++w) sum += shares[(w * 32 + lane) * 32 + j];
    c[lane * 32 + j] = sum;
  }
}

/// Two halves of the block hand over through named barriers: out[t] = x[t] + x of the other half.
__global__ void halves(const float* x, float* out, Bug bug) {
  const int t = threadIdx.x, n = blockDim.x, half = n / 2;
  floats()[t] = x[t];
  if (bug != Bug::kNoBarrier) barrier(1, n);
  out[t] = x[t] + floats()[(t + half) % n];
  const int first = bug == Bug::kPartOfWarp ? 16 : 0;
  const bool skips = bug == Bug::kDivergentBarrier && t == 0;
  if (t >= first && t < first + half && !skips) barrier(2, half);
}

/// Each block pushes x[rank] to its peers, sums what it was pushed, then reads a peer's sum.
__global__ void cluster_exchange(const float* x, float* out, Bug bug) {
  const unsigned rank = cluster_rank(), size = cluster_size(), t = threadIdx.x;
  if (bug != Bug::kNoFirstBarrier) cluster_sync();
  if (t < size) *static_cast<float*>(peer_shared(floats() + rank, t)) = x[blockIdx.x];
  if (bug != Bug::kNoBarrier) cluster_sync();
  if (t == 0) {
    float sum = 0;
    for (unsigned r = 0; r < size; ++r) sum += floats()[r];
    floats()[size] = sum + static_cast<float>(rank);
  }
  cluster_sync();
  const unsigned next = (rank + 1) % size;
  if (t == 1) out[blockIdx.x] = *static_cast<float*>(peer_shared(floats() + size, next));
  if (bug != Bug::kNoLastBarrier) cluster_sync();
}

__device__ void wait_for(uint64_t* bar, unsigned parity) {
  while (!mbarrier_try_wait(bar, parity)) yield();
}

/// Warp 1 hands each of n steps of x to warp 0 through one slot per lane, with a barrier for
/// "full" and one for "empty".
__global__ void hand_over(const float* x, float* out, int n, Bug bug) {
  uint64_t* full = static_cast<uint64_t*>(shared_memory());
  uint64_t* empty = full + 1;
  float* slot = reinterpret_cast<float*>(full + 2);
  const unsigned lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    mbarrier_init(full, bug == Bug::kTooFewArrivals ? 33 : 32);
    mbarrier_init(empty, 32);
  }
  __syncthreads();
  for (int i = 0; i < n; ++i) {
    const unsigned parity = static_cast<unsigned>(i) & 1;
    if (threadIdx.x >= 32) {
      wait_for(empty, parity ^ 1);
      slot[lane] = x[i * 32 + lane];
      mbarrier_arrive(full);
    } else {
      if (bug != Bug::kNoWait) wait_for(full, parity);
      out[i * 32 + lane] = slot[(lane + 1) % 32];
      mbarrier_arrive(empty);
    }
  }
}

/// As st.async does: block r stores x into block r + 1's shared memory and completes its bytes.
__global__ void remote_store(const float* x, float* out, Bug bug) {
  uint64_t* bar = static_cast<uint64_t*>(shared_memory());
  float* inbox = reinterpret_cast<float*>(bar + 2);
  const unsigned t = threadIdx.x, n = blockDim.x, i = blockIdx.x * n + t;
  if (t == 0) {
    mbarrier_init(bar, 1);
    mbarrier_arrive_expect_tx(bar, n * 4);
    if (bug == Bug::kTooManyArrivals) mbarrier_arrive(bar);
  }
  cluster_sync();
  const unsigned next = (cluster_rank() + 1) % cluster_size();
  *static_cast<float*>(peer_shared(inbox + t, next)) = x[i];
  const unsigned bytes = bug == Bug::kTooFewBytes && t == 0 ? 0 : 4;
  mbarrier_complete_tx(static_cast<uint64_t*>(peer_shared(bar, next)), bytes);
  if (bug != Bug::kNoWait) wait_for(bar, 0);
  out[i] = inbox[t ^ 1];
  cluster_sync();
}

/// out[t] = the sum over n steps of x[step][t], two stages of cp.async ahead; x has rows of
/// `columns` elements, padded to whole 16 bytes; what the block's 4 columns per thread exceed is
/// zeros.
__global__ void pipeline(float* x, float* out, int n, int columns, Bug bug) {
  const int t = threadIdx.x, width = 4 * blockDim.x, pitch = (columns + 3) / 4 * 4;
  const auto load = [&](int step) {
    const int left = step < n ? columns - 4 * t : 0;
    const size_t bytes = left <= 0 ? 0 : left >= 4 ? 16 : left * 4;
    cp_async(floats() + step % 3 * width + 4 * t, x + step * pitch + 4 * t, 16, bytes);
    cp_async_commit();
  };
  load(0);
  load(1);
  float sums[4] = {};
  for (int step = 0; step < n; ++step) {
    load(step + 2);
    if (bug == Bug::kSourceChanges && step == 0 && t == 0) x[pitch] += 1;
    if (bug != Bug::kNoWait) cp_async_wait(bug == Bug::kWaitForTooFew ? 3 : 2);
    __syncthreads();
    // Another thread's copy: seen only after its wait and the barrier.
    const int other = (t + 1) % static_cast<int>(blockDim.x);
    for (int c = 0; c < 4; ++c) sums[c] += floats()[step % 3 * width + 4 * other + c];
    __syncthreads();
  }
  cp_async_wait_all();
  const int other = (t + 1) % static_cast<int>(blockDim.x);
  for (int c = 0; c < 4; ++c) out[4 * other + c] = sums[c];
}

/// out[block] = the sum over n steps and all blocks of x + step: blocks meet at a counter in global
/// memory.
__global__ void grid_sum(const float* x, float* partial, float* out, unsigned* counter, int n,
                         Bug bug) {
  const unsigned blocks = gridDim.x, b = blockIdx.x;
  float sum = 0;
  for (int i = 0; i < n; ++i) {
    float* values = partial + i % 2 * blocks;
    if (threadIdx.x == 0) {
      values[b] = x[b] + static_cast<float>(i);
      *counter += 1;
      const unsigned all = static_cast<unsigned>(i + 1) * blocks;
      while (bug != Bug::kNoWait && *static_cast<volatile unsigned*>(counter) < all) yield();
    }
    __syncthreads();
    if (threadIdx.x == 1) {
      for (unsigned other = 0; other < blocks; ++other) sum += values[other];
    }
    if (bug != Bug::kNoLastBarrier) __syncthreads();  // before a block writes these values again
  }
  if (threadIdx.x == 1) out[b] = sum;
}

/// Block 0 writes the next value whenever block 1, which reads it with thread 1, lets it: out[i] =
/// i. Right in most orders without the barrier: the writer must be quick after waiting for long.
__global__ void read_and_allow(volatile int* state, float* out, int n, Bug bug) {
  volatile int &allowed = state[0], &written = state[1], &value = state[2];
  for (int i = 0; i < n; ++i) {
    if (blockIdx.x == 0 && threadIdx.x == 0) {
      while (allowed <= i) yield();
      value = i + 1;
      written = i + 1;
    } else if (blockIdx.x == 1) {
      while (threadIdx.x == 0 && written < i) yield();
      __syncthreads();
      __syncthreads();  // by now the writer has polled in vain
      if (threadIdx.x == 1) out[i] = static_cast<float>(value);
      if (bug != Bug::kNoBarrier) __syncthreads();
      if (threadIdx.x == 0) allowed = i + 1;
    }
  }
}

__attribute__((noinline)) float recurse(volatile float* x, int depth) {
  volatile float frame[256];
  frame[0] = x[0];
  return depth == 0 ? frame[0] : recurse(frame, depth - 1) + frame[0];
}

__global__ void deep(float* out, Bug bug) {
  volatile float one = 1;
  out[threadIdx.x] = recurse(&one, bug == Bug::kStackOverflow ? 100000 : 10);
}

/// out[1 ...] = the threads of all blocks in the order in which they run, out[0] = their number.
__global__ void sequence(int* out) {
  __syncthreads();
  out[++out[0]] = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
}

LaunchShape shape(int grid, int block, size_t shared_bytes, int cluster = 1) {
  LaunchShape shape;
  shape.grid = static_cast<unsigned>(grid);
  shape.block = static_cast<unsigned>(block);
  shape.shared_bytes = shared_bytes;
  shape.cluster = static_cast<unsigned>(cluster);
  return shape;
}

}  // namespace

extern "C" {

int run_block_sum(const float* x, float* out, int blocks, int threads, Bug bug) {
  return guarded(
      [=] { launch(shape(blocks, threads, threads * 4), [=] { block_sum(x, out, bug); }); });
}

int run_doubled(const float* x, float* y, int n, Bug bug) {
  return guarded([=] { launch(shape(n / 32 + 1, 32, 0), [=] { doubled(x, y, n, bug); }); });
}

int run_shuffles(const float* x, float* out, int threads, Bug bug) {
  return guarded([=] { launch(shape(1, threads, 0), [=] { shuffles(x, out, bug); }); });
}

int run_product(const float* a, const float* b, float* c, int K, Bug bug) {
  return guarded([=] { launch(shape(1, 96, 96 * 32 * 4), [=] { product(a, b, c, K, bug); }); });
}

int run_halves(const float* x, float* out, int threads, Bug bug) {
  return guarded([=] { launch(shape(1, threads, threads * 4), [=] { halves(x, out, bug); }); });
}

int run_cluster_exchange(const float* x, float* out, int blocks, int cluster, Bug bug) {
  return guarded(
      [=] { launch(shape(blocks, 32, 96, cluster), [=] { cluster_exchange(x, out, bug); }); });
}

int run_hand_over(const float* x, float* out, int n, Bug bug) {
  return guarded([=] { launch(shape(1, 64, 16 + 32 * 4), [=] { hand_over(x, out, n, bug); }); });
}

int run_remote_store(const float* x, float* out, int blocks, int threads, Bug bug) {
  return guarded([=] {
    const size_t shared_bytes = 16 + threads * 4;
    launch(shape(blocks, threads, shared_bytes, blocks), [=] { remote_store(x, out, bug); });
  });
}

int run_pipeline(float* x, float* out, int n, int columns, int threads, Bug bug) {
  return guarded([=] {
    launch(shape(1, threads, 3 * threads * 16), [=] { pipeline(x, out, n, columns, bug); });
  });
}

int run_grid_sum(const float* x, float* partial, float* out, unsigned* counter, int n, int blocks,
                 int cooperative, Bug bug) {
  return guarded([=] {
    LaunchShape all = shape(blocks, 64, 0);
    all.cooperative = cooperative != 0;
    launch(all, [=] { grid_sum(x, partial, out, counter, n, bug); });
  });
}

int run_read_and_allow(int* state, float* out, int n, Bug bug) {
  return guarded([=] {
    LaunchShape all = shape(2, 2, 0);
    all.cooperative = true;
    launch(all, [=] { read_and_allow(state, out, n, bug); });
  });
}

int run_sequence(int* out, int blocks, int threads) {
  return guarded([=] { launch(shape(blocks, threads, 0), [=] { sequence(out); }); });
}

int run_deep(float* out, Bug bug) {
  return guarded([=] { launch(shape(1, 2, 0), [=] { deep(out, bug); }); });
}
}
