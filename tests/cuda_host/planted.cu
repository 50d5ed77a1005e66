// SPDX-License-Identifier: Apache-2.0
//
// Small kernels, each right with Bug::kNone and wrong in one way with another Bug: they show that
// the host for CUDA kernels finds what it promises to find. Driven by test_cuda_host.py.
#include <cmath>
#include <cstdlib>
#include <stdexcept>

#include "cuda_host.h"

using namespace cuda_host;

/// test_cuda_host.py reads the names here.
enum class Bug : int {
  kNone,
  kNoBarrier,         // the barrier after a write to shared memory
  kNoLastBarrier,     // the one before it is written again
  kDivergentBarrier,  // thread 0 goes around it
  kUninitialised,     // odd blocks do not write the last element of shared memory
  kReadPastEnd,
  kWritePastEnd,
  kWriteBeforeStart,
  kReadBeforeStart,
  kUnwritten,      // the last element of the output
  kLaneExits,      // lane 5 does not take part
  kLaneAtBarrier,  // lane 5 waits elsewhere
  kLaneElsewhere,  // lane 5 calls another function of the warp
  kHalfOfWarp,     // a mask of 16 lanes
  kDivision,
  kStackOverflow,
  kNull,
  kTrap,
  kAbort,
  kThrow,
  kSilent,       // block 1 writes nothing
  kNotResident,  // a launch does not say that its blocks wait for each other
};

namespace {

__device__ __forceinline__ float* floats() { return static_cast<float*>(shared_memory()); }

/// out[block] = the sum of x over the block's threads, by halves.
__global__ void block_sum(const float* x, float* out, int threads, Bug bug) {
  float* sums = floats();
  const int t = threadIdx.x;
  const bool writes = bug != Bug::kUninitialised || blockIdx.x % 2 == 0 || t + 1 != threads;
  if (writes) sums[t] = x[blockIdx.x * threads + t];
  if (bug == Bug::kWritePastEnd) sums[threads] = 0;
  for (int half = threads / 2; half > 0; half /= 2) {
    const bool skips = bug == Bug::kNoBarrier || (bug == Bug::kDivergentBarrier && t == 0);
    if (!skips) __syncthreads();
    if (t < half) sums[t] += sums[t + half];
  }
  if (t == 0) out[blockIdx.x] = sums[0];
}

/// y = 2 x, by blocks of 32 threads that need not divide n.
__global__ void doubled(const float* x, float* y, int n, Bug bug) {
  int i = static_cast<int>(blockIdx.x * 32 + threadIdx.x);
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

/// out[0][t] = x of lane t ^ 3, out[1][t] = the sum of the warp's x, as doubles.
__global__ void shuffles(const float* x, float* out, int threads, Bug bug) {
  constexpr unsigned kAll = 0xffffffffu;
  const int t = threadIdx.x;
  if (bug == Bug::kLaneExits && t == 5) return;
  if (bug == Bug::kLaneAtBarrier && t == 5) __syncthreads();
  const float value = x[t];
  if (bug == Bug::kLaneElsewhere && t == 5) {
    float all[32];
    warp_gather(value, all, "elsewhere");
  }
  out[t] = __shfl_xor_sync(bug == Bug::kHalfOfWarp ? 0xffffu : kAll, value, 3);
  double sum = value;
  for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(kAll, sum, bits);
  out[threads + t] = static_cast<float>(sum);
}

constexpr int kProductThreads = 96;

/// c = a b for [32, K] a and [K, 32] b: lane i holds row i of a and of c, and column i of b. Each
/// warp takes its share of K; warp 0 adds the shares.
__global__ void product(const float* a, const float* b, float* c, int K, Bug bug) {
  struct Fragments {
    float a, b;
  };
  constexpr unsigned kWarps = kProductThreads / 32;
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float row[32] = {};
  for (int k = static_cast<int>(warp); k < K; k += static_cast<int>(kWarps)) {
    Fragments all[32];
    warp_gather(Fragments{a[lane * K + k], b[k * 32 + lane]}, all, "product");
    for (int j = 0; j < 32; ++j) row[j] += all[lane].a * all[j].b;
  }
  float* shares = floats();
  for (int j = 0; j < 32; ++j) shares[threadIdx.x * 32 + j] = row[j];
  if (bug != Bug::kNoBarrier) __syncthreads();
  if (warp != 0) return;
  for (int j = 0; j < 32; ++j) {
    float sum = 0;
    for (unsigned w = 0; w < kWarps; ++w) sum += shares[(w * 32 + lane) * 32 + j];
    c[lane * 32 + j] = sum;
  }
}

/// out = n rows of x, each rolled by one to the left.
__global__ void rolled(const float* x, float* out, int n, int threads, Bug bug) {
  const int t = threadIdx.x;
  for (int i = 0; i < n; ++i) {
    floats()[t] = x[i * threads + t];
    if (bug != Bug::kNoBarrier) __syncthreads();
    out[i * threads + t] = floats()[(t + 1) % threads];
    if (bug != Bug::kNoLastBarrier) __syncthreads();
  }
}

/// out[b] = the sum of x[0] to x[b]: each block waits for the one before to write its own.
__global__ void chain(const float* x, volatile float* out, Bug bug) {
  const unsigned b = blockIdx.x;
  if (threadIdx.x == 0) {
    while (b > 0 && std::isnan(out[b - 1])) let_others_run();
    floats()[0] = (b > 0 ? out[b - 1] : 0) + x[b];
  }
  __syncthreads();
  if (threadIdx.x == 1 && !(bug == Bug::kSilent && b == 1)) out[b] = floats()[0];
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

/// out[1 ...] = the threads of each block in the order in which they run, twice; out[0]: how many.
__global__ void sequence(int* out, int threads) {
  for (int round = 0; round < 2; ++round) {
    __syncthreads();
    out[++out[0]] = static_cast<int>(blockIdx.x * threads + threadIdx.x);
  }
}

LaunchShape shape(int grid, int block, size_t shared_bytes) {
  LaunchShape shape;
  shape.grid = static_cast<unsigned>(grid);
  shape.block = static_cast<unsigned>(block);
  shape.shared_bytes = shared_bytes;
  return shape;
}

}  // namespace

extern "C" {

int run_block_sum(const float* x, float* out, int blocks, int threads, Bug bug) {
  return guarded([=] {
    launch(shape(blocks, threads, threads * 4), [=] { block_sum(x, out, threads, bug); });
  });
}

int run_doubled(const float* x, float* y, int n, Bug bug) {
  return guarded([=] { launch(shape(n / 32 + 1, 32, 0), [=] { doubled(x, y, n, bug); }); });
}

int run_shuffles(const float* x, float* out, int threads, Bug bug) {
  return guarded([=] { launch(shape(1, threads, 0), [=] { shuffles(x, out, threads, bug); }); });
}

int run_product(const float* a, const float* b, float* c, int K, Bug bug) {
  return guarded([=] {
    const size_t shared_bytes = kProductThreads * 32 * 4;
    launch(shape(1, kProductThreads, shared_bytes), [=] { product(a, b, c, K, bug); });
  });
}

int run_rolled(const float* x, float* out, int n, int threads, Bug bug) {
  return guarded(
      [=] { launch(shape(1, threads, threads * 4), [=] { rolled(x, out, n, threads, bug); }); });
}

int run_sequence(int* out, int blocks, int threads) {
  return guarded([=] { launch(shape(blocks, threads, 0), [=] { sequence(out, threads); }); });
}

int run_chain(const float* x, float* out, int blocks, Bug bug) {
  return guarded([=] {
    LaunchShape all = shape(blocks, 2, 4);
    all.resident = bug != Bug::kNotResident;
    launch(all, [=] { chain(x, out, bug); });
  });
}

int run_deep(float* out, Bug bug) {
  return guarded([=] { launch(shape(1, 2, 0), [=] { deep(out, bug); }); });
}
}
