// SPDX-License-Identifier: Apache-2.0
//
// Weight gradients by an outer product of our own, for small layers. Part of recurrence.inl.

namespace {

/// Columns of `a` in one tile of the outer product.
constexpr int kOuterColumns = FASTRNN_TILE_ROWS;
/// Rows that are multiplied before the next tile: their deltas stay in a near cache, and sums are
/// sums of such parts.
constexpr int64_t kOuterRows = 128;
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

/// out[n][k] += sum_row delta[row][n] * a[row][k] for R columns k of `a` and V vectors of n.
/// out: [.., ld], at its element (n, k). The tile is kept transposed, so that the vectors run along
/// n whatever the number of columns of `a`.
template <typename T, int R, int V>
void outer_tile(int64_t rows, Matrix<const T> delta, int64_t tail, Matrix<const T> a, T* out,
                int64_t ld) {
  Vec<T> acc[R][V] = {};
  for (int64_t row = 0; row < rows; ++row) {
    const T* d = delta.data + row * delta.row_stride;
    const T* columns = a.data + row * a.row_stride;
    Vec<T> b[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const bool partial = v == V - 1 && tail != 0;
      b[v] = partial ? load_tail<T>(d + v * kLanes<T>, tail) : load<T>(d + v * kLanes<T>);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[r][v] += columns[r] * b[v];
    }
  }
  const int64_t width = tail != 0 ? (V - 1) * kLanes<T> + tail : V * kLanes<T>;
  T sums[R][V * kLanes<T>];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store<T>(sums[r] + v * kLanes<T>, acc[r][v]);
  }
  add_transposed(sums, width, out, ld);
}

template <typename T, int V>
void outer_columns(int64_t rows, Matrix<const T> delta, int64_t tail, Matrix<const T> a,
                   int64_t columns, T* out, int64_t ld) {
  int64_t k = 0;
  const auto at = [&](int64_t column) { return Matrix<const T>{a.data + column, a.row_stride}; };
  for (; k + kOuterColumns <= columns; k += kOuterColumns)
    outer_tile<T, kOuterColumns, V>(rows, delta, tail, at(k), out + k, ld);
  for (; k + 4 <= columns; k += 4) outer_tile<T, 4, V>(rows, delta, tail, at(k), out + k, ld);
  for (; k + 2 <= columns; k += 2) outer_tile<T, 2, V>(rows, delta, tail, at(k), out + k, ld);
  if (k < columns) outer_tile<T, 1, V>(rows, delta, tail, at(k), out + k, ld);
}

/// out[n][k] += sum_row delta[row][n] * a[row][k] for n < N and k in [k_begin, k_end); out [N, ld].
template <typename T>
void outer_product(int64_t rows, Matrix<const T> delta, int64_t N, Matrix<const T> a,
                   int64_t k_begin, int64_t k_end, T* out, int64_t ld) {
  for (int64_t row = 0; row < rows; row += kOuterRows) {
    const int64_t count = rows - row < kOuterRows ? rows - row : kOuterRows;
    const Matrix<const T> block = from_row(a, row);
    const Matrix<const T> columns = {block.data + k_begin, block.row_stride};
    for (int64_t n = 0; n < N; n += kPanel<T>) {
      const int64_t width = N - n < kPanel<T> ? N - n : kPanel<T>;
      Matrix<const T> d = from_row(delta, row);
      d.data += n;
      T* target = out + n * ld + k_begin;
      const int64_t tail = width % kLanes<T>;
      switch ((width + kLanes<T> - 1) / kLanes<T>) {
        case 1:
          outer_columns<T, 1>(count, d, tail, columns, k_end - k_begin, target, ld);
          break;
#if FASTRNN_TILE_VECTORS > 2
        case 2:
          outer_columns<T, 2>(count, d, tail, columns, k_end - k_begin, target, ld);
          break;
        case 3:
          outer_columns<T, 3>(count, d, tail, columns, k_end - k_begin, target, ld);
          break;
#endif
        default:
          outer_columns<T, FASTRNN_TILE_VECTORS>(count, d, tail, columns, k_end - k_begin, target,
                                                 ld);
      }
    }
  }
}

/// sum[n] += sum_row delta[row][n], by parts of kSumRows rows. The parts are added with what each
/// addition loses carried to the next (Kahan), since there may be thousands of them.
template <typename T>
void sum_rows(int64_t rows, Matrix<const T> delta, int64_t N, T* sum) {
  for (int64_t n = 0; n < N; n += kLanes<T>) {
    const int64_t tail = N - n < kLanes<T> ? N - n : 0;
    Vec<T> total = tail != 0 ? load_tail<T>(sum + n, tail) : load<T>(sum + n), lost = {};
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
      store_tail<T>(sum + n, total, tail);
    else
      store<T>(sum + n, total);
  }
}

/// Whether the rows of all steps lie at one distance from each other.
template <typename T>
FASTRNN_INLINE bool is_uniform(const Sequence<T>& s, const Steps& steps) {
  return steps.first_row != nullptr || s.step_stride == steps.batch * s.row_stride;
}

template <typename T>
void weight_gradients(const WeightGradientArgs<T>& a) {
  const int64_t x_begin = a.I * a.part / a.parts, x_end = a.I * (a.part + 1) / a.parts;
  const int64_t h_begin = a.H * a.part / a.parts, h_end = a.H * (a.part + 1) / a.parts;
  const Steps& steps = a.steps;
  const auto delta_at = [&](int64_t t, int64_t row) { return rows_of(a.delta, steps, t, row); };
  const auto product = [&](T* out, int64_t rows, Matrix<const T> delta, Matrix<const T> m,
                           int64_t begin, int64_t end, int64_t ld) {
    outer_product<T>(rows, delta, a.H, m, begin, end, out, ld);
  };
  // Delta is contiguous: the rows of all steps follow one another.
  const int64_t rows = steps.first_row ? steps.first_row[steps.end] - steps.first_row[steps.begin]
                                       : (steps.end - steps.begin) * steps.batch;
  if (a.grad_b != nullptr && a.part == 0)
    sum_rows<T>(rows, delta_at(steps.begin, 0), a.H, a.grad_b);

  if (a.grad_w_ih != nullptr) {
    if (is_uniform(a.x, steps)) {
      product(a.grad_w_ih, rows, delta_at(steps.begin, 0), rows_of(a.x, steps, steps.begin, 0),
              x_begin, x_end, a.I);
    } else {
      for (int64_t t = steps.begin; t < steps.end; ++t)
        product(a.grad_w_ih, steps.batch, delta_at(t, 0), rows_of(a.x, steps, t, 0), x_begin, x_end,
                a.I);
    }
  }
  if (a.grad_w_hh == nullptr) return;
  if (steps.first_row == nullptr && is_uniform(a.y, steps)) {
    // All steps but the sequence's first at once: delta_t with the output one step before.
    const int64_t first = steps.descending ? steps.end - 1 : steps.begin;
    const bool starts = steps.carry_rows == 0;
    const int64_t from = starts && !steps.descending ? steps.begin + 1 : steps.begin;
    const int64_t to = starts && steps.descending ? steps.end - 1 : steps.end;
    if (from < to)
      product(a.grad_w_hh, (to - from) * steps.batch, delta_at(from, 0),
              rows_of(a.y, steps, steps.descending ? from + 1 : from - 1, 0), h_begin, h_end, a.H);
    if (starts && a.hx.data != nullptr)
      product(a.grad_w_hh, steps.batch, delta_at(first, 0), a.hx, h_begin, h_end, a.H);
    return;
  }
  const int64_t first = steps.descending ? steps.end - 1 : steps.begin;
  const Matrix<const T> carry =
      steps.carry_rows == 0 ? Matrix<const T>{}
                            : rows_of(a.y, steps, steps.descending ? first + 1 : first - 1, 0);
  walk<T>(steps, 0, steps.first_row ? rows : steps.batch, carry, a.y,
          [&](int64_t t, int64_t begin, int64_t end, Matrix<const T> previous) {
            if (previous.data == nullptr) previous = from_row(a.hx, begin);
            if (previous.data == nullptr) return;
            product(a.grad_w_hh, end - begin, delta_at(t, begin), previous, h_begin, h_end, a.H);
          });
}

}  // namespace
