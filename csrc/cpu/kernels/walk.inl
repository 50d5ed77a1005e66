// SPDX-License-Identifier: Apache-2.0
//
// The walk through time, for padded and packed rows, upwards and downwards. Part of recurrence.inl.

namespace {

template <typename T>
FASTRNN_INLINE Matrix<T> rows_of(const Sequence<T>& s, int64_t t, int64_t row) {
  if (s.data == nullptr) return {};
  return {s.row(t, row), s.row_stride};
}

template <typename T>
FASTRNN_INLINE Matrix<const T> read_only(Matrix<T> m) {
  return {m.data, m.row_stride};
}

/// Calls body(t, first row, last row, previous state) for every step, in order, with the rows that
/// go on (previous state: of the step before, or the carry) apart from those that begin here
/// (previous state absent).
template <typename T, typename State, typename Body>
FASTRNN_INLINE void walk(const Steps& steps, int64_t row_begin, int64_t row_end,
                         Matrix<const T> carry, const Sequence<State>& state, Body body) {
  const int64_t count = steps.end - steps.begin;
  int64_t previous_rows = steps.carry_rows;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t t = steps.descending ? steps.end - 1 - i : steps.begin + i;
    const int64_t rows = smaller(steps.rows(t), row_end);
    int64_t going_on = smaller(previous_rows, rows);
    if (going_on < row_begin) going_on = row_begin;
    if (row_begin < going_on) {
      const int64_t before = steps.descending ? t + 1 : t - 1;
      body(t, row_begin, going_on,
           i == 0 ? from_row(carry, row_begin)
                  : Matrix<const T>(read_only(rows_of(state, before, row_begin))));
    }
    if (going_on < rows) body(t, going_on, rows, Matrix<const T>{});
    previous_rows = steps.rows(t);
  }
}

}  // namespace
