// SPDX-License-Identifier: Apache-2.0
//
// One step of the recurrence over weights as they are: in forward dot products with their rows, in
// backward combinations of these. Part of recurrence.inl.

namespace {

/// sums[j] = sum over the lanes of acc[j], for as many j as a vector has lanes. Halves the number
/// of vectors in each round: where bit kSpan of a lane is clear the result goes on with acc[i],
/// where it is set with acc[i + kSpan], each as the sum of two lanes.
template <typename T, int kSpan = kLanes<T> / 2>
FASTRNN_INLINE Vec<T> lane_sums(Vec<T>* acc) {
  if constexpr (kSpan > 0) {
#pragma GCC unroll 8
    for (int i = 0; i < kSpan; ++i) {
      exchange<kSpan>(acc[i], acc[i + kSpan], std::make_index_sequence<kLanes<T>>());
      acc[i] += acc[i + kSpan];
    }
    return lane_sums<T, kSpan / 2>(acc);
  } else {
    return acc[0];
  }
}

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
      rows[j] = w.data + smaller(first + j, count - 1) * w.row_stride;
    for (int64_t begin = 0; begin < K; begin += kPart) {
      const int64_t end = smaller(begin + kPart, whole);
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

/// R rows of one vector of columns, from `column`, of which `width` are there.
template <typename T, typename Act, int R>
void unpacked_rows(const Step<T>& s, int64_t row, int64_t column, int64_t width) {
  Vec<T> sums[R][kLanes<T>] = {};
  if (s.I != 0)
    add_dot_products<T, R>(sums, from_row(s.x, row), from_row(s.w_x, column), width, s.I);
  if (s.K != 0)
    add_dot_products<T, R>(sums, from_row(s.s, row), from_row(s.w_s, column), width, s.K);
  Vec<T> acc[R][1];
  for (int r = 0; r < R; ++r) acc[r][0] = lane_sums<T>(sums[r]);
  finish<T, ForwardEpilogue<Act>, R, 1>(acc, s, row, column, width % kLanes<T>);
}

/// Forward, vectors [begin, end) of a step's columns, with weights as they are: for calls that have
/// too few rows to pay for packing.
template <typename T, typename Act>
void run_unpacked_forward(const Step<T>& s, int64_t begin, int64_t end, bool descending) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t column = (descending ? begin + end - 1 - i : i) * kLanes<T>;
    const int64_t width = smaller(kLanes<T>, s.N - column);
    cut_into_tiles<FASTRNN_TILE_VECTORS>(
        0, s.rows, [&](auto rows, int64_t row) __attribute__((always_inline)) {
          unpacked_rows<T, Act, decltype(rows)::value>(s, row, column, width);
        });
  }
}

/// sums[r] += s[row + r] W_hh for R rows, V vectors of columns from `column` and the terms [k,
/// end); with the last terms, out of it. tail: as for finish, of one vector only.
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
    int64_t behind = 0;
    if (tail != 0)
      behind = w.row_stride > 0 ? (kLanes<T> - tail + w.row_stride - 1) / w.row_stride : s.K;
    if (whole > s.K - behind) whole = s.K - behind > k ? s.K - behind : k;
  }
  constexpr int kSumsAsIs = smaller(kSums<R>, 2);  // one row has many columns side by side
  add_product<T, R, V, kSumsAsIs>(acc, {s.s.data + k, s.s.row_stride}, whole - k, row,
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

/// All rows of V vectors of columns, kRows at a time, by blocks of W_hh's rows: lines so far apart
/// share few places in the caches, which hold a block, but not the whole height of a panel.
template <typename T, typename Epilogue, int V, int64_t kRows>
void combine_by_blocks(const Step<T>& s, int64_t column, int64_t tail) {
  constexpr int64_t kBlock = 2 * kTerms;
  constexpr int kTile = smaller(kRows, FASTRNN_TILE_ROWS);
  for (int64_t first = 0, last; first < s.rows; first = last) {
    // No few rows alone, as in product().
    last = s.rows - first < kRows + kTile ? s.rows : first + kRows;
    Vec<T> sums[kRows + kTile][V] = {};
    int64_t k = 0;
    do {  // a step without a previous state has no terms, but an end
      const int64_t end = smaller(k + kBlock, s.K);
      cut_into_tiles<kTile>(first, last,
                            [&](auto rows, int64_t row) __attribute__((always_inline)) {
                              add_terms_as_is<T, Epilogue, decltype(rows)::value, V>(
                                  sums + row - first, s, row, column, tail, k, end);
                            });
      k = end;
    } while (k < s.K);
  }
}

/// Backward, vectors [begin, end) of a step's columns, with W_hh as it is. Not of numbers that are
/// multiplied in pairs: these lie side by side in packed weights only.
template <typename T, typename Epilogue>
void run_unpacked_backward(const Step<T>& s, int64_t begin, int64_t end, bool descending) {
  if constexpr (kDepth<T> == 1) {
    const int64_t tail = end * kLanes<T> > s.N ? s.N % kLanes<T> : 0;
    int64_t done = begin;
    const auto combine = [&](auto vectors, auto most_rows) {
      constexpr int V = decltype(vectors)::value;
      constexpr int64_t kRows = decltype(most_rows)::value;
      const int64_t count = (end - done - (tail != 0)) / V;
      for (int64_t i = 0; i < count; ++i)
        combine_by_blocks<T, Epilogue, V, kRows>(
            s, (done + (descending ? count - 1 - i : i) * V) * kLanes<T>, 0);
      done += count * V;
    };
    const auto run = [&](auto most_rows) {
      constexpr int64_t kRows = decltype(most_rows)::value;
      combine(std::integral_constant<int, FASTRNN_TILE_VECTORS>{}, most_rows);
      combine(std::integral_constant<int, 1>{}, most_rows);
      if (tail != 0) combine_by_blocks<T, Epilogue, 1, kRows>(s, done * kLanes<T>, tail);
    };
    if (s.rows > 2) return run(std::integral_constant<int64_t, 16 * FASTRNN_TILE_ROWS>{});
    // One or two rows: long runs through each of W_hh's rows, and few sums to clear.
    constexpr std::integral_constant<int64_t, 2> kTwoRows;
    combine(std::integral_constant<int, 2 * FASTRNN_TILE_VECTORS>{}, kTwoRows);
    run(kTwoRows);
  }
}

}  // namespace
