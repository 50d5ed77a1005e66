// SPDX-License-Identifier: Apache-2.0
//
// Weight gradients by an outer product of our own, for small layers. Part of recurrence.inl.

namespace {

/// Columns of `a` in one tile of the outer product.
constexpr int kOuterColumns = FASTRNN_TILE_ROWS;
/// Rows that are multiplied before the next tile: their deltas stay in a near cache, and sums are
/// sums of such parts.
template <typename T>
constexpr int64_t kOuterRows = 128 * kDepth<T>;
/// Rows in a part of the bias's gradient, all of whose terms may have one sign.
constexpr int64_t kSumRows = 32;

/// out[n][r] += sums[r][n] for n < width; out: [.., ld]. Never inlined: the compiler would take
/// single elements from the accumulators, and for that keep these in memory all the time.
template <typename T, int R, int64_t N>
__attribute__((noinline)) void add_transposed(const T (&sums)[R][N], int64_t width, T* out,
                                              int64_t ld) {
  for (int64_t n = 0; n < width; ++n) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) out[n * ld + r] += sums[r][n];
  }
}

/// Rows of delta and of what they are multiplied with, each at one distance from the next. Where
/// kDepth of them are multiplied at once, `rows` counts packed ones: kDepth rows side by side.
template <typename T>
struct Run {
  int64_t rows;
  const T* delta;  // [rows, N]
  const T* a;      // [rows, K]
  int64_t delta_stride, a_stride;
};

/// A vector of delta's columns, of `tail` in a last one that is not full. Packed ones are full.
template <typename T>
FASTRNN_INLINE Weights<T> load_columns(const T* p, int64_t tail) {
  if constexpr (kDepth<T> == 1) {
    if (tail != 0) return load_tail<T>(p, tail);
  }
  return load_weights(p);
}

/// out[n][k] += sum_row delta[row][n] * a[row][k] for R columns k of `a`, from k_begin, and V
/// vectors of n, from n_begin. out: [.., ld], at its element (n_begin, k_begin). The tile is kept
/// transposed, so that the vectors run along n whatever the number of columns of `a`.
template <typename T, int R, int V>
void outer_tile(const Run<T>* runs, int64_t count, int64_t n_begin, int64_t tail, int64_t k_begin,
                Sum<T>* out, int64_t ld) {
  Vec<T> acc[R][V] = {};
  for (int64_t i = 0; i < count; ++i) {
    const Run<T>& run = runs[i];
    const T* d = run.delta + n_begin * kDepth<T>;
    const T* columns = run.a + k_begin * kDepth<T>;
    for (int64_t row = 0; row < run.rows; ++row) {
      Weights<T> b[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) b[v] = load_columns(d + v * kWeights<T>, v == V - 1 ? tail : 0);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const auto terms = load_terms(columns + r * kDepth<T>);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) add_terms<T>(acc[r][v], terms, b[v]);
      }
      d += run.delta_stride;
      columns += run.a_stride;
    }
  }
  const int64_t width = tail != 0 ? (V - 1) * kLanes<T> + tail : V * kLanes<T>;
  Sum<T> sums[R][V * kLanes<T>];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store<Sum<T>>(sums[r] + v * kLanes<T>, acc[r][v]);
  }
  add_transposed(sums, width, out, ld);
}

/// out: [.., ld], at its element (n, 0).
template <typename T, int V>
void outer_columns(const Run<T>* runs, int64_t count, int64_t n, int64_t tail, int64_t k,
                   int64_t k_end, Sum<T>* out, int64_t ld) {
  for (; k + kOuterColumns <= k_end; k += kOuterColumns)
    outer_tile<T, kOuterColumns, V>(runs, count, n, tail, k, out + k, ld);
  for (; k + 4 <= k_end; k += 4) outer_tile<T, 4, V>(runs, count, n, tail, k, out + k, ld);
  for (; k + 2 <= k_end; k += 2) outer_tile<T, 2, V>(runs, count, n, tail, k, out + k, ld);
  if (k < k_end) outer_tile<T, 1, V>(runs, count, n, tail, k, out + k, ld);
}

/// out[n][k] += sum_row delta[row][n] * a[row][k] for n < N and k in [k_begin, k_end); out [N, ld].
template <typename T>
void outer_product(const Run<T>* runs, int64_t count, int64_t N, int64_t k_begin, int64_t k_end,
                   Sum<T>* out, int64_t ld) {
  for (int64_t n = 0; n < N; n += kPanel<T>) {
    const int64_t width = N - n < kPanel<T> ? N - n : kPanel<T>;
    const int64_t tail = width % kLanes<T>;
    Sum<T>* rows = out + n * ld;
    switch ((width + kLanes<T> - 1) / kLanes<T>) {
      case 1:
        outer_columns<T, 1>(runs, count, n, tail, k_begin, k_end, rows, ld);
        break;
#if FASTRNN_TILE_VECTORS > 2
      case 2:
        outer_columns<T, 2>(runs, count, n, tail, k_begin, k_end, rows, ld);
        break;
      case 3:
        outer_columns<T, 3>(runs, count, n, tail, k_begin, k_end, rows, ld);
        break;
#endif
      default:
        outer_columns<T, FASTRNN_TILE_VECTORS>(runs, count, n, tail, k_begin, k_end, rows, ld);
    }
  }
}

/// out[n][k] += sum_row delta[row][n] * a[row][k] for n < N and k in [k_begin, k_end); out [N, ld].
/// Rows are collected until there are enough for a tile.
template <typename T>
class OuterProduct {
 public:
  OuterProduct(int64_t N, int64_t k_begin, int64_t k_end, Sum<T>* out, int64_t ld)
      : N_(N), k_begin_(k_begin), k_end_(k_end), out_(out), ld_(ld) {}

  FASTRNN_INLINE void add(int64_t rows, Matrix<const T> delta, Matrix<const T> a) {
    while (rows > 0) {
      const int64_t room = kOuterRows<T> - rows_, count = rows < room ? rows : room;
      append(count, delta, a);
      if (rows_ == kOuterRows<T>) finish();
      delta = from_row(delta, count);
      a = from_row(a, count);
      rows -= count;
    }
  }

  /// Multiplies what has been collected.
  __attribute__((noinline)) void finish() {
    if (count_ == 0) return;
    if constexpr (kDepth<T> == 1)
      outer_product<T>(runs_, count_, N_, k_begin_, k_end_, out_, ld_);
    else
      multiply_packed();
    count_ = rows_ = 0;
  }

 private:
  /// Rows that follow the last ones, or come just before them, lengthen their run.
  FASTRNN_INLINE void append(int64_t rows, Matrix<const T> delta, Matrix<const T> a) {
    const Run<T> run = {rows, delta.data, a.data, delta.row_stride, a.row_stride};
    rows_ += round_up_to_depth<T>(rows);
    if (count_ > 0) {
      Run<T>& last = runs_[count_ - 1];
      const int64_t together = last.rows + rows;
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
    return next.delta == run.delta + run.rows * run.delta_stride &&
           next.a == run.a + run.rows * run.a_stride && next.a_stride == run.a_stride;
  }

  /// By blocks of columns, of which kDepth rows at a time are laid side by side first.
  void multiply_packed() {
    constexpr int64_t kColumns = 2 * kPanel<T>, kStride = kColumns * kDepth<T>;
    constexpr int64_t kStep = kLanes<T> * kOuterColumns;  // whole vectors, and whole tiles
    T delta[kOuterRows<T> * kColumns], a[kOuterRows<T> * kStep];
    for (int64_t n = 0; n < N_; n += kColumns) {
      const int64_t width = N_ - n < kColumns ? N_ - n : kColumns;
      int64_t rows = 0;
      for (int64_t i = 0; i < count_; ++i)
        rows += pack_run(runs_[i].delta + n, runs_[i].delta_stride, runs_[i].rows, width,
                         delta + rows * kStride, kColumns);
      for (int64_t k = k_begin_; k < k_end_; k += kStep) {
        const int64_t columns = k_end_ - k < kStep ? k_end_ - k : kStep;
        rows = 0;
        for (int64_t i = 0; i < count_; ++i)
          rows += pack_run(runs_[i].a + k, runs_[i].a_stride, runs_[i].rows, columns,
                           a + rows * kStep * kDepth<T>, kStep);
        const Run<T> packed = {rows, delta, a, kStride, kStep * kDepth<T>};
        outer_product<T>(&packed, 1, width, 0, columns, out_ + n * ld_ + k, ld_);
      }
    }
  }

  /// Returns the number of packed rows. A missing one is zero.
  static int64_t pack_run(const T* source, int64_t stride, int64_t rows, int64_t width, T* out,
                          int64_t padded) {
    const int64_t packed = round_up_to_depth<T>(rows) / kDepth<T>;
    if (rows % kDepth<T> != 0) {
      for (int64_t i = 0; i < width * kDepth<T>; ++i)
        out[(packed - 1) * padded * kDepth<T> + i] = T{};
    }
    pack_rows<T>(source, stride, rows, width, padded, out);
    return packed;
  }

  const int64_t N_, k_begin_, k_end_;
  Sum<T>* const out_;
  const int64_t ld_;
  Run<T> runs_[kOuterRows<T>];
  int64_t count_ = 0, rows_ = 0;
};

/// sum[n] += sum_row delta[row][n], by parts of kSumRows rows. The parts are added with what each
/// addition loses carried to the next (Kahan), since there may be thousands of them.
template <typename T>
void sum_rows(int64_t rows, Matrix<const T> delta, int64_t N, Sum<T>* sum) {
  for (int64_t n = 0; n < N; n += kLanes<T>) {
    const int64_t tail = N - n < kLanes<T> ? N - n : 0;
    Vec<T> total = tail != 0 ? load_tail<Sum<T>>(sum + n, tail) : load<Sum<T>>(sum + n), lost = {};
    for (int64_t begin = 0; begin < rows; begin += kSumRows) {
      const int64_t end = rows - begin < kSumRows ? rows : begin + kSumRows;
      Vec<T> part = {};
      for (int64_t row = begin; row < end; ++row) {
        const T* d = delta.data + row * delta.row_stride + n;
        part += tail != 0 ? load_tail<T>(d, tail) : load<T>(d);
      }
      const Vec<T> term = part - lost, next = total + term;
      lost = (next - total) - term;
      total = next;
    }
    if (tail != 0)
      store_tail<Sum<T>>(sum + n, total, tail);
    else
      store<Sum<T>>(sum + n, total);
  }
}

template <typename T>
void weight_gradients(const WeightGradientArgs<T>& a) {
  const auto share = [&](int64_t columns, int64_t part) { return columns * part / a.parts; };
  const auto product = [&](Sum<T>* out, int64_t columns) {
    return OuterProduct<T>(a.H, share(columns, a.part), share(columns, a.part + 1), out, columns);
  };
  const Steps& steps = a.steps;
  const int64_t* first_row = a.delta.first_row;
  const int64_t rows = first_row ? first_row[steps.end] - first_row[steps.begin]
                                 : (steps.end - steps.begin) * steps.batch;
  if (a.grad_b != nullptr && a.part == 0)
    sum_rows<T>(rows, rows_of(a.delta, steps.begin, 0), a.H, a.grad_b);

  OuterProduct<T> of_input = product(a.grad_w_ih, a.I), of_state = product(a.grad_w_hh, a.H);
  const int64_t first = steps.descending ? steps.end - 1 : steps.begin;
  const Matrix<const T> carry = steps.carry_rows == 0
                                    ? Matrix<const T>{}
                                    : rows_of(a.y, steps.descending ? first + 1 : first - 1, 0);
  walk<T>(steps, 0, steps.batch, carry, a.y,
          [&](int64_t t, int64_t begin, int64_t end, Matrix<const T> previous) {
            const Matrix<const T> delta = rows_of(a.delta, t, begin);
            if (a.grad_w_ih != nullptr) of_input.add(end - begin, delta, rows_of(a.x, t, begin));
            if (previous.data == nullptr) previous = from_row(a.hx, begin);
            if (a.grad_w_hh != nullptr && previous.data != nullptr)
              of_state.add(end - begin, delta, previous);
          });
  of_input.finish();
  of_state.finish();
}

}  // namespace
