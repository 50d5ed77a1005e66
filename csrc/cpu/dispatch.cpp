// SPDX-License-Identifier: Apache-2.0
//
// The best kernels that this processor runs and that the user allows.
#include "dispatch.h"

#include <ATen/Version.h>

#include <string>

namespace fastrnn::cpu {

namespace {

const Capability& choose() {
#if defined(__x86_64__)
  // PyTorch's names; "DEFAULT" and the names of other architectures take the baseline.
  const std::string name = at::get_cpu_capability();
  if (name.rfind("AVX512", 0) == 0) return avx512_capability();
  if (name == "AVX2") return avx2_capability();
#endif
  return default_capability();
}

const Kernels<BFloat16>* choose_bfloat16() {
#if defined(__x86_64__)
  if (&capability() == &avx512_capability() && __builtin_cpu_supports("avx512bf16"))
    return &avx512_bf16_kernels();
#endif
  return nullptr;
}

const Kernels<BFloat16>* bfloat16_kernels() {
  static const Kernels<BFloat16>* const chosen = choose_bfloat16();
  return chosen;
}

}  // namespace

const Capability& capability() {
  static const Capability& chosen = choose();
  return chosen;
}

bool has_bfloat16_kernels() { return bfloat16_kernels() != nullptr; }

template <>
const Kernels<float>& kernels<float>() {
  return capability().f32;
}
template <>
const Kernels<double>& kernels<double>() {
  return capability().f64;
}
template <>
const Kernels<BFloat16>& kernels<BFloat16>() {
  return *bfloat16_kernels();
}

}  // namespace fastrnn::cpu
