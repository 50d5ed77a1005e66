// SPDX-License-Identifier: Apache-2.0
//
// tanh and relu: the value, and the derivative times a gradient, from the value alone. Part of
// recurrence.inl.

namespace {

/// The coefficient of s^(k-2) in the Taylor series of expm1_tail, and its rounding to T.
template <typename T>
constexpr T expm1_coefficient(int k) {
  double coefficient = 0.5;
  for (int i = 1; i <= k; ++i) coefficient *= 2.0 / i;
  return static_cast<T>(coefficient);
}

/// (exp(2s) - 1 - 2s) / (2s^2) for |s| <= ln(2)/4, from s and its square: the Taylor series, whose
/// next term is below a quarter ulp of the result. Terms in pairs, for a short chain.
FASTRNN_INLINE Vec<float> expm1_tail(Vec<float> s, Vec<float> square) {
  constexpr auto c = expm1_coefficient<float>;
  const Vec<float> p2 = s * c(3) + c(2), p4 = s * c(5) + c(4), p6 = s * c(7) + c(6);
  return (p6 * square + p4) * square + p2;
}

FASTRNN_INLINE Vec<double> expm1_tail(Vec<double> s, Vec<double> square) {
  constexpr auto c = expm1_coefficient<double>;
  const Vec<double> p2 = s * c(3) + c(2), p4 = s * c(5) + c(4), p6 = s * c(7) + c(6),
                    p8 = s * c(9) + c(8), p10 = s * c(11) + c(10), p12 = s * c(13) + c(12);
  const Vec<double> p6_to_8 = p8 * square + p6, p10_to_12 = p12 * square + p10;
  return ((p10_to_12 * (square * square) + p6_to_8) * square + p4) * square + p2;
}

/// a - n ln(2)/2. In float one constant is near enough for |n| < 32.
FASTRNN_INLINE Vec<float> reduce(Vec<float> a, Vec<float> n) {
  return a - n * 0.34657359027997265f;
}
FASTRNN_INLINE Vec<double> reduce(Vec<double> a, Vec<double> n) {
  constexpr double high = 3.46573590184561908245e-01, low = 9.54107464635293850010e-11;
  return (a - n * high) - n * low;
}

/// `round` is 1.5 * 2^mantissa: adding it leaves the nearest integer in the low bits. Beyond
/// `saturation` tanh rounds to 1.
template <typename T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float saturation = 9.5f, round = 12582912.0f;
  static constexpr int mantissa = 23;
  static constexpr int32_t one = 0x3f800000;
};
template <>
struct ExpConstants<double> {
  static constexpr double saturation = 20.0, round = 6755399441055744.0;
  static constexpr int mantissa = 52;
  static constexpr int64_t one = 0x3ff0000000000000;
};

struct Tanh {
  /// tanh a = e / (1 + e) with e = (exp(2a) - 1) / 2 of a = -|x|: e and 1 + e are never large.
  /// What each rounding of e, 1 + e and the quotient loses is carried in a second number (_low):
  /// the result is within 1 ulp (1.5 on a target without fused multiply-add), against 2.5 without.
  /// Keeps the sign of zero, passes NaN. One sequence waits for it in each step: the chain of what
  /// depends on x is kept short.
  template <typename T>
  static FASTRNN_INLINE Vec<T> value(Vec<T> x) {
    using C = ExpConstants<T>;
    const Bits<T> sign_bit = (Bits<T>)(-Vec<T>{});
    const Vec<T> a = (Vec<T>)((Bits<T>)x | sign_bit);
    // 2a = n ln(2) + 2s
    const Vec<T> shifted = a * T(2 * 1.44269504088896340736) + C::round;
    const Vec<T> n = shifted - C::round;
    const Vec<T> s = reduce(a, n), square = s * s;
    const Vec<T> power = (Vec<T>)(((Bits<T>)shifted << C::mantissa) + C::one);  // 2^n
    // e = 2^n (exp(2s) - 1)/2 + (2^n - 1)/2 = scaled tail + (2^n s + whole)
    const Vec<T> half = power * T(0.5), whole = half - T(0.5), whole_low = half - (whole + T(0.5));
    const Vec<T> linear = s * power + whole;
    const Vec<T> linear_low = ((whole - linear) + s * power) + whole_low;
    const Vec<T> tail = expm1_tail(s, square), scale = square * power;
    const Vec<T> e = tail * scale + linear, e_low = ((linear - e) + tail * scale) + linear_low;
    const Vec<T> d = e + T(1), d_low = ((T(1) - d) + e) + e_low;
    const Vec<T> q = e / d;
    const Vec<T> rest = (e - q * d) + (e_low - q * d_low);
    const Vec<T> y = q + rest * (T(1) - q);                           // 1/d = 1 - e/d
    const Vec<T> limited = a < -C::saturation ? Vec<T>{} - T(1) : y;  // false for NaN
    return (Vec<T>)(((Bits<T>)limited & ~sign_bit) | ((Bits<T>)x & sign_bit));
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

/// For a product alone.
struct Identity {
  template <typename T>
  static FASTRNN_INLINE Vec<T> value(Vec<T> x) {
    return x;
  }
};

}  // namespace
