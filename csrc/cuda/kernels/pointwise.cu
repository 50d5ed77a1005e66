// SPDX-License-Identifier: Apache-2.0
//
// What surrounds the products of the steps walk, one thread for each number: any type, any size.
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "activation.cuh"
#include "launch.cuh"

namespace fastrnn::cuda {

namespace {

constexpr int kThreads = 256, kStepThreads = 128;
constexpr int64_t kMaxBlocks = 4096;  // then each thread does several numbers

unsigned blocks_for(int64_t numbers) {
  const int64_t blocks = (numbers + kThreads - 1) / kThreads;
  return static_cast<unsigned>(blocks < 1 ? 1 : blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

/// Calls f(tag) with a value of the C++ type that `type` names.
template <typename F>
auto with_type(Type type, const F& f) {
  switch (type) {
    case Type::kDouble:
      return f(double{});
    case Type::kHalf:
      return f(Half{});
    case Type::kBFloat16:
      return f(BFloat16{});
    default:
      return f(float{});
  }
}

/// The type that T is computed in.
template <typename T>
using Sum = decltype(to_float(T{}));

/// Numbers that are read and written at once.
template <typename T, int kCount>
struct alignas(kCount * sizeof(T)) Vector {
  T number[kCount];
};

template <int kCount, typename T>
__device__ __forceinline__ Vector<T, kCount> load_vector(const void* data, int64_t index) {
  return *reinterpret_cast<const Vector<T, kCount>*>(static_cast<const T*>(data) + index);
}

/// blockIdx.y is the row, blockIdx.x the part of its units, of which each thread takes kCount.
template <typename T, bool kBackward, int kCount>
__global__ void step_kernel(const __grid_constant__ StepArgs a) {
  using Addend = std::conditional_t<kBackward, T, Sum<T>>;
  const int64_t unit = (static_cast<int64_t>(blockIdx.x) * kStepThreads + threadIdx.x) * kCount;
  if (unit >= a.H) return;
  for (int64_t row = blockIdx.y; row < a.rows; row += gridDim.y) {
    const int64_t i = row * a.H + unit;
    Sum<T> sums[kCount] = {};
    const auto add = [&](const auto& numbers) {
      FASTRNN_UNROLL
      for (int k = 0; k < kCount; ++k) sums[k] += to_float(numbers.number[k]);
    };
    if (row < a.product_rows)
      add(load_vector<kCount, Sum<T>>(a.product, i));
    else if (kBackward && a.grad_h_n != nullptr)
      add(load_vector<kCount, T>(a.grad_h_n, i));
    if (a.addend != nullptr)
      add(load_vector<kCount, Addend>(a.addend, row * a.addend_stride + unit));
    if (a.b_ih != nullptr) {
      add(load_vector<kCount, T>(a.b_ih, unit));
      add(load_vector<kCount, T>(a.b_hh, unit));
    }
    Vector<T, kCount> y{}, out;
    if (kBackward) y = load_vector<kCount, T>(a.y, row * a.y_stride + unit);
    FASTRNN_UNROLL
    for (int k = 0; k < kCount; ++k)
      out.number[k] = from_float<T>(
          activate<T, kBackward>(a.activation, sums[k], Sum<T>(to_float(y.number[k]))));
    *reinterpret_cast<Vector<T, kCount>*>(static_cast<T*>(a.out) + row * a.out_stride + unit) = out;
  }
}

/// How many numbers a thread can take at once: all rows begin where so many can be read.
int numbers_at_once(const StepArgs& a, size_t item_size) {
  constexpr int kMost = 4;
  const auto is_aligned = [](const void* data, size_t bytes) {
    return reinterpret_cast<uintptr_t>(data) % (kMost * bytes) == 0;
  };
  const size_t sum_size = std::max<size_t>(item_size, 4);
  const bool strides = a.H % kMost == 0 && a.addend_stride % kMost == 0 &&
                       a.y_stride % kMost == 0 && a.out_stride % kMost == 0;
  bool pointers =
      is_aligned(a.product, sum_size) && is_aligned(a.addend, a.backward ? item_size : sum_size);
  for (const void* data : {a.b_ih, a.b_hh, a.grad_h_n, a.y, static_cast<const void*>(a.out)})
    pointers = pointers && is_aligned(data, item_size);
  return strides && pointers ? kMost : 1;
}

template <typename T, int kCount>
const char* launch_step(const StepArgs& args, Stream stream) {
  LaunchShape shape;
  constexpr int kUnits = kStepThreads * kCount;
  shape.blocks_x = static_cast<unsigned>((args.H + kUnits - 1) / kUnits);
  shape.blocks_y = static_cast<unsigned>(
      std::clamp<int64_t>(kMaxBlocks / shape.blocks_x, 1, std::max<int64_t>(1, args.rows)));
  shape.threads = kStepThreads;
  return args.backward ? launch(step_kernel<T, true, kCount>, shape, stream, args)
                       : launch(step_kernel<T, false, kCount>, shape, stream, args);
}

/// blockIdx.x is the step, blockIdx.y the part of its numbers.
template <typename T>
__global__ void previous_kernel(const __grid_constant__ PreviousArgs a) {
  const T* const y = static_cast<const T*>(a.y);
  const T* const hx = static_cast<const T*>(a.hx);
  T* const out = static_cast<T*>(a.out);
  const int64_t stride = static_cast<int64_t>(gridDim.y) * kThreads;
  for (int64_t t = a.begin + blockIdx.x; t < a.end; t += gridDim.x) {
    const int64_t from = a.descending ? t + 1 : t - 1;
    const int64_t first = a.first_row[t], rows = a.first_row[t + 1] - first;
    const int64_t before = from < 0 || from >= a.T ? 0 : a.first_row[from + 1] - a.first_row[from];
    for (int64_t i = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x; i < rows * a.H;
         i += stride) {
      const int64_t row = i / a.H, unit = i % a.H;
      T value{};
      if (row < before)
        value = y[(a.first_row[from] + row) * a.y_stride + unit];
      else if (hx != nullptr)
        value = hx[i];
      out[(first - a.first_row[a.begin]) * a.H + i] = value;
    }
  }
}

/// As many numbers as fit into the arguments of a kernel everywhere, 4 KB.
struct Numbers {
  static constexpr int kMost = 500;
  int count;
  int64_t number[kMost];
};

__global__ void upload_kernel(const __grid_constant__ Numbers numbers, int64_t* device) {
  for (int i = threadIdx.x; i < numbers.count; i += kThreads) device[i] = numbers.number[i];
}

}  // namespace

const char* step_epilogue(const StepArgs& args, Stream stream) {
  return with_type(args.type, [&](auto zero) {
    using T = decltype(zero);
    return numbers_at_once(args, sizeof(T)) == 1 ? launch_step<T, 1>(args, stream)
                                                 : launch_step<T, 4>(args, stream);
  });
}

const char* gather_previous(const PreviousArgs& args, Stream stream) {
  LaunchShape shape;
  shape.blocks_x = blocks_for((args.end - args.begin) * kThreads);  // one for each step ...
  const unsigned parts = static_cast<unsigned>(kMaxBlocks) / shape.blocks_x;
  shape.blocks_y = std::min(parts, blocks_for(args.B * args.H));  // ... and part of it
  shape.threads = kThreads;
  return with_type(args.type, [&](auto zero) {
    return launch(previous_kernel<decltype(zero)>, shape, stream, args);
  });
}

const char* upload(const int64_t* numbers, int64_t count, int64_t* device, Stream stream) {
  LaunchShape shape;
  shape.threads = kThreads;
  for (int64_t done = 0; done < count; done += Numbers::kMost) {
    Numbers part{};
    part.count = static_cast<int>(count - done < Numbers::kMost ? count - done : Numbers::kMost);
    for (int i = 0; i < part.count; ++i) part.number[i] = numbers[done + i];
    if (const char* error = launch(upload_kernel, shape, stream, part, device + done)) return error;
  }
  return nullptr;
}

}  // namespace fastrnn::cuda
