// SPDX-License-Identifier: Apache-2.0
//
// Which capability's kernels run in this process.
#pragma once

#include "kernels/recurrence.h"

namespace fastrnn::cpu {

/// Chosen once, at the first call, from at::get_cpu_capability(), which obeys ATEN_CPU_CAPABILITY.
const Capability& capability();

/// Whether kernels<BFloat16>() may be called.
bool has_bfloat16_kernels();

template <typename T>
const Kernels<T>& kernels();

}  // namespace fastrnn::cpu
