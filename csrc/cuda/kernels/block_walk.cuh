// SPDX-License-Identifier: Apache-2.0
//
// The block walk. One block of threads owns a few rows of the batch and walks through all steps
// with them. It keeps W_hh in registers, of large layers a part in shared memory. Blocks never talk
// to one another.
//
// A BlockProduct multiplies s by W_hh and leaves the sums [rows, H] in registers; a thread's sums
// are its elements. All else is here, the same for every product, forward and backward. Each thread
// loads the addends of its elements some steps ahead, adds and activates. It writes s to the other
// one of two buffers in shared memory, for the next step, and to the output. One barrier per step.
//
// A small layer waits for the instructions between two products. So nothing that is the same in all
// steps is computed there, and all elements take a branch together or not at all.
#pragma once

#include <concepts>
#include <type_traits>

#include "activation.cuh"
#include "launch.cuh"
#include "walked_steps.cuh"

namespace fastrnn::cuda {

/// What the block walk asks of the product s W_hh of one step: MmaProduct in block_mma.cu,
/// FfmaProduct in block_ffma.cu. A block has kThreads threads and kRows rows of the batch. Each of
/// the sums [kRows, H] belongs to one thread. Element (r, u) of a thread, r < kThreadRows and
/// u < kThreadUnits, is the sum of
///
///   row  row() + r * kRowStep  of the block,  unit  unit() + u * kUnitStep  of the layer.
///
/// It may lie outside of [kRows, H]: nobody reads it then.
template <class P>
concept BlockProduct =
    std::default_initializable<P> &&
    requires(P product, const P& loaded, const typename P::Element* numbers, int H, bool transposed,
             float (&sums)[P::kThreadRows][P::kThreadUnits]) {
      typename P::Element;  // of s, W_hh and the output
      requires P::kRows > 0 && P::kThreads % 32 == 0;
      requires P::kRowStep > 0 && P::kUnitStep > 0;
      requires P::kThreadRows* P::kThreadUnits < 32;  // sets of elements are bits of a register
      requires P::kTogether > 0;                      // steps whose inputs are loaded together
      // Shared memory begins with two buffers of s: kStateSize numbers, rows kStateStride apart.
      // The rest of the kSharedBytes is the product's own.
      requires P::kRows* P::kStateStride <= P::kStateSize;
      requires P::kSharedBytes >= 2 * P::kStateSize * sizeof(typename P::Element);

      { loaded.row() } -> std::same_as<int>;
      { loaded.unit() } -> std::same_as<int>;
      // Once, before all steps, from W_hh [H, H]: for s W_hh^T or, transposed, for s W_hh.
      product.load_weights(numbers, H, transposed);
      // The sums of the thread's elements, from a buffer of s. It is 0 from column H on.
      loaded.multiply(numbers, sums);
    };

/// One thread's part of a block's walk. Sets of its elements are bits: see bit().
/// kFeatures: x is given in place of addends, and has so many features at most; else 0.
template <BlockProduct Product, bool kBackward, int kFeatures>
class BlockWalk {
 public:
  __device__ __forceinline__ explicit BlockWalk(const RecurrenceArgs& args)
      : args_(args),
        d_(args.direction[blockIdx.y]),
        row0_(static_cast<int64_t>(blockIdx.x) * Product::kRows),
        I_(static_cast<int>(args.I)),
        H_(static_cast<int>(args.H)),
        walk_(args.steps, d_, row0_),
        addend_(view_of(d_.addend, sizeof(Addend), product_.unit())),
        x_(view_of(d_.x, sizeof(Element), 0)),
        y_(view_of(d_.y, sizeof(Element), product_.unit())),
        out_(view_of(d_.out, sizeof(Element), product_.unit())),
        columns_(computed_once(columns())),
        all_(computed_once(among(args.steps.B))),
        state_(static_cast<Element*>(shared_memory())),
        own_(computed_once(product_.row() * Product::kStateStride + product_.unit())) {}

  __device__ __forceinline__ void run() {
    product_.load_weights(static_cast<const Element*>(d_.w_hh), H_, /*transposed=*/kBackward);
    fill_state();
    load_bias();
    load_input_weights();
    load_offsets(0);
    unsigned before = kBackward && walk_.count > 0 ? among(walk_.rows_before()) : 0;
    // A warp that waits for one of its loads waits for all that it has under way: so they start in
    // batches, each as soon as the batch before has arrived.
    constexpr int kSets = kTogether > 1 ? 2 : 1;  // else there are few registers
    Inputs inputs[kSets][kTogether];
    load_batch(0, inputs[0]);
    __syncthreads();
    for (int base = 0; base < walk_.count; base += 2 * kTogether) {
      FASTRNN_UNROLL
      for (int i = 0; i < 2 * kTogether; ++i) {
        if (base + i >= walk_.count) break;
        const Inputs& in = inputs[i / kTogether % kSets][i % kTogether];
        step(i % 2, in, before);
        before = in.alive;
        if (i % kTogether == 0)
          load_batch(base + i + kTogether, inputs[(i / kTogether + 1) % kSets]);
        __syncthreads();
      }
    }
    store_final_state();
  }

 private:
  using Element = typename Product::Element;
  using Addend = std::conditional_t<kBackward, Element, float>;
  static constexpr int kThreadRows = Product::kThreadRows, kThreadUnits = Product::kThreadUnits;
  static constexpr int kTogether = Product::kTogether;  // steps whose inputs are loaded together
  static constexpr int64_t kFarthestRow =
      (kThreadRows - 1) * int64_t{Product::kRowStep} * kMaxRowStride * 4;  // bytes
  static_assert(kFarthestRow <= UINT32_MAX, "a View's rows are within 32 bits");

  /// A sequence as the thread sees it.
  struct View {
    char* start;        // its first element, at position 0
    int64_t stride;     // bytes to the next position: a step, or in packed data a row
    unsigned row_step;  // bytes to the thread's next row: 32 bits do

    /// The first elements of the thread's rows.
    template <typename T>
    __device__ __forceinline__ void at(int64_t position, T* (&rows)[kThreadRows]) const {
      char* const first = start + position * stride;
      FASTRNN_UNROLL
      for (int r = 0; r < kThreadRows; ++r)
        rows[r] = reinterpret_cast<T*>(computed_once(first + r * row_step));
    }
  };

  /// What the thread reads of one step, loaded ahead of it.
  struct Inputs {
    int64_t position;  // of the step, in every sequence
    unsigned alive;    // elements
    Addend addend[kThreadRows][kThreadUnits];
    Element x[kThreadRows][kFeatures + 1];  // one more, for there is no array of none
    Element y[kThreadRows][kThreadUnits];
  };

  /// The thread's element of its row number r and its unit number u.
  static __device__ __forceinline__ unsigned bit(int r, int u) {
    return 1u << (r * kThreadUnits + u);
  }
  static __device__ __forceinline__ unsigned bits_of_row(int r) {
    return ((1u << kThreadUnits) - 1) << (r * kThreadUnits);
  }

  __device__ __forceinline__ View view_of(const Sequence& s, int64_t bytes, int unit) const {
    const int64_t row = row0_ + product_.row();
    return {computed_once(static_cast<char*>(s.data) + (row * s.row_stride + unit) * bytes),
            computed_once((walk_.packed() ? s.row_stride : s.step_stride) * bytes),
            computed_once(static_cast<unsigned>(Product::kRowStep * s.row_stride * bytes))};
  }

  /// Elements whose unit exists.
  __device__ __forceinline__ unsigned columns() const {
    unsigned set = 0;
    FASTRNN_UNROLL
    for (int u = 0; u < kThreadUnits; ++u) {
      FASTRNN_UNROLL
      for (int r = 0; r < kThreadRows; ++r) set |= has_unit(u) ? bit(r, u) : 0;
    }
    return set;
  }
  __device__ __forceinline__ bool has_unit(int u) const {
    return product_.unit() + u * Product::kUnitStep < H_;
  }
  /// Elements among the first `rows` rows of the batch.
  __device__ __forceinline__ unsigned among(int64_t rows) const {
    const int64_t left = rows - row0_;
    const int here = static_cast<int>(left < Product::kRows ? left : Product::kRows);
    unsigned set = 0;
    FASTRNN_UNROLL
    for (int r = 0; r < kThreadRows; ++r)
      set |= product_.row() + r * Product::kRowStep < here ? bits_of_row(r) : 0;
    return set & columns_;
  }

  /// Calls f(r, u) for every element, or for those of a set.
  template <typename F>
  static __device__ __forceinline__ void for_each(const F& f) {
    FASTRNN_UNROLL
    for (int r = 0; r < kThreadRows; ++r) {
      FASTRNN_UNROLL
      for (int u = 0; u < kThreadUnits; ++u) f(r, u);
    }
  }
  template <typename F>
  static __device__ __forceinline__ void for_each(unsigned set, const F& f) {
    for_each([&](int r, int u) {
      if (set & bit(r, u)) f(r, u);
    });
  }

  /// Where an element is in a contiguous [B, H] tensor, ...
  template <typename T>
  __device__ __forceinline__ void at_batch(T* tensor, T* (&rows)[kThreadRows]) const {
    T* const first = tensor + (row0_ + product_.row()) * H_ + product_.unit();
    FASTRNN_UNROLL
    for (int r = 0; r < kThreadRows; ++r)
      rows[r] = computed_once(first + r * Product::kRowStep * H_);
  }
  /// ... and in a buffer of s.
  __device__ __forceinline__ int state_place(int r, int u) const {
    return own_ + (r * Product::kRowStep * Product::kStateStride + u * Product::kUnitStep);
  }

  /// Both buffers of s: zero, also where there is no row or column, then the first one as given.
  __device__ __forceinline__ void fill_state() {
    for (int i = threadIdx.x; i < 2 * Product::kStateSize; i += Product::kThreads)
      state_[i] = Element{};
    if (d_.state == nullptr) return;
    __syncthreads();
    const Element* given[kThreadRows];
    at_batch(static_cast<const Element*>(d_.state), given);
    for_each(all_,
             [&](int r, int u) { state_[state_place(r, u)] = given[r][u * Product::kUnitStep]; });
  }

  __device__ __forceinline__ void load_bias() {
    FASTRNN_UNROLL
    for (int u = 0; u < kThreadUnits; ++u) {
      bias_[u] = 0;
      if (kBackward || d_.b_ih == nullptr || !has_unit(u)) continue;
      const int unit = product_.unit() + u * Product::kUnitStep;
      bias_[u] = to_float(static_cast<const Element*>(d_.b_ih)[unit]) +
                 to_float(static_cast<const Element*>(d_.b_hh)[unit]);
    }
  }

  __device__ __forceinline__ void load_input_weights() {
    FASTRNN_UNROLL
    for (int u = 0; u < kThreadUnits; ++u) {
      const int unit = product_.unit() + u * Product::kUnitStep;
      FASTRNN_UNROLL
      for (int i = 0; i < kFeatures; ++i)
        w_ih_[u][i] = has_unit(u) && i < I_
                          ? to_float(static_cast<const Element*>(d_.w_ih)[unit * I_ + i])
                          : 0.0f;
    }
  }

  /// Of packed data, the rows of the steps from the walk's number `begin` on: what load() needs to
  /// know where to read.
  __device__ __forceinline__ void load_offsets(int begin) {
    if (!walk_.packed()) return;
    FASTRNN_UNROLL
    for (int i = 0; i < kTogether; ++i) {
      if (begin + i >= walk_.count) return;
      const int64_t* const first_row = walk_.steps.first_row + walk_.step(begin + i);
      first_row_[i] = first_row[0];
      end_row_[i] = first_row[1];
    }
  }

  /// The inputs of the steps from the walk's number `begin` on. Their offsets have been loaded a
  /// batch before, those of the next ones are now.
  __device__ __forceinline__ void load_batch(int begin, Inputs (&batch)[kTogether]) {
    FASTRNN_UNROLL
    for (int i = 0; i < kTogether; ++i) {
      batch[i].position = walk_.packed() ? first_row_[i] : walk_.step(begin + i);
      batch[i].alive = walk_.packed() ? among(end_row_[i] - first_row_[i]) : all_;
    }
    FASTRNN_UNROLL
    for (int i = 0; i < kTogether; ++i)
      if (begin + i < walk_.count) load(batch[i]);
    load_offsets(begin + kTogether);
  }

  /// The inputs of a step whose place is known, zero where there are none.
  __device__ __forceinline__ void load(Inputs& in) {
    const Addend* addend[kThreadRows];
    const Element *x[kThreadRows], *y[kThreadRows];
    if (kFeatures == 0) addend_.at(in.position, addend);
    if (kFeatures > 0) x_.at(in.position, x);
    if (kBackward) y_.at(in.position, y);
    FASTRNN_UNROLL
    for (int r = 0; r < kThreadRows; ++r) {
      FASTRNN_UNROLL
      for (int feature = 0; feature < kFeatures; ++feature)
        in.x[r][feature] =
            (in.alive & bits_of_row(r)) != 0 && feature < I_ ? x[r][feature] : Element{};
    }
    const unsigned added = d_.addend.data != nullptr ? in.alive : 0;
    for_each([&](int r, int u) {
      const int unit = u * Product::kUnitStep;
      if (kFeatures == 0) in.addend[r][u] = added & bit(r, u) ? addend[r][unit] : Addend{};
      if (kBackward) in.y[r][u] = in.alive & bit(r, u) ? y[r][unit] : Element{};
    });
  }

  /// An element's product and what is added to it: what was loaded comes last, so that the product
  /// is not kept waiting for it.
  __device__ __forceinline__ float with_addend(float sum, const Inputs& in, int r, int u) const {
    if (!kBackward) sum += bias_[u];
    if (kFeatures == 0) sum += to_float(in.addend[r][u]);
    FASTRNN_UNROLL
    for (int i = 0; i < kFeatures; ++i) sum += to_float(in.x[r][i]) * w_ih_[u][i];
    return sum;
  }

  /// A step: reads s from one buffer, writes it to the other one and to the output. `before`:
  /// elements that were alive at the step walked before.
  __device__ __forceinline__ void step(int buffer, const Inputs& in, unsigned before) {
    const Element* const last = state_ + buffer * Product::kStateSize;
    Element* const next = state_ + (1 - buffer) * Product::kStateSize;
    float sums[kThreadRows][kThreadUnits];
    product_.multiply(last, sums);
    for_each([&](int r, int u) { sums[r][u] = with_addend(sums[r][u], in, r, u); });
    if (kBackward && d_.grad_h_n != nullptr && (in.alive & ~before) != 0) {
      const Element* grad_h_n[kThreadRows];
      at_batch(static_cast<const Element*>(d_.grad_h_n), grad_h_n);
      for_each(in.alive & ~before,
               [&](int r, int u) { sums[r][u] += to_float(grad_h_n[r][u * Product::kUnitStep]); });
    }
    if (args_.activation == Activation::kTanh)
      activate_all<Activation::kTanh>(in, sums);
    else
      activate_all<Activation::kRelu>(in, sums);
    Element* out[kThreadRows];
    out_.at(in.position, out);
    for_each(in.alive, [&](int r, int u) {
      const Element s = from_float<Element>(sums[r][u]);
      next[state_place(r, u)] = s;
      out[r][u * Product::kUnitStep] = s;
    });
    // A row that has ended, or not begun, keeps its state.
    if (in.alive != all_)
      for_each(all_ & ~in.alive,
               [&](int r, int u) { next[state_place(r, u)] = last[state_place(r, u)]; });
  }

  template <Activation kActivation>
  static __device__ __forceinline__ void activate_all(const Inputs& in,
                                                      float (&sums)[kThreadRows][kThreadUnits]) {
    for_each([&](int r, int u) {
      const float y = kBackward ? to_float(in.y[r][u]) : 0.0f;
      sums[r][u] = activate<Element, kBackward>(kActivation, sums[r][u], y);
    });
  }

  __device__ __forceinline__ void store_final_state() const {
    if (d_.final_state == nullptr) return;
    const Element* const last = state_ + walk_.count % 2 * Product::kStateSize;
    Element* final_state[kThreadRows];
    at_batch(static_cast<Element*>(d_.final_state), final_state);
    for_each(all_, [&](int r, int u) {
      final_state[r][u * Product::kUnitStep] = last[state_place(r, u)];
    });
  }

  const RecurrenceArgs& args_;
  const RecurrenceDirection& d_;
  const int64_t row0_;  // the block's first row of the batch
  const int I_, H_;
  const WalkedSteps walk_;
  Product product_;
  int64_t first_row_[kTogether] = {}, end_row_[kTogether] = {};  // packed: of the next batch
  const View addend_, x_, y_, out_;
  const unsigned columns_, all_;  // elements whose unit exists, and whose row does, too
  Element* const state_;          // in shared memory: two buffers of s, ...
  const int own_;                 // ... and where in each the thread's first element is
  float bias_[kThreadUnits];      // b_ih + b_hh
  float w_ih_[kThreadUnits][kFeatures + 1];
};

template <BlockProduct Product, bool kBackward, int kFeatures>
__global__ void __launch_bounds__(Product::kThreads, 1)
    block_walk(const __grid_constant__ RecurrenceArgs args) {
  BlockWalk<Product, kBackward, kFeatures>(args).run();
}

template <BlockProduct Product>
const char* run_blocks(const RecurrenceArgs& args, Stream stream) {
  LaunchShape shape;
  shape.blocks_x = static_cast<unsigned>((args.steps.B + Product::kRows - 1) / Product::kRows);
  shape.blocks_y = args.directions;
  shape.threads = Product::kThreads;
  shape.shared_bytes = Product::kSharedBytes;
  const auto kernel = args.backward ? block_walk<Product, true, 0>
                      : args.direction[0].x.data == nullptr
                          ? block_walk<Product, false, 0>
                          : block_walk<Product, false, kMaxFusedInput>;
  return launch(kernel, shape, stream, args);
}

}  // namespace fastrnn::cuda
