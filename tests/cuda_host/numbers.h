// SPDX-License-Identifier: Apache-2.0
//
// Conversions between float and the 16-bit types, to the nearest and ties to even, which g++ 12
// has no types for.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace cuda_host {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  if (std::isnan(value)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float half_to_float(uint16_t half) {
  const int exponent = half >> 10 & 31, fraction = half & 1023;
  float size = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                             : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  if (exponent == 31) size = fraction == 0 ? INFINITY : NAN;
  return half & 0x8000 ? -size : size;
}

inline uint16_t float_to_half(float value) {
  const uint16_t sign = bits_of(value) >> 16 & 0x8000;
  const float size = std::fabs(value);
  if (std::isnan(value)) return 0x7fff;
  if (size == 0) return sign;
  if (size >= 65520.0f) return sign | 0x7c00;
  // Units of the last place: 2^-24 for the subnormal numbers and the first normal ones.
  int exponent;
  std::frexp(size, &exponent);  // size < 2^exponent
  const int place = exponent - 11 > -24 ? exponent - 11 : -24;
  const int units = static_cast<int>(std::nearbyint(std::ldexp(size, -place)));
  // With `place` -24 the number of units is the encoding; each power of two above adds 1024.
  return sign | static_cast<uint16_t>(units + 1024 * (place + 24));
}

}  // namespace cuda_host
