// SPDX-License-Identifier: Apache-2.0
//
// Gradients of one layer's weights and biases. Part of recurrence.inl.

namespace {

/// Rows in a part of the bias's gradient, all of whose terms may have one sign.
constexpr int64_t kSumRows = 32;

/// sum[n] += sum_row delta[row][n] for the columns n, by parts of kSumRows rows. The parts are
/// added with what each addition loses carried to the next, in lost[n] (Kahan), since there may be
/// thousands of them; infinite sums lose nothing.
template <typename T>
void sum_rows(int64_t rows, Matrix<const T> delta, Columns columns, Sum<T>* sum, Sum<T>* lost) {
  for (int64_t n = columns.begin; n < columns.end; n += kLanes<T>) {
    const int64_t tail = columns.end - n < kLanes<T> ? columns.end - n : 0;
    const auto load_sum = [&](const Sum<T>* p) __attribute__((always_inline)) {
      return tail != 0 ? load_tail<Sum<T>>(p, tail) : load<Sum<T>>(p);
    };
    const auto store_sum = [&](Sum<T>* p, Vec<T> v) __attribute__((always_inline)) {
      return tail != 0 ? store_tail<Sum<T>>(p, v, tail) : store<Sum<T>>(p, v);
    };
    Vec<T> total = load_sum(sum + n), loss = load_sum(lost + n);
    for (int64_t begin = 0; begin < rows; begin += kSumRows) {
      const int64_t end = smaller(begin + kSumRows, rows);
      Vec<T> part = {};
      for (int64_t row = begin; row < end; ++row) {
        const T* d = delta.data + row * delta.row_stride + n;
        part += tail != 0 ? load_tail<T>(d, tail) : load<T>(d);
      }
      const Vec<T> term = part - loss, next = total + term, lost_now = (next - total) - term;
      loss = lost_now - lost_now == 0 ? lost_now : Vec<T>{};
      total = next;
    }
    store_sum(sum + n, total);
    store_sum(lost + n, loss);
  }
}

/// This part's share of out [H, K]: rows of it, so that what threads write is apart in memory. Of
/// long rows, parts too, and where there are more threads than vectors in H.
template <typename T>
OuterProduct<T> product_of_part(const WeightGradientArgs<T>& a, Sum<T>* out, int64_t K) {
  int64_t across = smaller(K / kVectorColumns<T>, a.parts);
  if (across < 1) across = 1;
  while (a.parts % across != 0) --across;
  while (a.parts / across > (a.H + kLanes<T> - 1) / kLanes<T> && 2 * across * kPanel<T> <= K &&
         a.parts % (2 * across) == 0)
    across *= 2;
  return OuterProduct<T>(columns_of_part<T>(a.H, a.part / across, a.parts / across),
                         columns_of_part<T>(K, a.part % across, across), out, K, a.overwrites,
                         a.workspace, a.packed_rows);
}

template <typename T>
void weight_gradients(const WeightGradientArgs<T>& a) {
  OuterProduct<T> of_input = product_of_part(a, a.grad_w_ih, a.I);
  OuterProduct<T> of_state = product_of_part(a, a.grad_w_hh, a.H);
  const Columns columns = columns_of_part<T>(a.H, a.part, a.parts);
  const Steps& steps = a.steps;
  const int64_t rows = a.row_end - a.row_begin, count = steps.end - steps.begin;
  const auto is_matrix = [&](const Sequence<const T>& s) {
    return s.data == nullptr || (!s.first_row && s.step_stride == rows * s.row_stride);
  };
  const bool sums_once = is_matrix(a.delta);
  if (a.grad_b != nullptr && sums_once)
    sum_rows<T>(count * rows, rows_of(a.delta, steps.begin, a.row_begin), columns, a.grad_b,
                a.grad_b + a.H);
  const auto add = [&](int64_t number, int64_t t, int64_t row, Matrix<const T> previous) {
    const Matrix<const T> delta = rows_of(a.delta, t, row);
    if (a.grad_b != nullptr && !sums_once)
      sum_rows<T>(number, delta, columns, a.grad_b, a.grad_b + a.H);
    if (a.grad_w_ih != nullptr) of_input.add(number, delta, rows_of(a.x, t, row));
    if (previous.data == nullptr) previous = from_row(a.hx, row);
    if (a.grad_w_hh != nullptr && previous.data != nullptr) of_state.add(number, delta, previous);
  };
  const int64_t first = steps.descending ? steps.end - 1 : steps.begin;
  const int64_t before = steps.descending ? 1 : -1;  // from a step to the one before it
  if (sums_once && is_matrix(a.x) && is_matrix(a.y)) {
    const bool starts = steps.carry_rows == 0;  // the first step has no previous output
    if (starts) add(rows, first, a.row_begin, {});
    const int64_t t = starts && !steps.descending ? steps.begin + 1 : steps.begin;
    if (count > starts)
      add((count - starts) * rows, t, a.row_begin, rows_of(a.y, t + before, a.row_begin));
  } else {
    const Matrix<const T> carry =
        steps.carry_rows == 0 ? Matrix<const T>{} : rows_of(a.y, first + before, 0);
    walk<T>(steps, a.row_begin, a.row_end, carry, a.y,
            [&](int64_t t, int64_t begin, int64_t end, Matrix<const T> previous) {
              add(end - begin, t, begin, previous);
            });
  }
  if (a.grad_w_ih != nullptr) of_input.finish();
  if (a.grad_w_hh != nullptr) of_state.finish();
}

}  // namespace
