// SPDX-License-Identifier: Apache-2.0
//
// The CUDA engine on CPU tensors: its own C++, with the kernels run by the emulator. Every tensor
// of a call, inputs included, lies between inaccessible pages and is poisoned before it is written.
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <cstring>

#include "cuda/call_offsets.h"
#include "cuda/cublas.h"
#include "cuda/engine.h"
#include "cuda/products.h"
#include "cuda_host.h"
#include "operators.h"

namespace fastrnn {

namespace cuda {

Stream current_stream() { return nullptr; }

int multiprocessors = 4;

/// So small that few rows of the batch make several waves of blocks, and few steps several chunks.
Gpu current_gpu() {
  Gpu gpu;
  gpu.major = 9;
  gpu.multiprocessors = multiprocessors;
  gpu.shared_bytes = 227 << 10;
  gpu.small_bytes = 32 << 10;
  return gpu;
}

Multiplier::Multiplier(at::ScalarType type, at::ScalarType result, bool)
    : type_(type), result_(result), handle_(nullptr), tf32_(false) {
  TORCH_CHECK(result == type || result == compute_type(type));
}

/// As strict as cuBLAS.
void Multiplier::operator()(const Matrix& a, const Matrix& b, void* out, int64_t stride,
                            bool accumulate) const {
  const at::ScalarType sums = compute_type(type_);
  const auto numbers = [&](const Matrix& m) {
    TORCH_CHECK(m.rows >= 1 && m.columns >= 1);
    TORCH_CHECK(m.stride >= (m.column_major ? m.rows : m.columns));
    const int64_t row = m.column_major ? 1 : m.stride, column = m.column_major ? m.stride : 1;
    return at::from_blob(const_cast<void*>(m.data), {m.rows, m.columns}, {row, column}, type_)
        .to(sums);
  };
  TORCH_CHECK(a.columns == b.rows && stride >= b.columns);
  const Tensor result = at::from_blob(out, {a.rows, b.columns}, {stride, 1}, result_);
  const Tensor product = at::mm(numbers(a), numbers(b));
  if (accumulate) product.add_(result);
  result.copy_(product);
}

}  // namespace cuda

namespace {

class GuardedAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t size) override {
    void* const data = size > 0 ? cuda_host::allocate(size, "tensor") : nullptr;
    return {data, data, &release, c10::kCPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t size) const override {
    std::memcpy(to, from, size);
  }

 private:
  static void release(void* data) {
    if (data != nullptr) cuda_host::release(data);
  }
};

/// In its scope all CPU tensors are allocated so.
class Guarded {
 public:
  Guarded() : before_(c10::GetCPUAllocator()) { c10::SetCPUAllocator(&allocator(), 255); }
  ~Guarded() { c10::SetCPUAllocator(before_, 255); }

  /// With the strides of `t`: those of an expanded or sliced tensor clone() does not keep.
  Tensor copy(const Tensor& t) const {
    if (!t.defined() || t.numel() == 0) return t;
    int64_t extent = 1;
    for (int64_t i = 0; i < t.dim(); ++i) extent += (t.size(i) - 1) * t.stride(i);
    const Tensor memory = t.as_strided({extent}, {1}).clone();
    return memory.as_strided(t.sizes(), t.strides(), 0);
  }
  OptionalTensor copy(const OptionalTensor& t) const {
    return t.has_value() ? OptionalTensor(copy(*t)) : t;
  }
  std::vector<Tensor> copy(at::TensorList list) const {
    std::vector<Tensor> copies;
    for (const Tensor& t : list) copies.push_back(copy(t));
    return copies;
  }

 private:
  static GuardedAllocator& allocator() {
    static GuardedAllocator instance;  // tensors outlive the scope
    return instance;
  }
  c10::Allocator* const before_;
};

constexpr Engine kEngine{cuda::layer_forward, cuda::layers_backward};

ForwardResult rnn_forward_on_host(const Tensor& input, const OptionalTensor& hx,
                                  at::TensorList weights, const OptionalTensor& batch_sizes,
                                  std::string_view nonlinearity, bool bias, int64_t num_layers,
                                  bool bidirectional, bool keep, bool batch_first) {
  const RnnOptions options{nonlinearity, bias, num_layers, bidirectional, batch_first};
  const Guarded guarded;
  const cuda::CallOffsets offsets;
  return forward_by(kEngine, guarded.copy(input), guarded.copy(hx), guarded.copy(weights),
                    batch_sizes, options, keep);
}

BackwardResult rnn_backward_on_host(const OptionalTensor& grad_output,
                                    const OptionalTensor& grad_h_n, const Tensor& input,
                                    const OptionalTensor& hx, at::TensorList weights,
                                    const OptionalTensor& batch_sizes, at::TensorList layer_outputs,
                                    std::string_view nonlinearity, bool bias, int64_t num_layers,
                                    bool bidirectional, c10::List<bool> needs, bool batch_first) {
  const RnnOptions options{nonlinearity, bias, num_layers, bidirectional, batch_first};
  const Guarded guarded;
  const cuda::CallOffsets offsets;
  return backward_by(kEngine, guarded.copy(grad_output), guarded.copy(grad_h_n),
                     guarded.copy(input), guarded.copy(hx), guarded.copy(weights), batch_sizes,
                     guarded.copy(layer_outputs), options, needs);
}

}  // namespace

TORCH_LIBRARY(fastrnn_cuda_host, m) {
  m.def(
      "rnn_forward(Tensor input, Tensor? hx, Tensor[] weights, Tensor? batch_sizes, "
      "str nonlinearity, bool bias, int num_layers, bool bidirectional, bool keep, "
      "bool batch_first=False) "
      "-> (Tensor, Tensor, Tensor[])",
      rnn_forward_on_host);
  m.def(
      "rnn_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor input, Tensor? hx, "
      "Tensor[] weights, Tensor? batch_sizes, Tensor[] layer_outputs, str nonlinearity, "
      "bool bias, int num_layers, bool bidirectional, bool[] needs, bool batch_first=False) "
      "-> (Tensor, Tensor, Tensor[])",
      rnn_backward_on_host);
  m.def("product_out(Tensor(a!) out, Tensor a, Tensor b, bool accumulate) -> ()",
        [](const Tensor& out, const Tensor& a, const Tensor& b, bool accumulate) {
          cuda::product_out(out, a, b, accumulate);
        });
}

}  // namespace fastrnn

extern "C" int fastrnn_host_set_multiprocessors(int64_t count) {
  fastrnn::cuda::multiprocessors = static_cast<int>(count);
  return 0;
}
