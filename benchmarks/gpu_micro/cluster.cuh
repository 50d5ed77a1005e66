// SPDX-License-Identifier: Apache-2.0
//
// How fast the blocks of a cluster hand h to each other, and how many clusters are resident.
//
// Expected for a cluster of 8: 0.65 us with cluster.sync, about 300 cycles (stretch 220) with
// st.async and an mbarrier, where the sources for one hop lie between 102 and 1140 cycles. A likely
// reason for the spread: every release of cluster scope compiles to MEMBAR.ALL.GPU; st.async and a
// relaxed arrive without data need none.
// What hangs on it: whether h should stay inside a cluster. That pays as long as a round costs less
// than a packet hop through L2 (packets.cuh), the way of the group walk, which serves any number of
// blocks. At 300 cycles a cluster wins clearly, above 1000 it is not worth its code. The slices
// tell where the bytes begin to rule.
#pragma once

#include "host.cuh"

enum class Protocol {
  kClusterBarrier,  // remote stores, then barrier.cluster with release and acquire
  kRelaxedBarrier,  // the same with fence.acq_rel.cluster and a relaxed arrive
  kAsyncStores,     // st.async: the data counts itself at the reader's mbarrier
  kAsyncStoresCta,  // the same, but the wait acquires at block scope only, as is often done
  kRemoteStores,    // remote stores, then each warp arrives at the mbarrier of every peer
  kBulkCopies,      // own shared memory, a block barrier, then one bulk copy for each peer
};

template <Protocol kProtocol>
constexpr bool kIsAsync =
    kProtocol == Protocol::kAsyncStores || kProtocol == Protocol::kAsyncStoresCta;
/// Whether the mbarrier counts bytes, not arrivals.
template <Protocol kProtocol>
constexpr bool kCountsBytes = kIsAsync<kProtocol> || kProtocol == Protocol::kBulkCopies;

constexpr int kExchangeThreads = 256;
constexpr int kExchangeWarps = kExchangeThreads / 32;
constexpr int kExchangeRounds = 1000;

struct Exchange {
  int log_chunks;  // of the 16-byte chunks in the slice of h that a block owns, at most 8
  int has_data;    // 0: only the signal is measured
};

/// A block's part in the exchange. Shared memory holds h twice, for even and odd rounds, as
/// [2][ranks][chunks], and behind it the mbarrier of each copy. Thread i passes on chunk i.
///
/// A push of round r overwrites h of round r - 2. Each peer has read that by then: a block enters
/// round r when it has everything of round r - 1, which its peers made of r - 2. With st.async this
/// holds only because each thread that reads pushes to all peers. If some threads pushed to one
/// peer and others to the next one, a block barrier would be needed between reading and pushing.
template <int kRanks>
struct Member {
  uint4* h;
  // Of the shared memory of each rank; from the own rank on, lest all push to the same one first.
  SharedAddress peers[kRanks];
  int rank, chunks, size;  // chunks in a slice, and in a copy of h
  bool ok = true;

  /// Where in shared memory the mbarrier of a round is.
  __device__ int full(int round) const {
    return 2 * size * static_cast<int>(sizeof(uint4)) +
           (round & 1) * static_cast<int>(sizeof(uint64_t));
  }
  /// Index of a chunk of the own slice, in the copy of that round.
  __device__ int index(int round, int chunk) const {
    return (round & 1) * size + rank * chunks + chunk;
  }
};

/// Word `word` of chunk `chunk` in round 0. Round r adds 1 and takes the slice of the rank
/// that is r further, so that one stale or missing value in any round shows in the last one.
__device__ inline uint32_t first_word(int rank, int chunk, int word) {
  return static_cast<uint32_t>(rank << 20 | (chunk * 4 + word));
}

#if GPU_MICRO_CLUSTERS

template <Protocol kProtocol, int kRanks>
__device__ Member<kRanks> join(const Exchange& task) {
  Member<kRanks> member;
  member.h = reinterpret_cast<uint4*>(dynamic_shared());
  member.rank = cluster_rank();
  member.chunks = 1 << task.log_chunks;
  member.size = kRanks * member.chunks;
#pragma unroll
  for (int i = 0; i < kRanks; ++i) {
    member.peers[i] = peer_address(shared_address(member.h), (member.rank + i) % kRanks);
  }
  for (int i = threadIdx.x; i < member.size; i += kExchangeThreads) {
    const int owner = i >> task.log_chunks, chunk = i & (member.chunks - 1);
    member.h[i] = make_uint4(first_word(owner, chunk, 0), first_word(owner, chunk, 1),
                             first_word(owner, chunk, 2), first_word(owner, chunk, 3));
  }
  if (threadIdx.x == 0) {
    const int arrivals = kCountsBytes<kProtocol> ? 1 : kRanks * kExchangeWarps;
    for (int round = 0; round < 2; ++round) {
      mbarrier_init(shared_address(member.h) + member.full(round), arrivals);
    }
  }
  return member;
}

/// Announces the bytes that a round brings to the block.
template <Protocol kProtocol, int kRanks>
__device__ void expect(const Member<kRanks>& member, int round) {
  // Bulk copies go to the peers only.
  constexpr int kSlices = kRanks - (kIsAsync<kProtocol> ? 0 : 1);
  const unsigned bytes = kSlices * member.chunks * sizeof(uint4);
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(shared_address(member.h) + member.full(round), bytes);
  }
}

/// What a thread does with its values of h when it has computed them.
template <Protocol kProtocol, int kRanks>
__device__ void push(const Member<kRanks>& member, int round, const uint4& value) {
  const int index = member.index(round, threadIdx.x);
  const int to = index * static_cast<int>(sizeof(uint4)), full = member.full(round);
  if constexpr (kProtocol == Protocol::kBulkCopies) {
    member.h[index] = value;
  } else {
#pragma unroll
    for (int i = 0; i < kRanks; ++i) {
      if constexpr (kIsAsync<kProtocol>) {
        store_async(member.peers[i] + to, value, member.peers[i] + full);
      } else {
        store_remote(member.peers[i] + to, value);
      }
    }
  }
}

/// Sends the own slice, which all threads have written, to every peer: one from each warp, as the
/// copies of one warp are issued one by one.
template <int kRanks>
__device__ void copy_to_peers(const Member<kRanks>& member, int round) {
  fence_for_bulk();
  __syncthreads();
  const int warp = threadIdx.x / 32, to = member.index(round, 0) * static_cast<int>(sizeof(uint4));
  const SharedAddress own = shared_address(member.h) + to;
#pragma unroll
  for (int i = 1; i < kRanks; ++i) {
    if (threadIdx.x % 32 != 0 || i % kExchangeWarps != warp) continue;
    copy_bulk(member.peers[i] + to, own, member.chunks * sizeof(uint4),
              member.peers[i] + member.full(round));
  }
}

template <Protocol kProtocol, int kRanks>
__device__ void wait_until_full(Member<kRanks>& member, int round) {
  constexpr bool kAcquireCluster = kProtocol != Protocol::kAsyncStoresCta;
  const SharedAddress full = shared_address(member.h) + member.full(round);
  const unsigned parity = ((round - 1) >> 1) & 1;
  // Late once, a thread never waits again.
  member.ok =
      member.ok && wait_until([&] { return mbarrier_try_wait<kAcquireCluster>(full, parity); });
}

/// Until the slices of all peers are here.
template <Protocol kProtocol, int kRanks>
__device__ void finish_round(Member<kRanks>& member, int round, int has_data) {
  if constexpr (kProtocol == Protocol::kClusterBarrier) {
    cluster_arrive();
    cluster_wait();
  } else if constexpr (kProtocol == Protocol::kRelaxedBarrier) {
    if (has_data) fence_cluster();
    cluster_arrive_relaxed();
    cluster_wait();
  } else if constexpr (kProtocol == Protocol::kRemoteStores) {
    // The warp's stores come before its lanes' arrivals, which release them.
    __syncwarp();
    const SharedAddress full = shared_address(member.h) + member.full(round);
    const unsigned lane = threadIdx.x % 32;
    if (lane < kRanks) mbarrier_arrive_remote(peer_address(full, lane));
    wait_until_full<kProtocol>(member, round);
  } else {
    if constexpr (kProtocol == Protocol::kBulkCopies) copy_to_peers(member, round);
    // With st.async, a thread that pushes nothing must not wait: the round after next might end
    // before it looks, and the parity would be the old one again.
    if (!kIsAsync<kProtocol> || threadIdx.x < member.chunks) {
      wait_until_full<kProtocol>(member, round);
    }
    expect<kProtocol>(member, round + 2);
  }
}

/// How many words of h are wrong after `rounds` rounds.
template <int kRanks>
__device__ unsigned count_wrong(const Member<kRanks>& member, int rounds) {
  const int shift = rounds * (rounds + 1) / 2;  // 1 + 2 + ...
  unsigned wrong = 0;
  for (int i = threadIdx.x; i < member.size; i += kExchangeThreads) {
    const int chunk = i % member.chunks;
    const int origin = (i / member.chunks + shift) % kRanks;
    const uint4 found = member.h[(rounds & 1) * member.size + i];
    wrong += found.x != first_word(origin, chunk, 0) + rounds;
    wrong += found.y != first_word(origin, chunk, 1) + rounds;
    wrong += found.z != first_word(origin, chunk, 2) + rounds;
    wrong += found.w != first_word(origin, chunk, 3) + rounds;
  }
  return wrong;
}

#endif  // GPU_MICRO_CLUSTERS

template <Protocol kProtocol, int kRanks>
__global__ void __launch_bounds__(kExchangeThreads)
    exchange(Exchange task, int rounds, Report* report) {
#if GPU_MICRO_CLUSTERS
  Member<kRanks> member = join<kProtocol, kRanks>(task);
  // No peer pushes before every mbarrier is there.
  cluster_arrive();
  cluster_wait();
  if (kCountsBytes<kProtocol>) {
    expect<kProtocol>(member, 1);
    expect<kProtocol>(member, 2);
  }
  const int slice = member.rank * member.chunks, chunk = threadIdx.x;
  int source = slice + chunk, before = 0;
  const Stopwatch stopwatch;
  for (int round = 1; round <= rounds; ++round) {
    if (task.has_data && chunk < member.chunks) {
      source += member.chunks;
      if (source >= member.size) source -= member.size;
      uint4 value = member.h[before + source];
      value = make_uint4(value.x + 1, value.y + 1, value.z + 1, value.w + 1);
      push<kProtocol>(member, round, value);
      before = member.size - before;
    }
    finish_round<kProtocol>(member, round, task.has_data);
  }
  stopwatch.stop(report);
  // The shared memory of a block must live until its peers have stored to it.
  cluster_arrive();
  cluster_wait();
  add_findings(report, task.has_data ? count_wrong(member, rounds) : 0, !member.ok);
#endif
}

/// Measures one protocol with `clusters` clusters of kRanks blocks, for each size of a slice.
template <Protocol kProtocol, int kRanks>
void measure_exchange(const char* name, unsigned clusters) {
  for (const int slice : {0, 256, 1024, 4096}) {
    if (slice == 0 && kCountsBytes<kProtocol>) continue;
    Entry entry(name);
    entry.set("cluster", kRanks).set("clusters", clusters).set("slice_bytes", slice);
    measure(entry.set("received_bytes", slice * (kRanks - 1)), [&](Entry& result) {
      Exchange task{0, slice != 0};
      while (static_cast<int>(sizeof(uint4)) << task.log_chunks < slice) ++task.log_chunks;
      const size_t h_bytes = 2 * kRanks * (sizeof(uint4) << task.log_chunks);
      const Shape shape{clusters * kRanks, kExchangeThreads, h_bytes + 16, kRanks};
      result.set(time_rounds(kExchangeRounds, [&](Report* report) {
        launch(exchange<kProtocol, kRanks>, shape, task, kExchangeRounds, report);
      }));
    });
  }
}

template <int kRanks>
void measure_exchanges() {
  measure_exchange<Protocol::kClusterBarrier, kRanks>("cluster.sync", 1);
  measure_exchange<Protocol::kRelaxedBarrier, kRanks>("relaxed arrive, wait", 1);
  measure_exchange<Protocol::kAsyncStores, kRanks>("st.async, mbarrier", 1);
  measure_exchange<Protocol::kAsyncStoresCta, kRanks>("st.async, mbarrier, block scope", 1);
  measure_exchange<Protocol::kRemoteStores, kRanks>("remote stores, mbarrier", 1);
  measure_exchange<Protocol::kBulkCopies, kRanks>("bulk copy, mbarrier", 1);
  // Batch tiles run beside each other: does a cluster feel the others? 64 blocks fit anywhere.
  measure_exchange<Protocol::kAsyncStores, kRanks>("st.async, mbarrier", 64 / kRanks);
}

inline void measure_cluster_exchange() {
  measure_exchanges<2>();
  measure_exchanges<4>();
  measure_exchanges<8>();
  measure_exchanges<16>();
}

// ---- Residency --------------------------------------------------------------------------------

__global__ void occupant(int* out) {
  if (out != nullptr) *out = 1;
}

/// Expected with one block per multiprocessor: 66 clusters of 2, 30 of 4, 15 of 8, about 7 of 16.
/// It bounds how many batch tiles clusters run at once; 16 is worth it only if few are lost.
inline void measure_residency() {
  for (const unsigned cluster : {2, 4, 8, 16}) {
    for (const unsigned kilobytes : {227, 100, 32}) {
      for (const unsigned threads : {256, 512}) {
        Entry entry("resident clusters");
        entry.set("cluster", cluster).set("shared_kb", kilobytes).set("threads", threads);
        measure(entry, [&](Entry& result) {
          const Config config(occupant, {cluster, threads, kilobytes * 1024, cluster});
          int found = 0;
          check(cudaOccupancyMaxActiveClusters(&found, occupant, config.get()), "occupancy");
          result.set("clusters_resident", found);
        });
      }
    }
  }
}
