// SPDX-License-Identifier: Apache-2.0
//
// What a device's engine does: one layer, all its directions, forward and backward. layer.cpp walks
// through the layers of a call.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "activation.h"
#include "parallel.h"
#include "rnn.h"

namespace fastrnn {

/// The steps of a call, shared by its layers. Padded: the vectors are empty.
struct Layout {
  int64_t T = 0, B = 0, total_rows = 0;
  std::vector<int64_t> batch_sizes;  // packed: rows of each step
  std::vector<int64_t> first_row;    // of each step in packed tensors, and of the end: [T + 1]

  Layout(int64_t T, int64_t B) : T(T), B(B), total_rows(T * B) {}
  explicit Layout(std::vector<int64_t> rows_of_steps);
  bool packed() const { return !batch_sizes.empty(); }
  int64_t rows(int64_t t) const { return packed() ? batch_sizes[t] : B; }
  /// The first row of step t where the rows of all steps follow one another.
  int64_t position(int64_t t) const { return packed() ? first_row[t] : t * B; }
};

/// What forward and backward read of one layer.
struct Layer {
  Tensor input;             // [T, B, I] of any strides, or packed [N, I]
  Tensor hx;                // [D, B, H] or undefined
  std::vector<Cell> cells;  // one per direction
  Activation activation;

  int64_t hidden_size() const { return cells[0].w_hh.size(0); }
  int64_t directions() const { return static_cast<int64_t>(cells.size()); }
};

/// Which gradients of a layer are wanted. Where a tensor is defined it is overwritten.
struct WantedGradients {
  Tensor input;                            // as the input, columns adjacent; or undefined
  Tensor hx;                               // [D, B, H]; or undefined
  std::vector<std::array<bool, 4>> cells;  // w_ih, w_hh, b_ih, b_hh of each direction
};

/// Backward of a layer, or of layers in one direction, each reading the output of the one before.
struct BackwardPass {
  const Layout& layout;
  std::vector<Layer> layers = {};
  std::vector<Tensor> outputs = {};          // as forward wrote them
  Tensor grad_output = {};                   // of the last one, of any strides; or undefined
  Tensor grad_h_n = {};                      // [layers * D, B, H] or undefined
  std::vector<WantedGradients> wanted = {};  // the input's of the first one alone
};

struct Engine {
  /// Writes output [T, B, D*H] or [N, D*H] and h_n [D, B, H], both contiguous.
  void (*layer_forward)(const Layout& layout, const Layer& layer, const Tensor& output,
                        const Tensor& h_n);
  /// Returns the gradients of every cell, undefined where not wanted.
  std::vector<Cell> (*layers_backward)(const BackwardPass& pass);
  /// Whether layers_backward takes several layers, which then share the workspace of a chunk.
  bool stacks = false;
};

/// rnn_forward and rnn_backward by an engine: arguments checked, time-major or packed.
ForwardResult forward_layers(const Engine& engine, const Layout& layout, const Tensor& input,
                             const OptionalTensor& hx, at::TensorList weights,
                             const RnnOptions& options, bool keep);
BackwardResult backward_layers(const Engine& engine, const Layout& layout,
                               const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                               const Tensor& input, const OptionalTensor& hx,
                               at::TensorList weights, at::TensorList layer_outputs,
                               const RnnOptions& options, const c10::List<bool>& needs);

/// The type a layer of `type` computes in: 16 bits add up in float32.
inline at::ScalarType compute_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

/// Steps [begin, end).
struct Range {
  int64_t begin, end;
};

/// Part number i of `whole`, of `size` steps or what is left, counted in the order of the walk.
inline Range part_of(Range whole, int64_t size, int64_t i, bool descending) {
  if (descending) return {std::max(whole.begin, whole.end - (i + 1) * size), whole.end - i * size};
  return {whole.begin + i * size, std::min(whole.end, whole.begin + (i + 1) * size)};
}

inline int64_t parts_in(Range whole, int64_t size) {
  return (whole.end - whole.begin + size - 1) / size;
}

/// The steps `range` of a padded [T, B, N] or packed [N, ...] tensor whose first step is `origin`,
/// as a view.
inline Tensor narrow_steps(const Layout& layout, const Tensor& t, Range range, int64_t origin = 0) {
  if (range.begin == 0 && range.end == layout.T) return t;  // a view costs more than a small layer
  const auto position = [&](int64_t step) {
    return layout.packed() ? layout.first_row[step] : step;
  };
  return t.narrow(0, position(range.begin) - position(origin),
                  position(range.end) - position(range.begin));
}

/// The columns of direction d in a tensor whose last dimension is D * H, as a view.
inline Tensor narrow_direction(const Tensor& t, int64_t d, int64_t H) {
  return t.size(-1) == H ? t : t.narrow(-1, d * H, H);
}

/// The rows of a time-major or packed tensor as one matrix [total_rows, N]; copies only what is
/// not adjacent (batch_first input).
inline Tensor as_rows(const Tensor& t) {
  return t.dim() == 2 ? t : t.reshape({t.size(0) * t.size(1), t.size(2)});
}

/// destination = source, both contiguous and of one type.
inline void copy_contiguous(const Tensor& source, const Tensor& destination) {
  if (!source.is_cpu() || source.numel() == 0) {
    destination.copy_(source);
    return;
  }
  constexpr int64_t kBytesPerThread = 1 << 17;
  const char* from = static_cast<const char*>(source.const_data_ptr());
  char* to = static_cast<char*>(destination.mutable_data_ptr());
  share(static_cast<int64_t>(source.nbytes()), kBytesPerThread,
        [&](int64_t begin, int64_t end) { std::memcpy(to + begin, from + begin, end - begin); });
}

}  // namespace fastrnn
