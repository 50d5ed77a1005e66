// SPDX-License-Identifier: Apache-2.0
//
// Weights in the order in which the kernels read them. Part of recurrence.inl.

namespace {

template <typename T>
int64_t padded_columns(int64_t N) {
  return (N + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

template <typename T>
int64_t packed_size(int64_t K, int64_t N) {
  return round_up_to_depth<T>(K) * padded_columns<T>(N);
}

/// A lane of `a` whose bit kSpan is set and the lane of `b` where it is clear change places.
template <int kSpan, typename V, size_t... kLane>
FASTRNN_INLINE void exchange(V& a, V& b, std::index_sequence<kLane...>) {
  constexpr size_t kCount = sizeof...(kLane);
  const V low = __builtin_shufflevector(a, b, (kLane & kSpan ? kCount + kLane - kSpan : kLane)...);
  b = __builtin_shufflevector(a, b, (kLane & kSpan ? kCount + kLane : kLane + kSpan)...);
  a = low;
}

/// Transposes a square of kCount vectors, by squares of half the size in each round.
template <int kCount, int kSpan = kCount / 2, typename V>
FASTRNN_INLINE void transpose(V* v) {
  if constexpr (kSpan > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i)
      if (!(i & kSpan)) exchange<kSpan>(v[i], v[i + kSpan], std::make_index_sequence<kCount>());
    transpose<kCount, kSpan / 2>(v);
  }
}

/// One panel, of columns that are adjacent in the source: its rows as they are, or side by side.
template <typename T>
void pack_rows(const T* source, int64_t k_stride, int64_t K, int64_t width, int64_t padded,
               T* panel) {
  for (int64_t k = 0; k < K; k += kDepth<T>, panel += padded * kDepth<T>) {
    const T* rows = source + k * k_stride;
    if (k + kDepth<T> <= K) {
      int64_t n = 0;
      for (; n + kLanes<T> <= width; n += kLanes<T>)
        side_by_side(rows + n, k_stride, panel + n * kDepth<T>);
      for (; n < width; ++n)
        for (int64_t i = 0; i < kDepth<T>; ++i) panel[n * kDepth<T> + i] = rows[i * k_stride + n];
    } else {
      for (int64_t n = 0; n < width; ++n) panel[n * kDepth<T>] = rows[n];
    }
  }
}

/// Columns [0, width) of a panel, at most a vector of them, whose numbers are adjacent in the
/// source, as far as K is made of whole squares. Returns the rest's first k.
template <typename T>
int64_t pack_squares(const T* source, int64_t n_stride, int64_t K, int64_t width, int64_t padded,
                     T* panel) {
  constexpr int kCount = static_cast<int>(kLanes<T>);  // of kDepth numbers each
  int64_t k = 0;
  for (; k + kWeights<T> <= K; k += kWeights<T>) {
    Vec<T> square[kCount] = {};
    for (int n = 0; n < kCount; ++n)
      if (n < width) __builtin_memcpy(&square[n], source + n * n_stride + k, sizeof(Vec<T>));
    transpose<kCount>(square);
    for (int i = 0; i < kCount; ++i)
      __builtin_memcpy(panel + (k + i * kDepth<T>)*padded, &square[i], sizeof(Vec<T>));
  }
  return k;
}

/// As Kernels::pack says.
template <typename T>
void pack(const T* source, int64_t k_stride, int64_t n_stride, int64_t K, int64_t N, T* panels) {
  const int64_t depth = round_up_to_depth<T>(K);
  for (int64_t column = 0; column < N; column += kPanel<T>) {
    const int64_t width = smaller(kPanel<T>, N - column);
    const int64_t padded = padded_columns<T>(width);
    const T* from = source + column * n_stride;
    if (width < padded || K < depth) {
      // What stays zero. (Not by memset, which may be slow to start.)
      for (int64_t i = 0; i < depth * padded; ++i) panels[i] = T{};
    }
    if (n_stride == 1) {
      pack_rows<T>(from, k_stride, K, width, padded, panels);
    } else {
      for (int64_t n = 0; n < width; n += kLanes<T>) {
        const int64_t count = smaller(kLanes<T>, width - n);
        T* out = panels + n * kDepth<T>;
        int64_t k = 0;
        if (k_stride == 1)
          k = pack_squares<T>(from + n * n_stride, n_stride, K, count, padded, out);
        for (; k < K; ++k) {
          for (int64_t j = 0; j < count; ++j)
            out[(k / kDepth<T> * padded + j) * kDepth<T> + k % kDepth<T>] =
                from[(n + j) * n_stride + k * k_stride];
        }
      }
    }
    panels += depth * padded;
  }
}

}  // namespace
