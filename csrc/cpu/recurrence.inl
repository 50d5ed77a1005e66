// SPDX-License-Identifier: Apache-2.0
//
// The only SIMD code: the recurrence of recurrence.h, written once over the compiler's generic
// vectors. Included by recurrence_{default,avx2,avx512}.cpp inside their own namespace and target
// region, with
//   FASTRNN_VECTOR_BYTES  the vector's width,
//   FASTRNN_TILE_ROWS     rows of the largest register tile,
//   FASTRNN_TILE_VECTORS  vectors per row of a tile, hence the width of a panel.
// Everything has internal linkage, so that nothing compiled for a
// wide instruction set can be picked by the linker for an older processor.

namespace {

#define FASTRNN_INLINE inline __attribute__((always_inline))

// ---------------------------------------------------------------------------------------------
// Vectors
// ---------------------------------------------------------------------------------------------

template <typename T>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float Vec __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));
  typedef int32_t Bits __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));
};
template <>
struct Lanes<double> {
  typedef double Vec __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));
  typedef int64_t Bits __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));
};

template <typename T>
using Vec = typename Lanes<T>::Vec;
template <typename T>
using Bits = typename Lanes<T>::Bits;

template <typename T>
constexpr int64_t kLanes = FASTRNN_VECTOR_BYTES / static_cast<int64_t>(sizeof(T));
template <typename T>
constexpr int64_t kPanel = FASTRNN_TILE_VECTORS * kLanes<T>;

template <typename T>
FASTRNN_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <typename T>
FASTRNN_INLINE void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

/// The first `count` lanes, the others zero. A loop and not a mask: it only runs at a row's tail.
template <typename T>
FASTRNN_INLINE Vec<T> load_tail(const T* p, int64_t count) {
  Vec<T> v = {};
  for (int64_t i = 0; i < count; ++i) v[i] = p[i];
  return v;
}

template <typename T>
FASTRNN_INLINE void store_tail(T* p, Vec<T> v, int64_t count) {
  T lanes[kLanes<T>];
  store<T>(lanes, v);
  for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}

// ---------------------------------------------------------------------------------------------
// Activations: value, and the derivative times a gradient, from the value alone
// ---------------------------------------------------------------------------------------------

/// exp(r) - 1 - r for |r| <= ln(2)/2, divided by r^2: the Taylor series, whose next term is below
/// a quarter ulp of the result.
FASTRNN_INLINE Vec<float> expm1_tail(Vec<float> r) {
  Vec<float> p = r * (1.0f / 5040) + (1.0f / 720);
  p = p * r + (1.0f / 120);
  p = p * r + (1.0f / 24);
  p = p * r + (1.0f / 6);
  return p * r + 0.5f;
}

FASTRNN_INLINE Vec<double> expm1_tail(Vec<double> r) {
  Vec<double> p = r * (1.0 / 6227020800.0) + (1.0 / 479001600.0);
  p = p * r + (1.0 / 39916800.0);
  p = p * r + (1.0 / 3628800.0);
  p = p * r + (1.0 / 362880.0);
  p = p * r + (1.0 / 40320.0);
  p = p * r + (1.0 / 5040.0);
  p = p * r + (1.0 / 720.0);
  p = p * r + (1.0 / 120.0);
  p = p * r + (1.0 / 24.0);
  p = p * r + (1.0 / 6.0);
  return p * r + 0.5;
}

/// Constants of the range reduction x = n ln(2) + r. `round` is 1.5 * 2^mantissa: adding it leaves
/// the nearest integer in the low bits. Beyond `saturation` tanh rounds to 1.
template <typename T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float saturation = 9.5f, round = 12582912.0f;
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr int mantissa = 23;
  static constexpr int32_t one = 0x3f800000;
};
template <>
struct ExpConstants<double> {
  static constexpr double saturation = 20.0, round = 6755399441055744.0;
  static constexpr double ln2_high = 6.93147180369123816490e-01;
  static constexpr double ln2_low = 1.90821492927058770002e-10;
  static constexpr int mantissa = 52;
  static constexpr int64_t one = 0x3ff0000000000000;
};

struct Tanh {
  /// tanh|x| = e / (e + 2) with e = exp(2|x|) - 1; keeps the sign of zero, passes NaN.
  template <typename T>
  static FASTRNN_INLINE Vec<T> value(Vec<T> x) {
    using C = ExpConstants<T>;
    const Bits<T> sign_bit = (Bits<T>)(-Vec<T>{});
    const Bits<T> sign = (Bits<T>)x & sign_bit;
    Vec<T> a = (Vec<T>)((Bits<T>)x & ~sign_bit);
    const Vec<T> limit = Vec<T>{} + C::saturation;
    a = a > limit ? limit : a;  // false for NaN, which stays
    a = a + a;
    const Vec<T> shifted = a * T(1.44269504088896340736) + C::round;
    const Vec<T> n = shifted - C::round;
    const Vec<T> r = (a - n * C::ln2_high) - n * C::ln2_low;
    const Vec<T> power = (Vec<T>)(((Bits<T>)shifted << C::mantissa) + C::one);  // 2^n
    // exp(a) - 1 = 2^n (exp(r) - 1) + (2^n - 1)
    const Vec<T> e = (expm1_tail(r) * (r * r) + r) * power + (power - T(1));
    return (Vec<T>)((Bits<T>)(e / (e + T(2))) | sign);
  }
  /// g (1 - h^2)
  template <typename T>
  static FASTRNN_INLINE Vec<T> gradient(Vec<T> h, Vec<T> g) {
    return g * (T(1) - h * h);
  }
};

struct Relu {
  template <typename T>
  static FASTRNN_INLINE Vec<T> value(Vec<T> x) {
    return x < T(0) ? Vec<T>{} : x;  // false for NaN, which stays
  }
  /// g where h > 0 (and where h is NaN), else 0
  template <typename T>
  static FASTRNN_INLINE Vec<T> gradient(Vec<T> h, Vec<T> g) {
    return h <= T(0) ? Vec<T>{} : g;
  }
};

// ---------------------------------------------------------------------------------------------
// One step
// ---------------------------------------------------------------------------------------------

/// out = f( bias + addend + addend2 + x * W_x + s * M ) for `rows` rows. In backward `h` is the
/// layer's output and the result is multiplied by f'(h) instead.
template <typename T>
struct Step {
  int64_t rows, N;  // N: columns of out
  int64_t I, K;     // columns of x and of s; 0 where there is no product
  Matrix<const T> x, s;
  const T *x_panels, *s_panels;
  Matrix<const T> w_x, w_s;  // [N, I] and [N, K] in place of panels
  const T* bias;
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

/// acc[r][v] += sum_k a[r][k] * panel[k][v]: the inner loop of everything.
template <typename T, int R, int V>
FASTRNN_INLINE void multiply(Vec<T> (&acc)[R][V], const T* a, int64_t row_stride, int64_t K,
                             const T* panel) {
  for (int64_t k = 0; k < K; ++k) {
    Vec<T> b[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) b[v] = load<T>(panel + v * kLanes<T>);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const T scalar = a[r * row_stride + k];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[r][v] += scalar * b[v];
    }
    panel += V * kLanes<T>;
  }
}

/// A single row has too few accumulators to hide the latency of the multiply-add: four independent
/// sums over k.
template <typename T, int V>
FASTRNN_INLINE void multiply_row(Vec<T> (&acc)[1][V], const T* a, int64_t K, const T* panel) {
  constexpr int kSums = 4;
  Vec<T> part[kSums][V] = {};
  int64_t k = 0;
  for (; k + kSums <= K; k += kSums) {
#pragma GCC unroll 8
    for (int j = 0; j < kSums; ++j) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) part[j][v] += a[k + j] * load<T>(panel + (j * V + v) * kLanes<T>);
    }
    panel += kSums * V * kLanes<T>;
  }
  multiply<T, 1, V>(acc, a + k, 0, K - k, panel);
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) acc[0][v] += (part[0][v] + part[1][v]) + (part[2][v] + part[3][v]);
}

template <typename T, int R, int V>
FASTRNN_INLINE void accumulate(Vec<T> (&acc)[R][V], Matrix<const T> a, int64_t K, int64_t row,
                               const T* panel) {
  const T* first = a.data + row * a.row_stride;
  if constexpr (R == 1) {
    if (K >= 4) return multiply_row<T, V>(acc, first, K, panel);
  }
  multiply<T, R, V>(acc, first, a.row_stride, K, panel);
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

/// One register tile: R rows by V vectors, columns from `column`. `tail` is the number of columns
/// in the last vector where that is not full, else 0: full-width stores are never masked, because
/// a masked store does not forward to the next step's loads.
template <typename T, typename Epilogue, int R, int V>
void tile(const Step<T>& s, int64_t row, int64_t column, int64_t tail) {
  Vec<T> acc[R][V] = {};
  if (s.bias != nullptr) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const Vec<T> b = load<T>(s.bias + column + v * kLanes<T>);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[r][v] = b;
    }
  }
  add_rows<T, R, V>(acc, s.addend, row, column, tail);
  add_rows<T, R, V>(acc, s.addend2, row, column, tail);
  // Panels before this one are full, so their total width is `column`.
  if (s.I != 0) accumulate<T, R, V>(acc, s.x, s.I, row, s.x_panels + column * s.I);
  if (s.K != 0) accumulate<T, R, V>(acc, s.s, s.K, row, s.s_panels + column * s.K);

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
      value = Epilogue::template apply<T>(acc[r][v], value);
      if (partial)
        store_tail<T>(out + v * kLanes<T>, value, tail);
      else
        store<T>(out + v * kLanes<T>, value);
    }
  }
}

/// The sum of a vector's lanes, by halves.
template <typename T, int Bytes>
struct Reduction {
  typedef T Whole __attribute__((vector_size(Bytes)));
  typedef T Half __attribute__((vector_size(Bytes / 2)));
  static FASTRNN_INLINE T sum(Whole v) {
    Half parts[2];
    __builtin_memcpy(parts, &v, Bytes);
    if constexpr (Bytes == 4 * sizeof(T))
      return (parts[0][0] + parts[1][0]) + (parts[0][1] + parts[1][1]);
    else if constexpr (Bytes == 2 * sizeof(T))
      return v[0] + v[1];
    else
      return Reduction<T, Bytes / 2>::sum(parts[0] + parts[1]);
  }
};

/// Rows of a weight that share each load of the vector they are multiplied with.
constexpr int kDotRows = 4;

/// acc[i] += a * w[i] over K columns, lane by lane, for kDotRows rows of w.
template <typename T>
FASTRNN_INLINE void dot_rows(Vec<T> (&acc)[kDotRows], const T* a, const T* const (&w)[kDotRows],
                             int64_t K) {
  const int64_t whole = K / kLanes<T> * kLanes<T>, tail = K - whole;
  for (int64_t k = 0; k < whole; k += kLanes<T>) {
    const Vec<T> b = load<T>(a + k);
#pragma GCC unroll 8
    for (int r = 0; r < kDotRows; ++r) acc[r] += b * load<T>(w[r] + k);
  }
  if (tail == 0) return;
  const Vec<T> b = load_tail<T>(a + whole, tail);
#pragma GCC unroll 8
  for (int r = 0; r < kDotRows; ++r) acc[r] += b * load_tail<T>(w[r] + whole, tail);
}

/// sums[i] = x w_x[i] + s w_s[i] for `count` rows i of the weights from `column` on, as they are:
/// for calls that have too few rows to pay for packing.
template <typename T>
FASTRNN_INLINE void dot_products(T* sums, const Step<T>& s, int64_t row, int64_t column,
                                 int64_t count) {
  for (int64_t i = 0; i < count; i += kDotRows) {
    Vec<T> acc[kDotRows] = {};
    const auto add = [&](Matrix<const T> a, Matrix<const T> w, int64_t K) {
      if (K == 0) return;
      const T* rows[kDotRows];
      // Past the last row the last one is read again, and its sum dropped.
      for (int r = 0; r < kDotRows; ++r)
        rows[r] = w.data + (column + (i + r < count ? i + r : count - 1)) * w.row_stride;
      dot_rows<T>(acc, a.data + row * a.row_stride, rows, K);
    };
    add(s.x, s.w_x, s.I);
    add(s.s, s.w_s, s.K);
    for (int r = 0; r < kDotRows && i + r < count; ++r)
      sums[i + r] = Reduction<T, FASTRNN_VECTOR_BYTES>::sum(acc[r]);
  }
}

/// One step, one vector of columns after another, with weights as they are.
template <typename T, typename Act>
void run_step_unpacked(const Step<T>& s, bool backwards) {
  const int64_t vectors = (s.N + kLanes<T> - 1) / kLanes<T>;
  for (int64_t i = 0; i < vectors; ++i) {
    const int64_t column = (backwards ? vectors - 1 - i : i) * kLanes<T>;
    const int64_t width = s.N - column < kLanes<T> ? s.N - column : kLanes<T>;
    const int64_t tail = width % kLanes<T>;
    for (int64_t row = 0; row < s.rows; ++row) {
      T sums[kLanes<T>] = {};
      dot_products<T>(sums, s, row, column, width);
      Vec<T> acc[1][1] = {{load<T>(sums)}};
      if (s.bias != nullptr) acc[0][0] += load<T>(s.bias + column);
      add_rows<T, 1, 1>(acc, s.addend, row, column, tail);
      const Vec<T> value = Act::template value<T>(acc[0][0]);
      T* out = s.out.data + row * s.out.row_stride + column;
      if (tail != 0)
        store_tail<T>(out, value, tail);
      else
        store<T>(out, value);
    }
  }
}

/// All rows of one panel, in tiles of 6 (or FASTRNN_TILE_ROWS), 4, 2 and 1 rows: the panel stays in
/// a near cache while the rows pass.
template <typename T, typename Epilogue, int V>
void panel_rows(const Step<T>& s, int64_t column, int64_t tail) {
  int64_t row = 0;
  for (; row + FASTRNN_TILE_ROWS <= s.rows; row += FASTRNN_TILE_ROWS)
    tile<T, Epilogue, FASTRNN_TILE_ROWS, V>(s, row, column, tail);
  for (; row + 4 <= s.rows; row += 4) tile<T, Epilogue, 4, V>(s, row, column, tail);
  for (; row + 2 <= s.rows; row += 2) tile<T, Epilogue, 2, V>(s, row, column, tail);
  if (row < s.rows) tile<T, Epilogue, 1, V>(s, row, column, tail);
}

/// One step, panel by panel. Odd steps walk the panels backwards: what the last step left in the
/// cache is used first.
template <typename T, typename Epilogue>
void run_step(const Step<T>& s, bool backwards) {
  const int64_t panels = (s.N + kPanel<T> - 1) / kPanel<T>;
  for (int64_t i = 0; i < panels; ++i) {
    const int64_t column = (backwards ? panels - 1 - i : i) * kPanel<T>;
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

// ---------------------------------------------------------------------------------------------
// The walk through time
// ---------------------------------------------------------------------------------------------

template <typename T>
FASTRNN_INLINE Matrix<T> rows_of(const Sequence<T>& s, const Steps& steps, int64_t t, int64_t row) {
  if (s.data == nullptr) return {};
  const int64_t start = steps.first_row ? steps.first_row[t] * s.row_stride : t * s.step_stride;
  return {s.data + start + row * s.row_stride, s.row_stride};
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
    const int64_t rows = steps.rows(t) < row_end ? steps.rows(t) : row_end;
    int64_t going_on = previous_rows < rows ? previous_rows : rows;
    if (going_on < row_begin) going_on = row_begin;
    if (row_begin < going_on) {
      const int64_t before = steps.descending ? t + 1 : t - 1;
      body(t, row_begin, going_on,
           i == 0 ? from_row(carry, row_begin)
                  : Matrix<const T>(read_only(rows_of(state, steps, before, row_begin))));
    }
    if (going_on < rows) body(t, going_on, rows, Matrix<const T>{});
    previous_rows = steps.rows(t);
  }
}

template <typename T, typename Act>
void forward_loop(const ForwardArgs<T>& a) {
  const bool fused = a.x.data != nullptr;
  walk<T>(a.steps, a.row_begin, a.row_end, a.carry, a.y,
          [&](int64_t t, int64_t first, int64_t last, Matrix<const T> previous) {
            Step<T> s = {};
            s.rows = last - first;
            s.N = a.H;
            s.out = rows_of(a.y, a.steps, t, first);
            if (fused) {
              s.I = a.I;
              s.x = rows_of(a.x, a.steps, t, first);
              s.x_panels = a.w_ih_panels;
              s.w_x = a.w_ih;
              s.bias = a.bias;
            } else {
              s.addend = read_only(s.out);
            }
            s.s = previous.data ? previous : from_row(a.hx, first);
            s.K = s.s.data ? a.H : 0;
            s.s_panels = a.w_hh_panels;
            s.w_s = a.w_hh;
            if (a.w_hh_panels != nullptr)
              run_step<T, ForwardEpilogue<Act>>(s, t & 1);
            else
              run_step_unpacked<T, Act>(s, t & 1);
          });
}

template <typename T, typename Act>
void backward_loop(const BackwardArgs<T>& a) {
  walk<T>(a.steps, a.row_begin, a.row_end, a.carry, a.delta,
          [&](int64_t t, int64_t first, int64_t last, Matrix<const T> previous) {
            Step<T> s = {};
            s.rows = last - first;
            s.N = a.H;
            s.addend = rows_of(a.grad_y, a.steps, t, first);
            if (previous.data != nullptr) {
              s.s = previous;
              s.K = a.H;
              s.s_panels = a.w_hh_panels;
            } else {
              s.addend2 = from_row(a.grad_h_n, first);
            }
            s.h = rows_of(a.y, a.steps, t, first);
            s.out = rows_of(a.delta, a.steps, t, first);
            run_step<T, BackwardEpilogue<Act>>(s, t & 1);
          });
}

// ---------------------------------------------------------------------------------------------
// Weight gradients
// ---------------------------------------------------------------------------------------------

/// Columns of `a` in one tile of the outer product.
constexpr int kOuterColumns = FASTRNN_TILE_ROWS;
/// Rows that are multiplied before the next tile: their deltas stay in the second-level cache.
constexpr int64_t kOuterRows = 512;

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
  for (int r = 0; r < R; ++r) {
    T sums[V * kLanes<T>];
    for (int v = 0; v < V; ++v) store<T>(sums + v * kLanes<T>, acc[r][v]);
    for (int64_t n = 0; n < width; ++n) out[n * ld + r] += sums[n];
  }
}

template <typename T, int V>
void outer_columns(int64_t rows, Matrix<const T> delta, int64_t tail, Matrix<const T> a,
                   int64_t columns, T* out, int64_t ld) {
  int64_t k = 0;
  const auto at = [&](int64_t column) { return Matrix<const T>{a.data + column, a.row_stride}; };
  for (; k + kOuterColumns <= columns; k += kOuterColumns)
    outer_tile<T, kOuterColumns, V>(rows, delta, tail, at(k), out + k, ld);
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

template <typename T>
void add_rows_to(int64_t rows, Matrix<const T> delta, int64_t N, T* sum) {
  for (int64_t row = 0; row < rows; ++row) {
    const T* d = delta.data + row * delta.row_stride;
    for (int64_t n = 0; n < N; ++n) sum[n] += d[n];
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
    add_rows_to<T>(rows, delta_at(steps.begin, 0), a.H, a.grad_b);

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

// ---------------------------------------------------------------------------------------------
// The table's entries
// ---------------------------------------------------------------------------------------------

template <typename T>
int64_t padded_columns(int64_t N) {
  return (N + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

template <typename T>
int64_t packed_size(int64_t K, int64_t N) {
  return K * padded_columns<T>(N);
}

template <typename T>
void pack(const T* source, int64_t k_stride, int64_t n_stride, int64_t K, int64_t N, T* panels) {
  for (int64_t column = 0; column < N; column += kPanel<T>) {
    const int64_t width = N - column < kPanel<T> ? N - column : kPanel<T>;
    const int64_t padded = padded_columns<T>(width);
    // Few k at a time: both the rows read and the lines written then stay in the nearest cache.
    for (int64_t k0 = 0; k0 < K; k0 += 16) {
      const int64_t k1 = k0 + 16 < K ? k0 + 16 : K;
      for (int64_t n = 0; n < padded; ++n) {
        const T* from = source + (column + n) * n_stride;
        for (int64_t k = k0; k < k1; ++k)
          panels[k * padded + n] = n < width ? from[k * k_stride] : T(0);
      }
    }
    panels += K * padded;
  }
}

template <typename T>
void forward(const ForwardArgs<T>& a) {
  if (a.activation == Activation::kTanh)
    forward_loop<T, Tanh>(a);
  else
    forward_loop<T, Relu>(a);
}

template <typename T>
void backward(const BackwardArgs<T>& a) {
  if (a.activation == Activation::kTanh)
    backward_loop<T, Tanh>(a);
  else
    backward_loop<T, Relu>(a);
}

template <typename T>
constexpr Kernels<T> kKernels = {packed_size<T>, padded_columns<T>, pack<T>,
                                 forward<T>,     backward<T>,       weight_gradients<T>};

}  // namespace
