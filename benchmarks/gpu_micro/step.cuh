// SPDX-License-Identifier: Apache-2.0
//
// A bare step of the recurrence in one block, h = tanh(P + W h), with W in registers: by mma on
// bf16 (8 batch rows) and by FFMA on fp32 (1 batch row). P is constant and nothing is written out.
//
// Expected of mma: at most 260, 330 and 600 cycles at H 64, 128 and 256, of which reading h takes
// warps * H * 16 bytes / 128 per cycle: 256 cycles with 8 warps at H 256, 512 with 16. What hangs
// on it: warps, independent accumulators (mma: latency 25, issue 6 cycles, so up to 4) and which
// tanh the block walk is built with; and how many steps ahead P is prefetched: the latency of L2 or
// DRAM (latency.cuh) over the cycles of a step.
#pragma once

#include <cstring>

#include "host.cuh"

constexpr int kSteps = 1000;
constexpr int kBatch = 8;  // columns of an mma

struct LibraryTanh {
  static constexpr const char* kName = "tanhf";
  static __device__ float of(float x) { return tanhf(x); }
};
struct ExpTanh {
  static constexpr const char* kName = "ex2, rcp";
  static __device__ float of(float x) { return tanh_by_exp(x); }
};
struct ApproxTanh {
  static constexpr const char* kName = "tanh.approx";
  static __device__ float of(float x) { return tanh_approx(x); }
};

// ---- mma --------------------------------------------------------------------------------------

/// `w` holds W as a fragments, [row tile][k tile][lane]. `p`: [H][8]. `h`: where the h of the last
/// step goes, and in shared memory twice, as b fragments: [pair of k tiles][lane][of the pair], so
/// that one load of 16 bytes brings two fragments.
template <int H, int kWarps, int kChains, class Tanh>
__global__ void __launch_bounds__(kWarps * 32)
    mma_step(const uint4* w, const float* p, int steps, uint2* h, Report* report) {
  constexpr int kTiles = H / 16, kOwn = kTiles / kWarps;
  uint2* const copies = reinterpret_cast<uint2*>(dynamic_shared());
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint4 a[kOwn][kTiles];
  float start[kOwn][4];
#pragma unroll
  for (int own = 0; own < kOwn; ++own) {
    const int tile = warp * kOwn + own;
#pragma unroll
    for (int k = 0; k < kTiles; ++k) a[own][k] = w[(tile * kTiles + k) * 32 + lane];
    for (int i = 0; i < 4; ++i) {
      const int row = tile * 16 + lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      start[own][i] = p[row * kBatch + column];
    }
  }
  for (int i = threadIdx.x; i < kTiles * 32; i += kWarps * 32) copies[i] = make_uint2(0, 0);
  __syncthreads();

  const Stopwatch stopwatch;
  for (int step = 0; step < steps; ++step) {
    const uint2* const before = copies + step % 2 * kTiles * 32;
    uint2* const now = copies + (step + 1) % 2 * kTiles * 32;
    float sum[kOwn][kChains][4] = {};
#pragma unroll
    for (int own = 0; own < kOwn; ++own) {
      for (int i = 0; i < 4; ++i) sum[own][0][i] = start[own][i];
    }
#pragma unroll
    for (int k = 0; k < kTiles; k += 2) {
      const uint4 b = reinterpret_cast<const uint4*>(before)[k / 2 * 32 + lane];
#pragma unroll
      for (int own = 0; own < kOwn; ++own) {
        mma(sum[own][k % kChains], a[own][k], make_uint2(b.x, b.y));
        mma(sum[own][(k + 1) % kChains], a[own][k + 1], make_uint2(b.z, b.w));
      }
    }
#pragma unroll
    for (int own = 0; own < kOwn; ++own) {
      float value[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        value[i] = sum[own][0][i];
        for (int chain = 1; chain < kChains; ++chain) value[i] += sum[own][chain][i];
        value[i] = Tanh::of(value[i]);
      }
      // Rows are features here, and columns in the next step.
      const int tile = warp * kOwn + own;
      now[(tile / 2 * 32 + lane) * 2 + tile % 2] = make_uint2(
          transpose(pack_bf16(value[0], value[1])), transpose(pack_bf16(value[2], value[3])));
    }
    __syncthreads();
  }
  stopwatch.stop(report);
  for (int i = threadIdx.x; i < kTiles * 32; i += kWarps * 32) {
    h[i] = copies[steps % 2 * kTiles * 32 + i];
  }
}

// ---- FFMA -------------------------------------------------------------------------------------

/// `kLanes` threads share a row of W, [H][H], in interleaved float4. `p` and `h`: [H].
template <int H, int kLanes, int kChains, class Tanh>
__global__ void __launch_bounds__(H* kLanes)
    ffma_step(const float4* w, const float* p, int steps, float* h, Report* report) {
  constexpr int kOwn = H / kLanes / 4;
  float* const copies = reinterpret_cast<float*>(dynamic_shared());
  const int row = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  float4 own[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) own[i] = w[row * (H / 4) + i * kLanes + lane];
  const float start = lane == 0 ? p[row] : 0.0f;
  if (threadIdx.x < H) copies[threadIdx.x] = 0.0f;
  __syncthreads();

  const Stopwatch stopwatch;
  for (int step = 0; step < steps; ++step) {
    const float4* const before = reinterpret_cast<const float4*>(copies + step % 2 * H);
    float sum[kChains] = {start};
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const float4 v = before[i * kLanes + lane];
      sum[0] = fmaf(own[i].x, v.x, sum[0]);
      sum[1 % kChains] = fmaf(own[i].y, v.y, sum[1 % kChains]);
      sum[2 % kChains] = fmaf(own[i].z, v.z, sum[2 % kChains]);
      sum[3 % kChains] = fmaf(own[i].w, v.w, sum[3 % kChains]);
    }
    float value = sum[0];
#pragma unroll
    for (int chain = 1; chain < kChains; ++chain) value += sum[chain];
#pragma unroll
    for (int bit = 1; bit < kLanes; bit *= 2) value += __shfl_xor_sync(0xffffffffu, value, bit);
    value = Tanh::of(value);
    if (lane == 0) copies[(step + 1) % 2 * H + row] = value;
    __syncthreads();
  }
  stopwatch.stop(report);
  if (threadIdx.x < H) h[threadIdx.x] = copies[steps % 2 * H + threadIdx.x];
}

// ---- The host's side --------------------------------------------------------------------------

inline float rounded_to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t bf16_pair(float low, float high) {
  uint32_t bits[2];
  std::memcpy(&bits[0], &low, 4);
  std::memcpy(&bits[1], &high, 4);
  return bits[0] >> 16 | (bits[1] & 0xffff0000u);
}

/// W of norm below 1: h converges to a fixed point that depends on every element of W and P, so
/// that it shows whether the kernel puts them in their places.
struct Problem {
  int H;
  std::vector<float> w, p, h;  // [H][H], [H][8] and the fixed point, [H][8]

  explicit Problem(int size) : H(size), w(H * H), p(H * kBatch), h(H * kBatch) {
    uint32_t state = 1;
    const auto random = [&state] {  // -1 to 1
      state = state * 1664525u + 1013904223u;
      return static_cast<float>(state >> 8) / (1 << 23) - 1.0f;
    };
    for (float& each : w) each = rounded_to_bf16(0.8f * random() / std::sqrt(float(H)));
    for (float& each : p) each = random();
    for (int step = 0; step < 60; ++step) {
      std::vector<float> sum = p;
      for (int row = 0; row < H; ++row) {
        for (int k = 0; k < H; ++k) {
          for (int b = 0; b < kBatch; ++b)
            sum[row * kBatch + b] += w[row * H + k] * h[k * kBatch + b];
        }
      }
      std::transform(sum.begin(), sum.end(), h.begin(), [](float x) { return std::tanh(x); });
    }
  }

  /// A fragments: registers are (row, k), (row + 8, k), (row, k + 8), (row + 8, k + 8).
  std::vector<uint4> fragments() const {
    std::vector<uint4> result;
    for (int tile = 0; tile < H / 16; ++tile) {
      for (int k = 0; k < H; k += 16) {
        for (int lane = 0; lane < 32; ++lane) {
          const float* at = &w[(tile * 16 + lane / 4) * H + k + lane % 4 * 2];
          const float* below = at + 8 * H;
          result.push_back({bf16_pair(at[0], at[1]), bf16_pair(below[0], below[1]),
                            bf16_pair(at[8], at[9]), bf16_pair(below[8], below[9])});
        }
      }
    }
    return result;
  }
};

/// Throws when h differs from the fixed point by more than bf16 and tanh.approx explain.
inline void expect_close(float found, float expected) {
  if (std::fabs(found - expected) <= 0.02f) return;  // false for NaN
  throw std::runtime_error("wrong result: " + std::to_string(found) + " in place of " +
                           std::to_string(expected));
}

inline void expect_fixed_point(const Problem& problem, const std::vector<uint2>& fragments) {
  for (int i = 0; i < static_cast<int>(fragments.size()); ++i) {
    const int lane = i / 2 % 32, k = (i / 64 * 2 + i % 2) * 16 + lane % 4 * 2;
    const uint32_t pairs[2] = {fragments[i].x, fragments[i].y};
    for (int element = 0; element < 4; ++element) {
      const uint32_t pair = pairs[element / 2];
      const uint32_t bits = element % 2 ? pair & 0xffff0000u : pair << 16;
      float found;
      std::memcpy(&found, &bits, 4);
      const int row = k + element / 2 * 8 + element % 2;
      expect_close(found, problem.h[row * kBatch + lane / 4]);
    }
  }
}

template <int H, int kWarps, int kChains, class Tanh>
void measure_mma_step(const Problem& problem) {
  Entry entry("mma step, bf16");
  entry.set("H", H).set("batch", kBatch).set("warps", kWarps);
  entry.set("row_tiles", H / 16 / kWarps).set("accumulators", kChains).set("tanh", Tanh::kName);
  measure(entry, [&](Entry& result) {
    const Buffer<uint4> w(problem.fragments());
    const Buffer<float> p(problem.p);
    const Buffer<uint2> h(H * 2);
    const Timing timing = time_rounds(kSteps, [&](Report* report) {
      launch(mma_step<H, kWarps, kChains, Tanh>, {1, kWarps * 32, 32 * H}, w.data(), p.data(),
             kSteps, h.data(), report);
    });
    expect_fixed_point(problem, h.download());
    result.set(timing);
  });
}

template <int H, int kLanes, int kChains, class Tanh>
void measure_ffma_step(const Problem& problem) {
  Entry entry("FFMA step, fp32");
  entry.set("H", H).set("batch", 1).set("warps", H * kLanes / 32);
  entry.set("lanes_per_row", kLanes).set("accumulators", kChains).set("tanh", Tanh::kName);
  measure(entry, [&](Entry& result) {
    const Buffer<float> w(problem.w);
    std::vector<float> column(H);
    for (int row = 0; row < H; ++row) column[row] = problem.p[row * kBatch];
    const Buffer<float> p(column), h(H);
    const Timing timing = time_rounds(kSteps, [&](Report* report) {
      launch(ffma_step<H, kLanes, kChains, Tanh>, {1, H * kLanes, 8 * H},
             reinterpret_cast<const float4*>(w.data()), p.data(), kSteps, h.data(), report);
    });
    const std::vector<float> found = h.download();
    for (int row = 0; row < H; ++row) expect_close(found[row], problem.h[row * kBatch]);
    result.set(timing);
  });
}

template <int H, int kWarps>
void measure_mma_steps(const Problem& problem) {
  measure_mma_step<H, kWarps, 1, ApproxTanh>(problem);
  measure_mma_step<H, kWarps, 2, ApproxTanh>(problem);
  measure_mma_step<H, kWarps, 4, ApproxTanh>(problem);
  measure_mma_step<H, kWarps, 2, ExpTanh>(problem);
  measure_mma_step<H, kWarps, 2, LibraryTanh>(problem);
}

template <int H, int kLanes>
void measure_ffma_steps(const Problem& problem) {
  measure_ffma_step<H, kLanes, 1, ApproxTanh>(problem);
  measure_ffma_step<H, kLanes, 2, ApproxTanh>(problem);
  measure_ffma_step<H, kLanes, 4, ApproxTanh>(problem);
  measure_ffma_step<H, kLanes, 4, ExpTanh>(problem);
  measure_ffma_step<H, kLanes, 4, LibraryTanh>(problem);
}

inline void measure_steps() {
  const Problem small(64), medium(128), large(256);
  measure_mma_steps<64, 4>(small);
  measure_mma_steps<64, 2>(small);
  measure_mma_steps<128, 8>(medium);
  measure_mma_steps<128, 4>(medium);
  measure_mma_steps<256, 16>(large);
  measure_mma_steps<256, 8>(large);
  measure_ffma_steps<64, 4>(small);
  measure_ffma_steps<64, 8>(small);
  measure_ffma_steps<128, 2>(medium);
  measure_ffma_steps<128, 4>(medium);
}
