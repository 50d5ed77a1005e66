// SPDX-License-Identifier: Apache-2.0
//
// The PTX instructions that gpu_micro measures, each behind a function; no PTX elsewhere.
//
// Those below "sm_90" may be called only where GPU_MICRO_CLUSTERS is 1.
#pragma once

#include <cstdint>

// The host's pass sees 0, and compiles no device code anyway.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define GPU_MICRO_CLUSTERS 1
#else
#define GPU_MICRO_CLUSTERS 0
#endif

__device__ inline char* dynamic_shared() {
  extern __shared__ __align__(16) char bytes[];
  return bytes;
}

// The clobber keeps the work that is measured between the two readings.
__device__ inline long long read_cycles() {
  long long value;
  asm volatile("mov.u64 %0, %%clock64;" : "=l"(value)::"memory");
  return value;
}

__device__ inline long long read_nanoseconds() {
  long long value;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(value)::"memory");
  return value;
}

// ---- Packets in L2 ----------------------------------------------------------------------------

/// What one store carries: a few words of h and the round that they belong to.
template <int kWords>
struct alignas(4 * kWords + 4) Packet {
  uint32_t words[kWords];
  uint32_t tag;
};

// A reader must never see the tag of one round with the words of another. A relaxed scalar access
// of 8 bytes is single-copy atomic, and so is one of the type b128. A vector access (v2, v4) is
// several accesses to the memory model, although the hardware makes one transaction of it. Strong
// accesses of gpu scope go to L2, past L1.
__device__ inline void store_packet(Packet<1>* address, const Packet<1>& packet) {
  asm volatile(
      "{ .reg .b64 v; mov.b64 v, {%1, %2}; st.relaxed.gpu.global.b64 [%0], v; }" ::"l"(address),
      "r"(packet.words[0]), "r"(packet.tag)
      : "memory");
}

__device__ inline Packet<1> load_packet(const Packet<1>* address) {
  Packet<1> packet;
  asm volatile("{ .reg .b64 v; ld.relaxed.gpu.global.b64 v, [%2]; mov.b64 {%0, %1}, v; }"
               : "=r"(packet.words[0]), "=r"(packet.tag)
               : "l"(address)
               : "memory");
  return packet;
}

__device__ inline void store_packet(Packet<3>* address, const Packet<3>& packet) {
  const uint64_t low = packet.words[0] | static_cast<uint64_t>(packet.words[1]) << 32;
  const uint64_t high = packet.words[2] | static_cast<uint64_t>(packet.tag) << 32;
  asm volatile(
      "{ .reg .b128 v; mov.b128 v, {%1, %2}; st.relaxed.gpu.global.b128 [%0], v; }" ::"l"(address),
      "l"(low), "l"(high)
      : "memory");
}

__device__ inline Packet<3> load_packet(const Packet<3>* address) {
  uint64_t low, high;
  asm volatile("{ .reg .b128 v; ld.relaxed.gpu.global.b128 v, [%2]; mov.b128 {%0, %1}, v; }"
               : "=l"(low), "=l"(high)
               : "l"(address)
               : "memory");
  return {
      {static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32), static_cast<uint32_t>(high)},
      static_cast<uint32_t>(high >> 32)};
}

__device__ inline void add_release(unsigned* counter, unsigned value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}

__device__ inline unsigned load_acquire(const unsigned* counter) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}

/// A load from L2, not from L1.
__device__ inline uint32_t load_l2(const uint32_t* address) {
  uint32_t value;
  asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

// ---- Arithmetic -------------------------------------------------------------------------------

__device__ inline float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// 1 - 2 / (1 + e^2x) with the approximations of 2^x and 1/x; right at +-Inf.
__device__ inline float tanh_by_exp(float x) {
  float power, inverse;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * 2.885390082f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(power + 1.0f));
  return fmaf(-2.0f, inverse, 1.0f);
}

/// Two bf16 in one register, `low` in the lower half.
__device__ inline uint32_t pack_bf16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

/// d += a * b, with a: 16 x 16, row-major, and b: 16 x 8, column-major, of bf16.
__device__ inline void mma(float (&d)[4], const uint4& a, const uint2& b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
}

/// Transposes an 8 x 8 matrix of 16 bits: an accumulator's half becomes half a b fragment.
__device__ inline uint32_t transpose(uint32_t rows) {
  uint32_t columns;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(columns) : "r"(rows));
  return columns;
}

// ---- sm_90: clusters --------------------------------------------------------------------------

/// An address in the shared memory of the block, or of a peer in the cluster.
using SharedAddress = uint32_t;

__device__ inline SharedAddress shared_address(const void* own) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(own));
}

/// The same place in the shared memory of the cluster's block `rank`.
__device__ inline SharedAddress peer_address(SharedAddress own, unsigned rank) {
  SharedAddress peer;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(peer) : "r"(own), "r"(rank));
  return peer;
}

__device__ inline unsigned cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ inline unsigned cluster_size() {
  unsigned size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

__device__ inline void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

/// Orders nothing: fence_cluster() must come before it where other blocks are to see stores.
__device__ inline void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

__device__ inline void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ inline void fence_cluster() { asm volatile("fence.acq_rel.cluster;" ::: "memory"); }

__device__ inline void store_remote(SharedAddress to, const uint4& v) {
  asm volatile("st.shared::cluster.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}

/// Stores 16 bytes and then counts them at `barrier`, which is in the same block as `to`.
__device__ inline void store_async(SharedAddress to, const uint4& v, SharedAddress barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(to),
      "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(barrier)
      : "memory");
}

/// Copies from this block to a peer and counts the bytes at its `barrier`.
__device__ inline void copy_bulk(SharedAddress to, SharedAddress from, unsigned bytes,
                                 SharedAddress barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(to),
      "r"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

/// Makes this thread's stores visible to the bulk copies that are issued later.
__device__ inline void fence_for_bulk() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ inline void mbarrier_init(SharedAddress barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ inline void mbarrier_arrive_expect(SharedAddress barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

/// Arrives at a peer's barrier; without release.cluster only the own block would be in its scope.
__device__ inline void mbarrier_arrive_remote(SharedAddress barrier) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier)
               : "memory");
}

/// Whether the phase of that parity has ended; may sleep for a while before it says no. kCluster
/// makes what the cluster's other blocks released visible; it costs an invalidation of L1 (CCTL).
template <bool kCluster>
__device__ bool mbarrier_try_wait(SharedAddress barrier, unsigned parity) {
  unsigned ended;
  if constexpr (kCluster) {
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; "
        "selp.u32 %0, 1, 0, p; }"
        : "=r"(ended)
        : "r"(barrier), "r"(parity)
        : "memory");
  } else {
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2; "
        "selp.u32 %0, 1, 0, p; }"
        : "=r"(ended)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
  return ended != 0;
}
