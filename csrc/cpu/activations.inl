// SPDX-License-Identifier: Apache-2.0
//
// tanh and relu: the value, and the derivative times a gradient, from the value alone. Part of
// recurrence.inl.

namespace {

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
  /// tanh|x| = e / (e + 2) with e = exp(2|x|) - 1; keeps the sign of zero, passes NaN. What each
  /// rounding of e, e + 2 and the quotient loses is carried in a second number (_low): the result
  /// is within 1 ulp (1.5 on a target without fused multiply-add), against 2.5 without.
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
    // exp(a) - 1 = 2^n (exp(r) - 1) + (2^n - 1), exp(r) - 1 = r + tail
    const Vec<T> tail = expm1_tail(r) * (r * r);
    const Vec<T> p = r + tail, p_low = (r - p) + tail;
    const Vec<T> whole = power - T(1);
    const Vec<T> e = p * power + whole, e_low = ((whole - e) + p * power) + p_low * power;
    const Vec<T> d = e + T(2), d_low = ((T(2) - d) + e) + e_low;
    const Vec<T> inverse = T(1) / d;
    const Vec<T> q = e * inverse;
    const Vec<T> rest = (e - q * d) + (e_low - q * d_low);
    return (Vec<T>)((Bits<T>)(q + rest * inverse) | sign);
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
