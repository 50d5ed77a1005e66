// SPDX-License-Identifier: Apache-2.0
//
// The compiler's generic vectors: width, loads, stores. Part of recurrence.inl.

namespace {

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

/// The last `count` of the K numbers at p, less than a vector, in some lanes that depend on K and
/// `count` alone; the other lanes are zero.
template <typename T>
FASTRNN_INLINE Vec<T> load_end(const T* p, int64_t K, int64_t count) {
  if (K < kLanes<T>) return load_tail<T>(p, count);
  Bits<T> lane = {};
  for (int64_t i = 0; i < kLanes<T>; ++i) lane[i] = i;
  using Bit = std::remove_reference_t<decltype(lane[0])>;
  const Bits<T> wanted = lane >= static_cast<Bit>(kLanes<T> - count);
  return (Vec<T>)((Bits<T>)load<T>(p + K - kLanes<T>) & wanted);
}

template <typename T>
FASTRNN_INLINE void store_tail(T* p, Vec<T> v, int64_t count) {
  T lanes[kLanes<T>];
  store<T>(lanes, v);
  for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}

}  // namespace
