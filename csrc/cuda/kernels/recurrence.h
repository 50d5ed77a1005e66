// SPDX-License-Identifier: Apache-2.0
//
// Torch-free contract of the CUDA kernels. As on the CPU, one loop serves forward and backward:
//
//   forward    s_t = f( addend_t + b_ih + b_hh + s_{t-1} W_hh^T ),   addend_t = x_t W_ih^T, made
//              before, or here where x has few features
//   backward   s_t = ( addend_t + s_{t+1} W_hh ) f'(y_t),            addend_t = grad_y_t
//
// where "t-1" is the step walked before. Pointers are to device memory, strides count elements, the
// columns of a row are adjacent. Every function enqueues work on `stream`, never waits for it, and
// returns null, or what went wrong.
#pragma once

#include <cstdint>

#include "../../activation.h"
#include "group_sizes.h"

namespace fastrnn::cuda {

using Stream = void*;  // cudaStream_t

enum class Type { kFloat, kDouble, kHalf, kBFloat16 };

/// A [T, B, N] sequence. Row b of step t starts at data + t * step_stride + b * row_stride; in
/// packed data (Steps::first_row set) at data + (first_row[t] + b) * row_stride. Null: absent.
/// row_stride is at most kMaxRowStride.
constexpr int64_t kMaxRowStride = 1 << 28;
struct Sequence {
  void* data = nullptr;
  int64_t step_stride = 0, row_stride = 0;
};

/// A sequence's T steps, at most kMaxSteps, and which rows are alive at them: rows are sorted by
/// length, so that a step's rows are a prefix of the batch.
constexpr int64_t kMaxSteps = 1 << 30;
struct Steps {
  int64_t T = 0, B = 0;
  const int64_t* first_row = nullptr;  // packed: T + 1 sums of the batch sizes before; else null
};

/// One direction of a layer. W_hh [H, H] is contiguous; so are the [B, H] tensors.
struct RecurrenceDirection {
  const void* w_hh = nullptr;
  const void *b_ih = nullptr, *b_hh = nullptr;  // [H], forward only; null: no bias
  Sequence addend;                 // float in forward, else of the type; null: zeros. May be `out`.
  Sequence x;                      // forward only: [T, B, I] in place of addend; null: absent
  const void* w_ih = nullptr;      // [H, I], contiguous; read only with x
  Sequence y;                      // backward only: the layer's outputs
  const void* state = nullptr;     // s before the first walked step; null: zeros
  const void* grad_h_n = nullptr;  // backward only: added at the first walked step of each row
  Sequence out;                    // y in forward, delta in backward
  void* final_state = nullptr;     // s after each row's last walked step; null: not wanted
  int64_t begin = 0, end = 0;      // the steps walked ...
  bool descending = false;         // ... upwards, or downwards from end - 1
};

/// A layer's recurrence over some steps; its directions run at the same time.
struct RecurrenceArgs {
  Steps steps;
  int64_t I = 0, H = 0;
  Type type = Type::kFloat;  // of all that is not said to be float
  Activation activation = Activation::kTanh;
  bool backward = false;
  int directions = 1;
  RecurrenceDirection direction[2];
};

// There are three ways to walk through the steps. They differ in who keeps W_hh.

/// The block walk. A block of threads owns some rows of the batch and walks through all steps with
/// them. It keeps W_hh in registers, of large layers a part in shared memory. H is at most the
/// largest of block_sizes.h. block_mma: in 16 bits, by tensor cores, sums in float. block_ffma: in
/// float, by ordinary multiply-adds; each block owns `rows` rows (1, 2 or 4).
const char* block_mma(const RecurrenceArgs& args, Stream stream);
const char* block_ffma(const RecurrenceArgs& args, int rows, Stream stream);
/// Features of x that the block walk multiplies itself.
constexpr int kMaxFusedInput = 2;

/// The group walk. A group of blocks, which run at the same time, owns some rows of the batch and
/// shares W_hh: each block keeps the weights of a few units in registers, and s travels between
/// the blocks in global memory. In 16 bits and in float, both by tensor cores. H is at most the
/// largest of group_sizes.h. Groups that do not fit on the GPU together run in one launch after the
/// other. `out` must be filled with bytes 0xff: kAwaited in primitives.cuh. addend and final_state
/// are not `out` or `state`. H and the strides of `out` are multiples of kGroupAlignment bytes, and
/// so are the addresses of `out` and state. The batch has kMaxGroupRows rows at most.
const char* group_mma(const RecurrenceArgs& args, const GroupPlan& plan, Stream stream);
constexpr int kGroupAlignment = 16;
constexpr int64_t kMaxGroupRows = 1 << 30;

/// The steps walk has no kernel for the whole sequence: it launches a product and this for each
/// step. For rows [0, rows) of one step and direction
///   out = f( addend + product + b_ih + b_hh )  or, backward,  ( addend + product ) f'(y)
/// Rows from product_rows on have no product, and in backward start with grad_h_n instead.
struct StepArgs {
  Type type = Type::kFloat;
  Activation activation = Activation::kTanh;
  bool backward = false;
  int64_t rows = 0, H = 0, product_rows = 0;
  const void* addend = nullptr;  // float in forward (double for double), else of the type; null: 0
  int64_t addend_stride = 0;
  const void* product = nullptr;  // [product_rows, H], contiguous; float, double for double
  const void *b_ih = nullptr, *b_hh = nullptr;
  const void* grad_h_n = nullptr;  // [B, H], contiguous
  const void* y = nullptr;
  int64_t y_stride = 0;
  void* out = nullptr;  // may be addend
  int64_t out_stride = 0;
};
const char* step_epilogue(const StepArgs& args, Stream stream);

/// The state before each row of packed data at steps [begin, end), [.., H]: y at the row's previous
/// step in the direction, or hx [B, H] (null: zeros).
struct PreviousArgs {
  Type type = Type::kFloat;
  int64_t begin = 0, end = 0, T = 0, B = 0, H = 0;
  const int64_t* first_row = nullptr;
  bool descending = false;
  const void* y = nullptr;
  int64_t y_stride = 0;
  const void* hx = nullptr;
  void* out = nullptr;  // of the chunk
};
const char* gather_previous(const PreviousArgs& args, Stream stream);

/// Writes `count` numbers to device memory. They travel as arguments of kernels: without waiting,
/// and valid in a captured graph.
const char* upload(const int64_t* numbers, int64_t count, int64_t* device, Stream stream);

}  // namespace fastrnn::cuda
