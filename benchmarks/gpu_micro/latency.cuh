// SPDX-License-Identifier: Apache-2.0
//
// Bare latencies of what a step is made of, in chains where each operation needs the one before.
//
// Expected in cycles: __syncthreads 21 + 2 per warp, shuffle 25, mma 25 (one every 6 when four are
// independent), shared memory 23 to 33, L2 258 near and 414 far. What hangs on it: their sum is the
// floor of a step; a step of step.cuh that is far above it has an avoidable stall. The latencies of
// L2 and DRAM over the cycles of a step say how many steps ahead P must be prefetched.
#pragma once

#include <numeric>

#include "host.cuh"
#include "step.cuh"

constexpr int kLinks = 4096;   // of a chain
constexpr int kUnrolled = 16;  // of which so many stand in the loop's body

// ---- Registers --------------------------------------------------------------------------------

/// The added 1 (about 4 cycles) keeps x in the range where tanhf takes its longer way.
template <class Tanh>
struct TanhLink {
  static constexpr float kStart = 0.5f;
  static __device__ float of(float x) { return Tanh::of(x + 1.0f); }
};
struct FfmaLink {
  static constexpr float kStart = 0.5f;
  static __device__ float of(float x) { return fmaf(x, x, 0.1f); }
};
struct ShuffleLink {
  static constexpr float kStart = 0.5f;
  static __device__ float of(float x) { return __shfl_down_sync(0xffffffffu, x, 1); }
};
struct TransposeLink {
  static constexpr uint32_t kStart = 1;
  static __device__ uint32_t of(uint32_t x) { return transpose(x); }
};

template <class Link, class Value>
__global__ void __launch_bounds__(32) chain_links(Value start, Value* out, Report* report) {
  // Lanes differ, or the compiler would leave out the shuffles.
  Value x = threadIdx.x % 4 == 0 ? start : Value(0);
  const Stopwatch stopwatch;
#pragma unroll 1
  for (int i = 0; i < kLinks; i += kUnrolled) {
#pragma unroll
    for (int j = 0; j < kUnrolled; ++j) x = Link::of(x);
  }
  out[threadIdx.x] = x;  // before the clock is read, which waits for it then
  stopwatch.stop(report);
}

/// One link: an mma on each of kChains accumulators.
template <int kChains>
__global__ void __launch_bounds__(32) chain_mma(uint4 a, uint2 b, float4* out, Report* report) {
  float sum[kChains][4] = {};
  const Stopwatch stopwatch;
#pragma unroll 1
  for (int i = 0; i < kLinks; i += kUnrolled) {
#pragma unroll
    for (int j = 0; j < kUnrolled; ++j) {
#pragma unroll
      for (int chain = 0; chain < kChains; ++chain) mma(sum[chain], a, b);
    }
  }
  float4 total = make_float4(0, 0, 0, 0);
#pragma unroll
  for (int chain = 0; chain < kChains; ++chain) {
    total.x += sum[chain][0], total.y += sum[chain][1];
    total.z += sum[chain][2], total.w += sum[chain][3];
  }
  out[threadIdx.x] = total;
  stopwatch.stop(report);
}

template <class Link>
void measure_link(const char* name) {
  measure(Entry(name), [](Entry& result) {
    auto start = Link::kStart;
    Buffer<decltype(start)> out(32);
    result.set(time_rounds(kLinks, [&](Report* report) {
      launch(chain_links<Link, decltype(start)>, {1, 32}, start, out.data(), report);
    }));
  });
}

template <int kChains>
void measure_mma_chain() {
  Entry entry("mma m16n8k16, bf16");
  measure(entry.set("accumulators", kChains), [](Entry& result) {
    Buffer<float4> out(32);
    const uint4 a = make_uint4(1, 2, 3, 4);
    result.set(time_rounds(kLinks, [&](Report* report) {
      launch(chain_mma<kChains>, {1, 32}, a, make_uint2(5, 6), out.data(), report);
    }));
  });
}

// ---- A block ----------------------------------------------------------------------------------

/// With kHandOver each thread passes a value on to the next warp through shared memory.
template <bool kHandOver>
__global__ void block_barriers(int rounds, Report* report) {
  unsigned* const values = reinterpret_cast<unsigned*>(dynamic_shared());
  const unsigned source = (threadIdx.x + 32) % blockDim.x;
  unsigned value = threadIdx.x;
  const Stopwatch stopwatch;
#pragma unroll 2
  for (int round = 0; round < rounds; ++round) {
    unsigned* const now = values + round % 2 * blockDim.x;
    if (kHandOver) now[threadIdx.x] = value + 1;
    __syncthreads();
    if (kHandOver) value = now[source];
  }
  stopwatch.stop(report);
  const unsigned origin = kHandOver ? (threadIdx.x + 32 * rounds) % blockDim.x + rounds : value;
  add_findings(report, value != origin, false);
}

template <bool kHandOver>
void measure_barrier(const char* name, unsigned warps) {
  Entry entry(name);
  measure(entry.set("warps", warps), [&](Entry& result) {
    result.set(time_rounds(kLinks, [&](Report* report) {
      launch(block_barriers<kHandOver>, {1, 32 * warps, 256 * warps}, kLinks, report);
    }));
  });
}

// ---- Memory -----------------------------------------------------------------------------------

/// Each entry holds the index of the next one.
__global__ void __launch_bounds__(32) chase_shared(int* out, Report* report) {
  constexpr int kEntries = 1024;
  int* const next = reinterpret_cast<int*>(dynamic_shared());
  for (int i = threadIdx.x; i < kEntries; i += 32) next[i] = (i + 33) % kEntries;
  __syncthreads();
  int at = threadIdx.x;
  const Stopwatch stopwatch;
#pragma unroll 1
  for (int i = 0; i < kLinks; i += kUnrolled) {
#pragma unroll
    for (int j = 0; j < kUnrolled; ++j) at = next[at];
  }
  *out = at;
  stopwatch.stop(report);
  add_findings(report, at != (static_cast<int>(threadIdx.x) + 33 * kLinks) % kEntries, false);
}

/// `next` holds at each index that is reached the next one; starts at index `at`.
__global__ void chase_global(const uint32_t* next, uint32_t at, int links, uint32_t* out,
                             Report* report) {
  const Stopwatch stopwatch;
#pragma unroll 1
  for (int i = 0; i < links; i += kUnrolled) {
#pragma unroll
    for (int j = 0; j < kUnrolled; ++j) at = load_l2(next + at);
  }
  *out = at;
  stopwatch.stop(report);
}

/// Cycles of a load of each of `lines` lines, by one thread a block: [blocks][lines]. Blocks start
/// at different lines, so as not to queue for one.
__global__ void load_latencies(const uint32_t* zeros, int lines, float* cycles) {
  constexpr int kRepeats = 64;
  for (int i = 0; i < lines; ++i) {
    const int line = (i + blockIdx.x) % lines;
    uint32_t at = load_l2(zeros + line * 32);
    const long long start = read_cycles();
#pragma unroll
    for (int j = 0; j < kRepeats; ++j) at += load_l2(zeros + line * 32 + at);
    // The last value decides, so that it has arrived when the clock is read.
    const long long end = at == 0 ? read_cycles() : start;
    cycles[blockIdx.x * lines + line] = static_cast<float>(end - start) / kRepeats;
  }
}

/// Chases through `nodes` places, `stride` words apart, in a random order. Each run goes on where
/// the last one stopped. Before it, `fresh` bytes elsewhere are overwritten and fill L2; without
/// any, all places are visited first.
inline void measure_chase(const char* name, int nodes, size_t stride, size_t fresh) {
  Entry entry(name);
  measure(entry.set("bytes", 4.0 * nodes * stride), [&](Entry& result) {
    std::vector<uint32_t> order(nodes), next(nodes);
    std::iota(order.begin(), order.end(), 0u);
    uint32_t state = 1;
    for (int i = nodes - 1; i > 0; --i) {
      state = state * 1664525u + 1013904223u;
      std::swap(order[i], order[static_cast<uint64_t>(state) * (i + 1) >> 32]);
    }
    for (int i = 0; i < nodes; ++i) next[order[i]] = order[(i + 1) % nodes] * stride;
    Buffer<uint32_t> places(nodes * stride), out(1);
    Buffer<char> elsewhere(fresh + 1);
    check(cudaMemcpy2D(places.data(), 4 * stride, next.data(), 4, 4, nodes, cudaMemcpyHostToDevice),
          "upload");
    if (fresh == 0) {
      const Buffer<Report> unused(1);
      launch(chase_global, {1, 1}, places.data(), 0u, nodes, out.data(), unused.data());
    }
    int first = 0;
    result.set(time_rounds(kLinks, [&](Report* report) {
      if (fresh != 0) elsewhere.zero();
      launch(chase_global, {1, 1}, places.data(), order[first] * stride, kLinks, out.data(),
             report);
      first = (first + kLinks) % nodes;
    }));
    if (out.download()[0] != order[first] * stride) throw std::runtime_error("wrong values");
  });
}

/// How far L2 is, over all multiprocessors and some lines: its two halves show here.
inline void measure_l2_distances() {
  measure(Entry("load from L2, each multiprocessor and line"), [](Entry& result) {
    constexpr int kLines = 64;
    int blocks = 0;
    check(cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, 0), "multiprocessors");
    const Buffer<uint32_t> zeros(kLines * 32);
    const Buffer<float> cycles(blocks * kLines);
    launch(load_latencies, {static_cast<unsigned>(blocks), 1}, zeros.data(), kLines, cycles.data());
    check(cudaDeviceSynchronize(), "kernel");
    std::vector<float> found = cycles.download();
    std::sort(found.begin(), found.end());
    const auto at = [&](double share) {
      return found[static_cast<size_t>(share * (found.size() - 1))];
    };
    result.set("cycles", at(0.5)).set("cycles_min", at(0.0)).set("cycles_max", at(1.0));
    result.set("cycles_10", at(0.1)).set("cycles_90", at(0.9));
  });
}

inline void measure_latencies() {
  for (const unsigned warps : {4, 8, 16}) measure_barrier<false>("__syncthreads", warps);
  for (const unsigned warps : {4, 8, 16})
    measure_barrier<true>("store, __syncthreads, load", warps);
  measure_link<ShuffleLink>("shuffle");
  measure_link<TransposeLink>("movmatrix");
  measure_link<FfmaLink>("FFMA");
  measure_link<TanhLink<LibraryTanh>>("tanhf and an addition");
  measure_link<TanhLink<ExpTanh>>("tanh by ex2, rcp and an addition");
  measure_link<TanhLink<ApproxTanh>>("tanh.approx and an addition");
  measure_mma_chain<1>();
  measure_mma_chain<2>();
  measure_mma_chain<4>();
  measure(Entry("load from shared memory"), [](Entry& result) {
    Buffer<int> out(1);
    result.set(time_rounds(
        kLinks, [&](Report* report) { launch(chase_shared, {1, 32, 4096}, out.data(), report); }));
  });
  // 20 MB stay in L2. Of 512 MB each place is met once.
  measure_chase("load from L2", 20 << 13, 32, 0);
  measure_chase("load from DRAM", 1 << 15, 4096, 256 << 20);
  measure_l2_distances();
}
