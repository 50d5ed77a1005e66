// SPDX-License-Identifier: Apache-2.0
//
// One step of the recurrence: a row of register tiles over packed weights. Part of recurrence.inl.

namespace {

/// out = f( bias + addend + addend2 + x * W_x + s * M ) for `rows` rows. In backward `h` is the
/// layer's output and the result is multiplied by f'(h) instead.
template <typename T>
struct Step {
  int64_t rows, N;  // N: columns of out
  int64_t I, K;     // columns of x and of s; 0 where there is no product
  Matrix<const T> x, s;
  const T *x_panels, *s_panels;
  Matrix<const T> w_x, w_s;  // W_ih and W_hh in place of panels, where those are null
  const Sum<T>* bias;
  Matrix<const T> addend, addend2;
  Matrix<const T> h;
  Matrix<T> out;
};

template <typename T>
FASTRNN_INLINE Matrix<T> from_row(Matrix<T> m, int64_t row) {
  if (m.data != nullptr) m.data += row * m.row_stride;
  return m;
}

template <typename Act>
struct ForwardEpilogue {
  template <typename T>
  static FASTRNN_INLINE Vec<T> apply(Vec<T> sum, Vec<T>) {
    return Act::template value<T>(sum);
  }
  static constexpr bool kReadsOutput = false;
};

template <typename Act>
struct BackwardEpilogue {
  template <typename T>
  static FASTRNN_INLINE Vec<T> apply(Vec<T> sum, Vec<T> h) {
    return Act::template gradient<T>(h, sum);
  }
  static constexpr bool kReadsOutput = true;
};

/// Calls run(height, row) for the rows [row, end) in tiles of R rows and fewer. The last two are
/// about as high as each other: a low one would wait for what it reads, since few products need
/// each number.
template <int R, typename Run>
FASTRNN_INLINE void cut_into_tiles(int64_t row, int64_t end, const Run& run) {
  for (; end - row >= 2 * R - 1 || end - row == R; row += R)
    run(std::integral_constant<int, R>{}, row);
  if constexpr (R > 1) cut_into_tiles<R - 1>(row, end, run);
}

/// acc[r][v] += a[r] * weights[v], kDepth terms of each sum, or one: the core of everything.
template <typename T, int R, int V, bool kOneTerm = false>
FASTRNN_INLINE void multiply_terms(Vec<T> (&acc)[R][V], const T* a, int64_t row_stride,
                                   const T* weights) {
  Weights<T> b[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    b[v] = load_weights(weights + v * kWeights<T>);
    if constexpr (R > 1) keep(b[v]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const auto terms = kOneTerm ? load_term(a + r * row_stride) : load_terms(a + r * row_stride);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) add_terms<T>(acc[r][v], terms, b[v]);
  }
}

/// acc[r][v] += sum_k a[r][k] * panel[k][v].
template <typename T, int R, int V>
FASTRNN_INLINE void multiply(Vec<T> (&acc)[R][V], const T* a, int64_t row_stride, int64_t K,
                             const T* panel, int64_t panel_stride = V * kWeights<T>) {
  int64_t k = 0;
  for (; k + kDepth<T> <= K; k += kDepth<T>, panel += panel_stride)
    multiply_terms<T, R, V>(acc, a + k, row_stride, panel);
  if constexpr (kDepth<T> > 1) {
    if (k < K) multiply_terms<T, R, V, /*kOneTerm=*/true>(acc, a + k, row_stride, panel);
  }
}

/// So many independent sums over k for each number of a tile: eight in all hide the latency of the
/// multiply-add, and a low tile has fewer numbers. By its rows alone, so that a number's bits do
/// not depend on the columns that are beside it.
template <int R>
constexpr int kSums = R == 1                         ? 4
                      : R * FASTRNN_TILE_VECTORS < 8 ? 2
                                                     : 1;

/// As multiply, in S sums that are added up apart from acc.
template <typename T, int R, int V, int S>
FASTRNN_INLINE void multiply_apart(Vec<T> (&acc)[R][V], const T* a, int64_t row_stride, int64_t K,
                                   const T* panel, int64_t panel_stride) {
  Vec<T> part[S][R][V] = {};
  int64_t k = 0;
  for (; k + S * kDepth<T> <= K; k += S * kDepth<T>) {
#pragma GCC unroll 8
    for (int j = 0; j < S; ++j, panel += panel_stride)
      multiply_terms<T, R, V>(part[j], a + k + j * kDepth<T>, row_stride, panel);
  }
  multiply<T, R, V>(part[0], a + k, row_stride, K - k, panel, panel_stride);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
#pragma GCC unroll 4
      for (int j = 1; j < S; j += 2) part[j - 1][r][v] += part[j][r][v];
      acc[r][v] += S == 4 ? part[0][r][v] + part[2][r][v] : part[0][r][v];
    }
  }
}

/// Terms that are added one after another, with packed weights. Longer sums are sums of such parts,
/// and two products are added up apart: rounding errors then stay near those of a blocked matrix
/// product.
constexpr int64_t kTerms = FASTRNN_TERMS;
/// A product this short goes straight into the sum, since a part would cost more than it; one row's
/// only if it is shorter than the number of its sums.
constexpr int64_t kFewTerms = 8;

template <typename T, int R, int V, int S = kSums<R>>
FASTRNN_INLINE void add_product(Vec<T> (&acc)[R][V], Matrix<const T> a, int64_t K, int64_t row,
                                const T* panel, int64_t panel_stride = V * kWeights<T>) {
  constexpr int64_t kPart = S * kTerms, kLeast = R == 1 ? S : kFewTerms + 1;
  const T* first = a.data + row * a.row_stride;
  if (K < kLeast) return multiply<T, R, V>(acc, first, a.row_stride, K, panel, panel_stride);
  for (int64_t k = 0; k < K; k += kPart)
    multiply_apart<T, R, V, S>(acc, first + k, a.row_stride, smaller(kPart, K - k),
                               panel + k / kDepth<T> * panel_stride, panel_stride);
}

template <typename T, int R, int V>
FASTRNN_INLINE void add_rows(Vec<T> (&acc)[R][V], Matrix<const T> m, int64_t row, int64_t column,
                             int64_t tail) {
  if (m.data == nullptr) return;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const T* p = m.data + (row + r) * m.row_stride + column;
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const bool partial = v == V - 1 && tail != 0;
      acc[r][v] += partial ? load_tail<T>(p + v * kLanes<T>, tail) : load<T>(p + v * kLanes<T>);
    }
  }
}

/// out = f( acc + bias + addends ) for R rows by V vectors, columns from `column`. `tail` is the
/// number of columns in the last vector where that is not full, else 0.
template <typename T, typename Epilogue, int R, int V>
FASTRNN_INLINE void finish(Vec<T> (&acc)[R][V], const Step<T>& s, int64_t row, int64_t column,
                           int64_t tail) {
  // After the products, because a sum of many small terms that starts from a large one loses digits
  // in each.
  if (s.bias != nullptr) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const Vec<T> b = load<Sum<T>>(s.bias + column + v * kLanes<T>);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[r][v] += b;
    }
  }
  add_rows<T, R, V>(acc, s.addend, row, column, tail);
  add_rows<T, R, V>(acc, s.addend2, row, column, tail);

#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    T* out = s.out.data + (row + r) * s.out.row_stride + column;
    const T* h = Epilogue::kReadsOutput ? s.h.data + (row + r) * s.h.row_stride + column : nullptr;
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const bool partial = v == V - 1 && tail != 0;
      Vec<T> value = {};
      if (Epilogue::kReadsOutput)
        value = partial ? load_tail<T>(h + v * kLanes<T>, tail) : load<T>(h + v * kLanes<T>);
      value = Epilogue::template apply<Sum<T>>(acc[r][v], value);
      if (partial)
        store_tail<T>(out + v * kLanes<T>, value, tail);
      else
        store<T>(out + v * kLanes<T>, value);
    }
  }
}

/// One register tile of packed weights.
template <typename T, typename Epilogue, int R, int V>
void tile(const Step<T>& s, int64_t row, int64_t column, int64_t tail) {
  Vec<T> acc[R][V] = {};
  // Panels before this one are full, so their total width is `column`.
  if (s.I != 0)
    add_product<T, R, V>(acc, s.x, s.I, row, s.x_panels + column * round_up_to_depth<T>(s.I));
  if (s.K != 0)
    add_product<T, R, V>(acc, s.s, s.K, row, s.s_panels + column * round_up_to_depth<T>(s.K));
  finish<T, Epilogue, R, V>(acc, s, row, column, tail);
}

/// Calls run(vectors), the number of vectors of columns, at most a tile's.
template <int V = FASTRNN_TILE_VECTORS, typename Run>
FASTRNN_INLINE void with_vectors(int64_t vectors, const Run& run) {
  if constexpr (V > 1) {
    if (vectors < V) return with_vectors<V - 1>(vectors, run);
  }
  run(std::integral_constant<int, V>{});
}

/// Panels [begin, end) of a step's columns, each for all rows, so that it stays in a near cache.
/// Odd steps walk the panels backwards: what the last step left in the cache is used first.
template <typename T, typename Epilogue>
void run_panels(const Step<T>& s, int64_t begin, int64_t end, bool descending) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t column = (descending ? begin + end - 1 - i : i) * kPanel<T>;
    const int64_t width = smaller(kPanel<T>, s.N - column);
    with_vectors((width + kLanes<T> - 1) / kLanes<T>, [&](auto v) __attribute__((always_inline)) {
      cut_into_tiles<FASTRNN_TILE_ROWS>(
          0, s.rows, [&](auto rows, int64_t row) __attribute__((always_inline)) {
            tile<T, Epilogue, decltype(rows)::value, decltype(v)::value>(s, row, column,
                                                                         width % kLanes<T>);
          });
    });
  }
}

}  // namespace
