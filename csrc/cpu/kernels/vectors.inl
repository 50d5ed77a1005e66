// SPDX-License-Identifier: Apache-2.0
//
// The compiler's generic vectors: width, loads, stores. Part of recurrence.inl.

namespace {

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

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
using Vec = typename Lanes<Sum<T>>::Vec;
template <typename T>
using Bits = typename Lanes<Sum<T>>::Bits;

template <typename T>
constexpr int64_t kLanes = FASTRNN_VECTOR_BYTES / static_cast<int64_t>(sizeof(Sum<T>));
template <typename T>
constexpr int64_t kPanel = FASTRNN_TILE_VECTORS * kLanes<T>;

/// Terms of a product that lie side by side in packed weights and are multiplied at once.
template <typename T>
constexpr int64_t kDepth = 1;

template <typename T>
constexpr int64_t round_up_to_depth(int64_t K) {
  return (K + kDepth<T> - 1) / kDepth<T> * kDepth<T>;
}

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

/// Keeps what several products need in a register: GCC may read it anew for each of them.
template <typename V>
FASTRNN_INLINE void keep(V& vector) {
#if defined(__x86_64__) && !defined(__clang__)
  __asm__("" : "+v"(vector));
#else
  (void)vector;
#endif
}

/// The first `count` lanes, less than all, the others zero. Nothing behind those is read.
template <typename T>
FASTRNN_INLINE Vec<T> load_tail(const T* p, int64_t count) {
#ifdef FASTRNN_MASKED_LOAD
  return (Vec<T>)masked_load(p, count);
#else
  Vec<T> v = {};
  // Unrolled, each lane is set in the register: a lane whose number is not a constant takes v to
  // the stack and back.
#pragma GCC unroll 8
  for (int64_t i = 0; i + 1 < kLanes<T>; ++i)
    if (i < count) v[i] = p[i];
  return v;
#endif
}

/// The last `count` of the K numbers at p, less than kWeights, in some lanes that depend on K and
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

/// The first `count` of twice kPiece elements, in pieces: half of them, a quarter, and so on.
template <typename T, int64_t kPiece>
FASTRNN_INLINE void store_pieces(T* p, const T* elements, int64_t count) {
  const int64_t size = count & kPiece;
  if (size != 0) __builtin_memcpy(p, elements, kPiece * sizeof(T));
  if constexpr (kPiece > 1) store_pieces<T, kPiece / 2>(p + size, elements + size, count);
}

/// The first `count` lanes, less than all. Nothing behind those is written. Pieces and not a mask:
/// a mask is no faster with AVX-512, slower with AVX2, and others have none.
template <typename T>
FASTRNN_INLINE void store_tail(T* p, Vec<T> v, int64_t count) {
  T lanes[kLanes<T>];
  store<T>(lanes, v);
  store_pieces<T, kLanes<T> / 2>(p, lanes, count);
}

/// A vector of packed weights: kDepth of them in each lane.
template <typename T>
struct WeightsOf {
  using type = Vec<T>;
};
template <typename T>
using Weights = typename WeightsOf<T>::type;
template <typename T>
constexpr int64_t kWeights = kLanes<T> * kDepth<T>;

template <typename T>
FASTRNN_INLINE Vec<T> load_weights(const T* p) {
  return load<T>(p);
}

/// Packs a vector of columns of kDepth rows.
template <typename T>
FASTRNN_INLINE void side_by_side(const T* rows, int64_t, T* out) {
  store<T>(out, load<T>(rows));
}

/// What a row multiplies them by: the kDepth numbers at p, or the first and zeros.
template <typename T>
FASTRNN_INLINE T load_terms(const T* p) {
  return *p;
}
template <typename T>
FASTRNN_INLINE T load_term(const T* p) {
  return *p;
}

/// sum += terms * weights. Terms: those of one number for all lanes, or each lane's own.
template <typename T, typename Terms>
FASTRNN_INLINE void add_terms(Vec<T>& sum, Terms terms, Vec<T> weights) {
  sum += terms * weights;
}

}  // namespace
