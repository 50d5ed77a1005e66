// SPDX-License-Identifier: Apache-2.0
//
// One step of the recurrence: a row of register tiles over packed weights, or dot products with
// weights as they are. Part of recurrence.inl.

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
/// multiply-add, and a low tile has fewer numbers. (Of one vector only, more sums bring nothing.)
template <int R, int V>
constexpr int kSums = R == 1 ? 4 : V > 1 && R * V < 8 ? 2 : 1;

/// As multiply, in kSums sums that are added up apart from acc.
template <typename T, int R, int V>
FASTRNN_INLINE void multiply_apart(Vec<T> (&acc)[R][V], const T* a, int64_t row_stride, int64_t K,
                                   const T* panel, int64_t panel_stride) {
  constexpr int S = kSums<R, V>;
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

template <typename T, int R, int V>
FASTRNN_INLINE void add_product(Vec<T> (&acc)[R][V], Matrix<const T> a, int64_t K, int64_t row,
                                const T* panel, int64_t panel_stride = V * kWeights<T>) {
  constexpr int64_t kPart = kSums<R, V> * kTerms, kLeast = R == 1 ? kSums<R, V> : kFewTerms + 1;
  const T* first = a.data + row * a.row_stride;
  if (K < kLeast) return multiply<T, R, V>(acc, first, a.row_stride, K, panel, panel_stride);
  for (int64_t k = 0; k < K; k += kPart)
    multiply_apart<T, R, V>(acc, first + k, a.row_stride, K - k < kPart ? K - k : kPart,
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

/// sums[j] = sum over the lanes of acc[j], for as many j as a vector has lanes. Halves the number
/// of vectors in each round: where bit kSpan of a lane is clear the result goes on with acc[i],
/// where it is set with acc[i + kSpan], each as the sum of two lanes.
template <typename T, int kSpan>
struct LaneSums {
  template <size_t... kLane>
  static FASTRNN_INLINE Vec<T> merge(Vec<T> a, Vec<T> b, std::index_sequence<kLane...>) {
    constexpr int kCount = static_cast<int>(kLanes<T>);
    return __builtin_shufflevector(a, b, (kLane & kSpan ? kCount + kLane - kSpan : kLane)...) +
           __builtin_shufflevector(a, b, (kLane & kSpan ? kCount + kLane : kLane + kSpan)...);
  }
  static FASTRNN_INLINE Vec<T> of(Vec<T>* acc) {
#pragma GCC unroll 8
    for (int i = 0; i < kSpan; ++i)
      acc[i] = merge(acc[i], acc[i + kSpan], std::make_index_sequence<kLanes<T>>());
    return LaneSums<T, kSpan / 2>::of(acc);
  }
};
template <typename T>
struct LaneSums<T, 0> {
  static FASTRNN_INLINE Vec<T> of(Vec<T>* acc) { return acc[0]; }
};

/// Rows of a weight that are read side by side, and so many vectors of each at a time: enough sums
/// to hide the latency of the multiply-add, few enough streams for the processor to read ahead.
template <typename T>
constexpr int kDotRows = kLanes<T> < 4 ? kLanes<T> : 4;
template <int R>
constexpr int kDotVectors = FASTRNN_TILE_VECTORS / R;

/// acc[r][j] += a[r] * w[j], lane by lane, over kWeights of their columns from k on.
template <typename T, int R>
FASTRNN_INLINE void add_dots(Vec<T> (&acc)[R][kDotRows<T>], Matrix<const T> a,
                             const T* const (&w)[kDotRows<T>], int64_t k) {
  Weights<T> x[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) x[r] = load_weights(a.data + r * a.row_stride + k);
#pragma GCC unroll 4
  for (int j = 0; j < kDotRows<T>; ++j) {
    Weights<T> weights = load_weights(w[j] + k);
    if constexpr (R > 1) keep(weights);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) add_terms<T>(acc[r][j], x[r], weights);
  }
}

/// sums[r][j] += a[r] * w[j] over K columns, lane by lane, for rows j < `count` of w. Some sums
/// after those change too.
template <typename T, int R>
FASTRNN_INLINE void add_dot_products(Vec<T> (&sums)[R][kLanes<T>], Matrix<const T> a,
                                     Matrix<const T> w, int64_t count, int64_t K) {
  constexpr int V = kDotVectors<R>;
  constexpr int64_t kPart = kTerms * kWeights<T>;  // kTerms or less in a lane, then to the sums
  const int64_t tail = K % kWeights<T>, whole = K - tail;
  for (int64_t first = 0; first < count; first += kDotRows<T>) {
    const T* rows[kDotRows<T>];
    for (int64_t j = 0; j < kDotRows<T>; ++j)
      rows[j] = w.data + (first + j < count ? first + j : count - 1) * w.row_stride;
    for (int64_t begin = 0; begin < K; begin += kPart) {
      const int64_t end = begin + kPart < whole ? begin + kPart : whole;
      Vec<T> acc[V][R][kDotRows<T>] = {};
      int64_t k = begin;
      for (; k + V * kWeights<T> <= end; k += V * kWeights<T>) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) add_dots<T, R>(acc[v], a, rows, k + v * kWeights<T>);
      }
      for (; k < end; k += kWeights<T>) add_dots<T, R>(acc[0], a, rows, k);
      const bool ends = tail != 0 && begin + kPart > whole;
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int j = 0; j < kDotRows<T>; ++j) {
          if (ends)
            add_terms<T>(acc[0][r][j], load_end(a.data + r * a.row_stride, K, tail),
                         load_end(rows[j], K, tail));
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) sums[r][first + j] += acc[v][r][j];
        }
      }
    }
  }
}

/// acc[r] += x[r] * W_x for R rows and one vector of columns, from `column`; W_x is packed.
template <typename T, int R>
FASTRNN_INLINE void add_packed_input(Vec<T> (&acc)[R][1], const Step<T>& s, int64_t row,
                                     int64_t column) {
  const int64_t first = column / kPanel<T> * kPanel<T>;  // of the panel
  const int64_t rest = (s.N - first + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  const int64_t width = rest < kPanel<T> ? rest : kPanel<T>;
  const T* weights = s.x_panels + first * round_up_to_depth<T>(s.I) + (column - first) * kDepth<T>;
  multiply<T, R, 1>(acc, s.x.data + row * s.x.row_stride, s.x.row_stride, s.I, weights,
                    width * kDepth<T>);
}

/// R rows of one vector of columns, from `column`, of which `width` are there.
template <typename T, typename Act, int R>
void unpacked_rows(const Step<T>& s, int64_t row, int64_t column, int64_t width) {
  Vec<T> sums[R][kLanes<T>] = {};
  if (s.I != 0 && s.x_panels == nullptr)
    add_dot_products<T, R>(sums, from_row(s.x, row), from_row(s.w_x, column), width, s.I);
  if (s.K != 0)
    add_dot_products<T, R>(sums, from_row(s.s, row), from_row(s.w_s, column), width, s.K);
  Vec<T> acc[R][1];
  for (int r = 0; r < R; ++r) acc[r][0] = LaneSums<T, kLanes<T> / 2>::of(sums[r]);
  if (s.I != 0 && s.x_panels != nullptr) add_packed_input<T, R>(acc, s, row, column);
  finish<T, ForwardEpilogue<Act>, R, 1>(acc, s, row, column, width % kLanes<T>);
}

/// Forward, vectors [begin, end) of a step's columns, with weights as they are: for calls that have
/// too few rows to pay for packing.
template <typename T, typename Act>
void run_unpacked_forward(const Step<T>& s, int64_t begin, int64_t end, bool descending) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t column = (descending ? begin + end - 1 - i : i) * kLanes<T>;
    const int64_t width = s.N - column < kLanes<T> ? s.N - column : kLanes<T>;
    cut_into_tiles<FASTRNN_TILE_VECTORS>(
        0, s.rows, [&](auto rows, int64_t row) __attribute__((always_inline)) {
          unpacked_rows<T, Act, decltype(rows)::value>(s, row, column, width);
        });
  }
}

/// Backward, R rows of V vectors of columns, with W_hh as it is: combinations of its rows. tail: as
/// for finish, of one vector only.
template <typename T, typename Epilogue, int R, int V>
void combine_rows(const Step<T>& s, int64_t row, int64_t column, int64_t tail) {
  const T* a = s.s.data + row * s.s.row_stride;
  Vec<T> acc[R][V] = {};
  for (int64_t first = 0; first < s.K; first += kTerms) {
    Vec<T> part[R][V] = {};
    for (int64_t k = first; k < s.K && k < first + kTerms; ++k) {
      const T* weights = s.w_s.data + k * s.w_s.row_stride + column;
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        const bool partial = V == 1 && tail != 0;
        Vec<T> w = partial ? load_tail<T>(weights, tail) : load<T>(weights + v * kLanes<T>);
        if constexpr (R > 1) keep(w);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) part[r][v] += widen(a[r * s.s.row_stride + k]) * w;
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[r][v] += part[r][v];
    }
  }
  finish<T, Epilogue, R, V>(acc, s, row, column, tail);
}

/// sums[r] += s[row + r] W_hh for R rows, V vectors of columns from `column` and the terms [k,
/// end); with the last terms, out of it. tail: as for combine_rows.
template <typename T, typename Epilogue, int R, int V>
void add_terms_as_is(Vec<T> (*sums)[V], const Step<T>& s, int64_t row, int64_t column, int64_t tail,
                     int64_t k, int64_t end) {
  Vec<T> acc[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[r][v] = sums[r][v];
  }
  const Matrix<const T> w = s.w_s;
  int64_t whole = end;
  if constexpr (V == 1) {
    // A vector that is not full goes on into the next row, but not behind the last one.
    const int64_t behind = tail == 0 ? 0 : (kLanes<T> - tail + w.row_stride - 1) / w.row_stride;
    if (whole > s.K - behind) whole = s.K - behind > k ? s.K - behind : k;
  }
  add_product<T, R, V>(acc, {s.s.data + k, s.s.row_stride}, whole - k, row,
                       w.data + k * w.row_stride + column, w.row_stride);
  for (int64_t j = whole; j < end; ++j) {
    const Vec<T> weights = load_tail<T>(w.data + j * w.row_stride + column, tail);
    for (int r = 0; r < R; ++r) acc[r][0] += s.s.data[(row + r) * s.s.row_stride + j] * weights;
  }
  if (end == s.K) return finish<T, Epilogue, R, V>(acc, s, row, column, tail);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sums[r][v] = acc[r][v];
  }
}

/// Many rows, by blocks of W_hh's rows: lines so far apart share few places in the caches, which
/// hold a block, but not the whole height of a panel. Adds in the order of packed weights.
template <typename T, typename Epilogue, int V>
void combine_by_blocks(const Step<T>& s, int64_t column, int64_t tail) {
  constexpr int64_t kRows = 16 * FASTRNN_TILE_ROWS, kBlock = 2 * kTerms;
  for (int64_t first = 0, last; first < s.rows; first = last) {
    // No few rows alone, as in product().
    last = s.rows - first < kRows + FASTRNN_TILE_ROWS ? s.rows : first + kRows;
    Vec<T> sums[kRows + FASTRNN_TILE_ROWS][V] = {};
    int64_t k = 0;
    do {  // a step without a previous state has no terms, but an end
      const int64_t end = s.K - k < kBlock ? s.K : k + kBlock;
      cut_into_tiles<FASTRNN_TILE_ROWS>(first, last,
                                        [&](auto rows, int64_t row) __attribute__((always_inline)) {
                                          add_terms_as_is<T, Epilogue, decltype(rows)::value, V>(
                                              sums + row - first, s, row, column, tail, k, end);
                                        });
      k = end;
    } while (k < s.K);
  }
}

/// All rows of V vectors of columns: one or two in a single pass over W_hh, as are numbers that
/// packed weights multiply in pairs.
template <typename T, typename Epilogue, int V>
void combine_all_rows(const Step<T>& s, int64_t column, int64_t tail) {
  if constexpr (kDepth<T> == 1 && V <= FASTRNN_TILE_VECTORS) {
    if (s.rows > 2) return combine_by_blocks<T, Epilogue, V>(s, column, tail);
  }
  cut_into_tiles<2>(0, s.rows, [&](auto rows, int64_t row) __attribute__((always_inline)) {
    combine_rows<T, Epilogue, decltype(rows)::value, V>(s, row, column, tail);
  });
}

/// Backward, vectors [begin, end) of a step's columns, with W_hh as it is.
template <typename T, typename Epilogue>
void run_unpacked_backward(const Step<T>& s, int64_t begin, int64_t end, bool descending) {
  const int64_t tail = end * kLanes<T> > s.N ? s.N % kLanes<T> : 0;
  int64_t done = begin;
  const auto combine = [&](auto vectors) {
    constexpr int V = decltype(vectors)::value;
    const int64_t count = (end - done - (tail != 0)) / V;
    for (int64_t i = 0; i < count; ++i)
      combine_all_rows<T, Epilogue, V>(s, (done + (descending ? count - 1 - i : i) * V) * kLanes<T>,
                                       0);
    done += count * V;
  };
  constexpr int kVectors = FASTRNN_TILE_VECTORS;
  // In a single pass, long runs through each of W_hh's rows.
  if (s.rows <= 2 || kDepth<T> > 1) combine(std::integral_constant<int, 2 * kVectors>{});
  combine(std::integral_constant<int, kVectors>{});
  combine(std::integral_constant<int, 1>{});
  if (tail != 0) combine_all_rows<T, Epilogue, 1>(s, done * kLanes<T>, tail);
}

/// All rows of one panel.
template <typename T, typename Epilogue, int V>
FASTRNN_INLINE void panel_rows(const Step<T>& s, int64_t column, int64_t tail) {
  cut_into_tiles<FASTRNN_TILE_ROWS>(
      0, s.rows, [&](auto rows, int64_t row) __attribute__((always_inline)) {
        tile<T, Epilogue, decltype(rows)::value, V>(s, row, column, tail);
      });
}

/// Panels [begin, end) of a step's columns, each for all rows, so that it stays in a near cache.
/// Odd steps walk the panels backwards: what the last step left in the cache is used first.
template <typename T, typename Epilogue>
void run_panels(const Step<T>& s, int64_t begin, int64_t end, bool descending) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t column = (descending ? begin + end - 1 - i : i) * kPanel<T>;
    const int64_t width = s.N - column < kPanel<T> ? s.N - column : kPanel<T>;
    const int64_t vectors = (width + kLanes<T> - 1) / kLanes<T>;
    const int64_t tail = width % kLanes<T>;
    switch (vectors) {
      case 1:
        panel_rows<T, Epilogue, 1>(s, column, tail);
        break;
#if FASTRNN_TILE_VECTORS > 2
      case 2:
        panel_rows<T, Epilogue, 2>(s, column, tail);
        break;
      case 3:
        panel_rows<T, Epilogue, 3>(s, column, tail);
        break;
#endif
      default:
        panel_rows<T, Epilogue, FASTRNN_TILE_VECTORS>(s, column, tail);
    }
  }
}

}  // namespace
