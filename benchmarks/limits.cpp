// SPDX-License-Identifier: Apache-2.0
//
// What limits.py measures, each function one limit: the best of as many repeats as fit into
// `seconds`, of `threads` that run together. Compiled for the processor at hand.
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <type_traits>
#include <vector>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define FASTRNN_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define FASTRNN_VECTOR_BYTES 32
#else
#define FASTRNN_VECTOR_BYTES 16
#endif
#define FASTRNN_TILE_VECTORS 4
#define FASTRNN_INLINE inline __attribute__((always_inline))
// The library's own tanh; each builds on those before it.
// clang-format off
#include "recurrence.h"
using namespace fastrnn::cpu;
#include "vectors.inl"
#include "activations.inl"
// clang-format on

namespace {

constexpr int kMinRepeats = 3;
constexpr int64_t kLine = 64;
/// Chains of dependent operations that keep every unit busy: at least latency times units.
constexpr int kChains = 12;
/// Products beside one vector of tanh: as in a step at H = 60.
constexpr int kProducts = 5 * kChains;

double now() {
  using Seconds = std::chrono::duration<double>;
  return Seconds(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// Hides a register's value from the compiler, which can then neither compute it beforehand nor
/// leave it out.
template <typename V>
FASTRNN_INLINE void hide(V& value) {
#if defined(__x86_64__)
  asm volatile("" : "+v"(value));
#else
  asm volatile("" : "+w"(value));
#endif
}

/// Spins; if that takes long, the awaited thread may need this core.
template <typename Condition>
FASTRNN_INLINE void wait(const Condition& condition) {
  for (int64_t turn = 1; !condition(); ++turn)
    if (turn % 4096 == 0) std::this_thread::yield();
}

/// The least seconds from a common start of run(thread) to the last end, over all repeats.
template <typename Run>
double best(int64_t threads, double seconds, const Run& run) {
  std::atomic<int64_t> arrived{0};
  std::vector<double> starts(threads), ends(threads);
  double least = 1e9, deadline = 0;
  bool done = false;
  const auto work = [&](int64_t thread) {
    int64_t target = 0;
    const auto meet = [&] {
      target += threads;
      ++arrived;
      wait([&] { return arrived >= target; });
    };
    for (int repeat = 0;; ++repeat) {
      meet();
      if (done) return;
      starts[thread] = now();
      run(thread);
      ends[thread] = now();
      meet();
      if (thread != 0) continue;
      const double first = *std::min_element(starts.begin(), starts.end());
      const double last = *std::max_element(ends.begin(), ends.end());
      least = std::min(least, last - first);
      if (repeat == 0) deadline = first + seconds;
      done = repeat + 1 >= kMinRepeats && last >= deadline;
    }
  };
  std::vector<std::thread> others;
  for (int64_t i = 1; i < threads; ++i) others.emplace_back(work, i);
  work(0);
  for (auto& other : others) other.join();
  return least;
}

/// Loops of `products` independent multiply-adds and, if `tanh`, one vector of tanh.
template <typename T, int products, bool tanh>
void arithmetic(int64_t loops) {
  Vec<T> sums[kChains] = {}, factor = Vec<T>{} + T(0.999), x = factor;
  hide(factor);
  for (auto& sum : sums) hide(sum);  // else they are one and the same
  for (int64_t i = 0; i < loops; ++i) {
#pragma GCC unroll 64
    for (int j = 0; j < products; ++j) sums[j % kChains] = sums[j % kChains] * factor + factor;
    if (tanh) {
      hide(x);
      Vec<T> h = Tanh::value<T>(x);
      hide(h);
    }
  }
  for (auto& sum : sums) hide(sum);
}

/// FLOP/s of multiply-adds in registers.
template <typename T>
double peak(int64_t threads, double seconds) {
  constexpr int64_t loops = 20000, each = 2 * kProducts * kLanes<T>;
  const double time =
      best(threads, seconds, [](int64_t) { arithmetic<T, kProducts, false>(loops); });
  return double(threads * loops * each) / time;
}

/// Seconds that the tanh of one number adds to products at their peak.
template <typename T>
double tanh_beside_products(double seconds) {
  constexpr int64_t loops = 20000;
  const double with = best(1, seconds, [](int64_t) { arithmetic<T, kProducts, true>(loops); });
  const double without = best(1, seconds, [](int64_t) { arithmetic<T, kProducts, false>(loops); });
  return std::max(0.0, with - without) / double(loops * kLanes<T>);
}

/// Seconds from one state to the next where nothing but the last one is awaited.
template <typename T>
double step(bool backward, double seconds) {
  constexpr int64_t steps = 10000;
  const double time = best(1, seconds, [backward](int64_t) {
    Vec<T> state = {}, weight = Vec<T>{} + T(0.5), other = weight;
    hide(weight);
    hide(other);
    for (int64_t t = 0; t < steps; ++t) {
      const Vec<T> sum = weight * state + other;
      state = backward ? Tanh::gradient<T>(weight, sum) : Tanh::value<T>(sum);
    }
    hide(state);
  });
  return time / steps;
}

/// One thread's memory, in large pages where there are any.
class Buffer {
 public:
  explicit Buffer(int64_t bytes) : bytes_(bytes) {
    const size_t page = size_t{1} << 21, size = (bytes + page - 1) / page * page;
    data_ = static_cast<float*>(std::aligned_alloc(page, size));
#if defined(MADV_HUGEPAGE)
    madvise(data_, size, MADV_HUGEPAGE);
#endif
    std::memset(data_, 0, size);
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;

  void read(int64_t passes) const {
    constexpr int64_t vectors = 8, width = vectors * kLanes<float>;
    Bits<float> any[vectors] = {};
    for (int64_t pass = 0; pass < passes; ++pass) {
      for (int64_t i = 0; i < bytes_ / int64_t(sizeof(float)); i += width)
#pragma GCC unroll 8
        for (int64_t j = 0; j < vectors; ++j)
          any[j] |= (Bits<float>)load<float>(data_ + i + j * kLanes<float>);
      asm volatile("" ::: "memory");
    }
#pragma GCC unroll 8
    for (auto& each : any) hide(each);
  }

 private:
  const int64_t bytes_;
  float* data_;
};

}  // namespace

extern "C" {

double limits_peak_float32(int64_t threads, double seconds) {
  return peak<float>(threads, seconds);
}
double limits_peak_float64(int64_t threads, double seconds) {
  return peak<double>(threads, seconds);
}

/// As the other peaks, of dot products in 16 bits; 0 where the processor has none.
double limits_peak_bfloat16(int64_t threads, double seconds) {
#if defined(__AVX512BF16__)
  constexpr int64_t loops = 100000, each = 2 * kChains * 32;
  const double time = best(threads, seconds, [](int64_t) {
    __m512 sums[kChains] = {}, factor = _mm512_set1_ps(0.5f);
    hide(factor);
    for (auto& sum : sums) hide(sum);
    for (int64_t i = 0; i < loops; ++i)
#pragma GCC unroll 12
      for (auto& sum : sums) sum = _mm512_dpbf16_ps(sum, (__m512bh)factor, (__m512bh)factor);
    for (auto& sum : sums) hide(sum);
  });
  return double(threads * loops * each) / time;
#else
  return 0;
#endif
}

double limits_tanh_float32(double seconds) { return tanh_beside_products<float>(seconds); }
double limits_tanh_float64(double seconds) { return tanh_beside_products<double>(seconds); }
double limits_step_float32(int64_t backward, double seconds) {
  return step<float>(backward, seconds);
}
double limits_step_float64(int64_t backward, double seconds) {
  return step<double>(backward, seconds);
}

/// B/s of all threads, each reading its own `bytes` over and over.
double limits_read(int64_t bytes, int64_t threads, double seconds) {
  const int64_t passes = std::max<int64_t>(1, (int64_t{1} << 25) / bytes);
  std::vector<Buffer*> buffers(threads);
  const double time = best(threads, seconds, [&](int64_t thread) {
    if (!buffers[thread]) buffers[thread] = new Buffer(bytes);
    buffers[thread]->read(passes);
  });
  for (Buffer* buffer : buffers) delete buffer;
  return double(threads * passes * bytes) / time;
}

/// Seconds until another thread sees what one has written.
double limits_hand_over(double seconds) {
  constexpr int64_t rounds = 1000;
  struct alignas(kLine) Flag {
    std::atomic<int64_t> value{0};
  } flags[2];
  int64_t before[2] = {};
  const double time = best(2, seconds, [&](int64_t thread) {
    const int64_t first = before[thread];
    for (int64_t i = first + 1; i <= first + rounds; ++i) {
      if (thread == 0) flags[0].value.store(i, std::memory_order_release);
      wait([&] { return flags[1 - thread].value.load(std::memory_order_acquire) >= i; });
      if (thread == 1) flags[1].value.store(i, std::memory_order_release);
    }
    before[thread] += rounds;
  });
  return time / (2 * rounds);
}

}  // extern "C"
