// SPDX-License-Identifier: Apache-2.0
//
// The outer product of which weight gradients are made: sums over many rows of a column of one
// matrix times a column of another. Part of recurrence.inl.

namespace {

/// Rows that are multiplied before the next tile. Sums are sums of such parts.
template <typename T>
constexpr int64_t kOuterRows = 128 * kDepth<T>;
/// Parts that one block of the result takes, before the next: each time, all of a large result is
/// read and written.
constexpr int64_t kOuterParts = 4;
/// Columns of the two factors in a block, as much as the second-level cache holds: whole panels,
/// and whole tiles.
template <typename T>
constexpr int64_t kVectorColumns = 1024 / static_cast<int64_t>(sizeof(Sum<T>));
template <typename T>
constexpr int64_t kScalarColumns = 16 * FASTRNN_TILE_ROWS;
/// Whether rows are packed, kDepth side by side; so many at a time, at most, of so many elements.
template <typename T>
constexpr bool kPacks = kDepth<T> > 1;
template <typename T>
constexpr int64_t kPackedRows = kPacks<T> ? kOuterParts * kOuterRows<T> : 0;
template <typename T>
constexpr int64_t kPackedColumns = kPacks<T> ? kVectorColumns<T> + kScalarColumns<T> : 0;
/// Columns [begin, end) of a matrix.
struct Columns {
  int64_t begin, end;
};

/// Part number `part` of N columns: whole vectors, but for the last.
template <typename T>
Columns columns_of_part(int64_t N, int64_t part, int64_t parts) {
  const auto bound = [&](int64_t i) {
    return smaller((N + kLanes<T> - 1) / kLanes<T> * i / parts * kLanes<T>, N);
  };
  return {bound(part), bound(part + 1)};
}

/// Rows of the two factors of an outer product, each at one distance from the next: of one whole
/// vectors are read, of the other single numbers. Where kDepth of them are multiplied at once,
/// `rows` counts packed ones: kDepth rows side by side.
template <typename T>
struct Run {
  int64_t rows = 0;
  Matrix<const T> vectors, scalars;
};

/// A block of the result, out[vector column * vector_stride + scalar column * scalar_stride], one
/// of whose strides is 1. The first sums are written over what is there, others added to it.
template <typename T>
struct OuterBlock {
  T* data;
  int64_t vector_stride, scalar_stride;
  bool overwrites;

  FASTRNN_INLINE OuterBlock at(int64_t vector_column, int64_t scalar_column) const {
    return {data + vector_column * vector_stride + scalar_column * scalar_stride, vector_stride,
            scalar_stride, overwrites};
  }
};

/// out += sums, of the first `width` columns of the vectors, each number to its own row. Never
/// inlined: the compiler would take single elements from the accumulators, and for that keep these
/// in memory all the time.
template <typename T, int R, int64_t N>
__attribute__((noinline)) void add_transposed(const T (&sums)[R][N], int64_t width,
                                              OuterBlock<T> out) {
  for (int64_t n = 0; n < width; ++n) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      T* p = out.data + n * out.vector_stride + r;
      *p = out.overwrites ? sums[r][n] : *p + sums[r][n];
    }
  }
}

/// out += acc, where vectors lie along out's rows. `tail`: columns of the last vector, if not full.
template <typename T, int R, int V>
FASTRNN_INLINE void add_vectors(const Vec<T> (&acc)[R][V], int64_t tail, OuterBlock<Sum<T>> out) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      Sum<T>* p = out.data + r * out.scalar_stride + v * kLanes<T>;
      const bool partial = v == V - 1 && tail != 0;
      Vec<T> sum = acc[r][v];
      if (!out.overwrites) sum += partial ? load_tail<Sum<T>>(p, tail) : load<Sum<T>>(p);
      if (partial)
        store_tail<Sum<T>>(p, sum, tail);
      else
        store<Sum<T>>(p, sum);
    }
  }
}

/// A vector of columns, of `tail` in a last one that is not full. Those of kDepth numbers are
/// packed, and full.
template <typename T>
FASTRNN_INLINE Weights<T> load_columns(const T* p, int64_t tail) {
  if constexpr (kDepth<T> == 1) {
    if (tail != 0) return load_tail<T>(p, tail);
  }
  return load_weights(p);
}

/// out += vectors^T scalars over all rows, for V vectors from column v_begin, of whose last one
/// `tail` are there if it is not full, and R scalars from column s_begin.
template <typename T, int R, int V>
void outer_tile(const Run<T>* runs, int64_t count, int64_t v_begin, int64_t tail, int64_t s_begin,
                OuterBlock<Sum<T>> out) {
  out = out.at(v_begin, s_begin);
  const bool along_rows = out.vector_stride == 1;
  if (along_rows) {
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v)
        __builtin_prefetch(out.data + r * out.scalar_stride + v * kLanes<T>, 1);
  }
  Vec<T> acc[R][V] = {};
  for (int64_t i = 0; i < count; ++i) {
    const Run<T>& run = runs[i];
    const T* vectors = run.vectors.data + v_begin * kDepth<T>;
    const T* scalars = run.scalars.data + s_begin * kDepth<T>;
    for (int64_t row = 0; row < run.rows; ++row) {
      Weights<T> b[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        b[v] = load_columns(vectors + v * kWeights<T>, v == V - 1 ? tail : 0);
        if constexpr (R > 1) keep(b[v]);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const auto terms = load_terms(scalars + r * kDepth<T>);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) add_terms<T>(acc[r][v], terms, b[v]);
      }
      vectors += run.vectors.row_stride;
      scalars += run.scalars.row_stride;
    }
  }
  if (along_rows) return add_vectors<T, R, V>(acc, tail, out);
  Sum<T> sums[R][V * kLanes<T>];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store<Sum<T>>(sums[r] + v * kLanes<T>, acc[r][v]);
  }
  add_transposed(sums, tail != 0 ? (V - 1) * kLanes<T> + tail : V * kLanes<T>, out);
}

/// out += vectors^T scalars over all rows, for the vectors' columns [v, v_end) and the scalars'
/// columns [s, s_end).
template <typename T>
void outer_product(const Run<T>* runs, int64_t count, int64_t v, int64_t v_end, int64_t s,
                   int64_t s_end, OuterBlock<Sum<T>> out) {
  for (; v < v_end; v += kPanel<T>) {
    const int64_t width = smaller(kPanel<T>, v_end - v);
    with_vectors((width + kLanes<T> - 1) / kLanes<T>, [&](auto n) __attribute__((always_inline)) {
      cut_into_tiles<FASTRNN_TILE_ROWS>(
          s, s_end, [&](auto scalars, int64_t first) __attribute__((always_inline)) {
            outer_tile<T, decltype(scalars)::value, decltype(n)::value>(
                runs, count, v, width % kLanes<T>, first, out);
          });
    });
  }
}

/// out[n][k] += sum_row delta[row][n] * a[row][k] for a block of n and k; out [.., K]. Rows are
/// collected until there are enough for a tile.
template <typename T>
class OuterProduct {
 public:
  /// overwrites: out[n][k] = ... workspace: [packed_rows, kPackedColumns], where rows are packed.
  OuterProduct(Columns n, Columns k, Sum<T>* out, int64_t K, bool overwrites, T* workspace,
               int64_t packed_rows)
      : along_k_(k.end - k.begin >= kLanes<T>),
        vectors_(along_k_ ? k : n),
        scalars_(along_k_ ? n : k),
        out_{out, along_k_ ? 1 : K, along_k_ ? K : 1, overwrites},
        workspace_(workspace),
        room_(kPacks<T> ? packed_rows : kOuterParts * kOuterRows<T>) {}

  FASTRNN_INLINE void add(int64_t rows, Matrix<const T> delta, Matrix<const T> a) {
    while (rows > 0) {
      const int64_t room = smaller(room_ - rows_, kOuterRows<T> - rows_ % kOuterRows<T>);
      const int64_t count = smaller(rows, room);
      append({count, along_k_ ? a : delta, along_k_ ? delta : a});
      if (rows_ == room_ || count_ == kMostRuns) multiply_collected();
      delta = from_row(delta, count);
      a = from_row(a, count);
      rows -= count;
    }
  }

  /// Multiplies what is left.
  void finish() {
    if (count_ > 0) return multiply_collected();
    if (out_.overwrites) clear();
  }

 private:
  static constexpr int64_t kMostRuns = kOuterRows<T>;

  /// Multiplies what has been collected.
  __attribute__((noinline)) void multiply_collected() {
    if constexpr (kPacks<T>)
      multiply_packed();
    else
      multiply();
    count_ = rows_ = 0;
    out_.overwrites = false;
  }

  /// out = 0.
  void clear() const {
    const Columns rows = along_k_ ? scalars_ : vectors_, columns = along_k_ ? vectors_ : scalars_;
    const int64_t stride = along_k_ ? out_.scalar_stride : out_.vector_stride;
    for (int64_t row = rows.begin; row < rows.end; ++row)
      __builtin_memset(out_.data + row * stride + columns.begin, 0,
                       (columns.end - columns.begin) * sizeof(Sum<T>));
  }

  /// Rows that follow the last ones, or come just before them, lengthen their run, unless a part
  /// begins with them.
  FASTRNN_INLINE void append(const Run<T>& run) {
    const int64_t row = rows_;
    rows_ += round_up_to_depth<T>(run.rows);
    if (row % kOuterRows<T> == 0) {
      first_run_[row / kOuterRows<T>] = count_;
    } else {
      Run<T>& last = runs_[count_ - 1];
      const int64_t together = last.rows + run.rows;
      const bool before = is_followed(run, last);
      if (before || is_followed(last, run)) {
        if (before) last = run;
        last.rows = together;
        return;
      }
    }
    runs_[count_++] = run;
  }

  static bool is_followed(const Run<T>& run, const Run<T>& next) {
    const auto follows = [&](const Matrix<const T>& a, const Matrix<const T>& b) {
      return b.data == a.data + run.rows * a.row_stride && b.row_stride == a.row_stride;
    };
    return follows(run.vectors, next.vectors) && follows(run.scalars, next.scalars);
  }

  /// By blocks of columns, of all parts: a block of the result stays in the second-level cache.
  void multiply() {
    const int64_t parts = (rows_ + kOuterRows<T> - 1) / kOuterRows<T>;
    first_run_[parts] = count_;
    for (int64_t v = vectors_.begin; v < vectors_.end; v += kVectorColumns<T>) {
      const int64_t v_end = smaller(v + kVectorColumns<T>, vectors_.end);
      for (int64_t s = scalars_.begin; s < scalars_.end; s += kScalarColumns<T>) {
        const int64_t s_end = smaller(s + kScalarColumns<T>, scalars_.end);
        OuterBlock<Sum<T>> out = out_;
        for (int64_t i = 0; i < parts; ++i, out.overwrites = false)
          outer_product<T>(runs_ + first_run_[i], first_run_[i + 1] - first_run_[i], v, v_end, s,
                           s_end, out);
      }
    }
  }

  /// The same, columns copied next to each other first, kDepth rows side by side.
  void multiply_packed() {
    constexpr int64_t kRows = kOuterRows<T> / kDepth<T>;
    T* const panels = workspace_;
    T* const scalars = workspace_ + room_ * kVectorColumns<T>;
    for (int64_t v = vectors_.begin; v < vectors_.end; v += kVectorColumns<T>) {
      const int64_t v_end = smaller(v + kVectorColumns<T>, vectors_.end);
      for (int64_t n = v; n < v_end; n += kPanel<T>)
        pack_columns(&Run<T>::vectors, {n, smaller(n + kPanel<T>, v_end)}, kPanel<T>,
                     panels + (n - v) * room_);
      for (int64_t s = scalars_.begin; s < scalars_.end; s += kScalarColumns<T>) {
        const int64_t s_end = smaller(s + kScalarColumns<T>, scalars_.end);
        const int64_t rows = pack_columns(&Run<T>::scalars, {s, s_end}, kScalarColumns<T>, scalars);
        for (int64_t n = v; n < v_end; n += kPanel<T>) {
          const Matrix<const T> panel = {panels + (n - v) * room_, kPanel<T> * kDepth<T>};
          const Matrix<const T> block = {scalars, kScalarColumns<T> * kDepth<T>};
          OuterBlock<Sum<T>> out = out_.at(n, s);
          for (int64_t row = 0; row < rows; row += kRows, out.overwrites = false) {
            const Run<T> part = {smaller(kRows, rows - row), from_row(panel, row),
                                 from_row(block, row)};
            outer_product<T>(&part, 1, 0, smaller(kPanel<T>, v_end - n), 0, s_end - s, out);
          }
        }
      }
    }
  }

  /// Packs columns of a factor into rows of `padded` columns; returns the number of packed rows. A
  /// missing one is zero.
  int64_t pack_columns(Matrix<const T> Run<T>::* factor, Columns columns, int64_t padded, T* out) {
    const int64_t width = columns.end - columns.begin, stride = padded * kDepth<T>;
    int64_t packed = 0;
    for (int64_t i = 0; i < count_; ++i) {
      const Matrix<const T> rows = runs_[i].*factor;
      const int64_t first = packed;
      packed += round_up_to_depth<T>(runs_[i].rows) / kDepth<T>;
      if (runs_[i].rows % kDepth<T> != 0)
        for (int64_t j = 0; j < width * kDepth<T>; ++j) out[(packed - 1) * stride + j] = T{};
      pack_rows<T>(rows.data + columns.begin, rows.row_stride, runs_[i].rows, width, padded,
                   out + first * stride);
    }
    return packed;
  }

  const bool along_k_;  // the vectors' columns are those of `a`, else of delta
  const Columns vectors_, scalars_;
  OuterBlock<Sum<T>> out_;  // from its first element; overwrites until something is written
  T* const workspace_;
  const int64_t room_;
  Run<T> runs_[kMostRuns];
  int64_t count_ = 0, rows_ = 0;
  int64_t first_run_[kOuterParts + 1];  // of each part, and the end
};

}  // namespace
