// SPDX-License-Identifier: Apache-2.0
//
// How fast blocks anywhere on the GPU hand h to each other through L2.
//
// Expected: one hop 0.5 to 0.65 us with packets, in which the data carries its own flag; 1.1 us or
// more for a barrier of the grid. What hangs on it: the group walk is right, and not a cluster
// (cluster.cuh), where a round here costs less; and the packet's size: 16 bytes carry three words
// for one tag, which matters as soon as the polled bytes (40 to 60 per cycle) rule and not the hop.
#pragma once

#include "host.cuh"

constexpr int kPacketThreads = 256;
constexpr int kPacketRounds = 1000;

/// The value of word `word` of block `block` in round 0. Each round adds 1 and takes the slice of
/// another block, so that a stale value in any round shows in the last one.
__device__ inline uint32_t start_word(unsigned block, int word) {
  return block << 16 | static_cast<uint32_t>(word);
}

/// The block to listen to: 1, 2, ..., gridDim.x - 1, 1, ... further, so each of the others in turn.
__device__ inline unsigned next_source(unsigned& shift, unsigned& total_shift) {
  shift = shift + 1 == gridDim.x ? 1 : shift + 1;
  total_shift += shift;
  const unsigned source = blockIdx.x + shift;
  return source >= gridDim.x ? source - gridDim.x : source;
}

/// How many words of `h`, [blocks][slice_words], are wrong at the end.
__device__ inline unsigned count_wrong_words(const uint32_t* h, int slice_words, int rounds,
                                             unsigned total_shift) {
  unsigned wrong = 0;
  for (int i = threadIdx.x; i < static_cast<int>(gridDim.x) * slice_words; i += kPacketThreads) {
    const unsigned origin = (i / slice_words + total_shift) % gridDim.x;
    wrong += h[i] != start_word(origin, i % slice_words) + rounds;
  }
  return wrong;
}

/// Receives the `count` packets of a round: h gets their words. Returns false when late.
template <int kWords>
__device__ bool receive(const Packet<kWords>* packets, int count, uint32_t tag, uint32_t* h) {
  // Several loads are in flight; all are repeated while one came too early.
  constexpr int kInFlight = 4;
  for (int first = threadIdx.x; first < count; first += kInFlight * kPacketThreads) {
    Packet<kWords> found[kInFlight];
    const Packet<kWords>* from[kInFlight];
    // Past the end the last packet again: a condition would make the loads wait for each other.
    for (int i = 0; i < kInFlight; ++i) {
      from[i] = packets + min(first + i * kPacketThreads, count - 1);
    }
    const bool ok = wait_until([&] {
      uint32_t difference = 0;
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) found[i] = load_packet(from[i]);
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) difference |= found[i].tag ^ tag;
      return difference == 0;
    });
    if (!ok) return false;
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int at = first + i * kPacketThreads;
      if (at >= count) break;
      for (int word = 0; word < kWords; ++word) h[at * kWords + word] = found[i].words[word];
    }
  }
  return true;
}

/// `packets` is [2][blocks][slice] for even and odd rounds, zeroed: no round has the tag 0. Packets
/// of round r overwrite those of r - 2, which every block has read before it sent those of r - 1,
/// all of which the writer has received. Shared memory holds h twice in the same way. A slice is at
/// most kPacketThreads packets.
template <int kWords>
__global__ void __launch_bounds__(kPacketThreads)
    exchange_packets(Packet<kWords>* packets, int slice, int rounds, Report* report) {
  uint32_t* const h = reinterpret_cast<uint32_t*>(dynamic_shared());
  const int count = gridDim.x * slice, slice_words = slice * kWords;
  for (int i = threadIdx.x; i < count * kWords; i += kPacketThreads) {
    h[i] = start_word(i / slice_words, i % slice_words);
  }
  __syncthreads();
  bool ok = true;
  unsigned shift = 0, total_shift = 0;
  const Stopwatch stopwatch;
  for (int round = 1; round <= rounds; ++round) {
    const int now = (round & 1) * count, before = count - now;
    const unsigned source = next_source(shift, total_shift);
    if (const int i = threadIdx.x; i < slice) {
      Packet<kWords> packet;
      for (int word = 0; word < kWords; ++word) {
        packet.words[word] = h[(before + source * slice + i) * kWords + word] + 1;
      }
      packet.tag = round;
      store_packet(packets + now + blockIdx.x * slice + i, packet);
    }
    ok = ok && receive(packets + now, count, round, h + now * kWords);
    __syncthreads();
  }
  stopwatch.stop(report);
  const int last = (rounds & 1) * count * kWords;
  add_findings(report, count_wrong_words(h + last, slice_words, rounds, total_shift), !ok);
}

/// The same with plain stores and a barrier of the grid: `counter` counts the arrivals, from 0 on.
/// `global` is [2][blocks][slice_words]; without words only the barrier is measured.
__global__ void __launch_bounds__(kPacketThreads)
    exchange_by_barrier(uint32_t* global, int slice_words, unsigned* counter, int rounds,
                        Report* report) {
  uint32_t* const h = reinterpret_cast<uint32_t*>(dynamic_shared());
  const int count = gridDim.x * slice_words;
  for (int i = threadIdx.x; i < count; i += kPacketThreads) {
    h[i] = start_word(i / slice_words, i % slice_words);
  }
  __syncthreads();
  bool ok = true;
  unsigned shift = 0, total_shift = 0;
  const Stopwatch stopwatch;
  for (int round = 1; round <= rounds; ++round) {
    const int now = (round & 1) * count, before = count - now;
    const unsigned source = next_source(shift, total_shift);
    if (const int i = threadIdx.x; i < slice_words) {
      global[now + blockIdx.x * slice_words + i] = h[before + source * slice_words + i] + 1;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      add_release(counter, 1);
      ok = ok && wait_until([&] { return load_acquire(counter) >= round * gridDim.x; });
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += kPacketThreads)
      h[now + i] = load_l2(global + now + i);
    __syncthreads();
  }
  stopwatch.stop(report);
  const uint32_t* const last = h + (rounds & 1) * count;
  add_findings(report, count_wrong_words(last, slice_words, rounds, total_shift), !ok);
}

template <int kWords>
void measure_packets(const char* name, unsigned blocks, int slice_bytes) {
  Entry entry(name);
  entry.set("blocks", blocks).set("slice_bytes", slice_bytes);
  measure(entry.set("received_bytes", slice_bytes * (blocks - 1)), [&](Entry& result) {
    const int slice = slice_bytes / (4 * kWords);
    Buffer<Packet<kWords>> packets(2 * blocks * slice);
    const Shape shape{blocks, kPacketThreads, 2u * blocks * slice_bytes, 0, true};
    result.set(time_rounds(kPacketRounds, [&](Report* report) {
      packets.zero();
      launch(exchange_packets<kWords>, shape, packets.data(), slice, kPacketRounds, report);
    }));
  });
}

inline void measure_grid_barrier(unsigned blocks, int slice_bytes) {
  Entry entry("grid barrier");
  entry.set("blocks", blocks).set("slice_bytes", slice_bytes);
  measure(entry.set("received_bytes", slice_bytes * (blocks - 1)), [&](Entry& result) {
    Buffer<uint32_t> global(2 * blocks * slice_bytes / 4 + 1);
    Buffer<unsigned> counter(1);
    const Shape shape{blocks, kPacketThreads, 2u * blocks * slice_bytes, 0, true};
    result.set(time_rounds(kPacketRounds, [&](Report* report) {
      counter.zero();
      launch(exchange_by_barrier, shape, global.data(), slice_bytes / 4, counter.data(),
             kPacketRounds, report);
    }));
  });
}

inline void measure_packet_exchange() {
  for (const unsigned blocks : {2, 8, 32, 128}) {
    // Multiples of 12 bytes, for the three words of a 16-byte packet.
    for (const int slice_bytes : {48, 384}) {
      measure_packets<1>("8-byte packets", blocks, slice_bytes);
      measure_packets<3>("16-byte packets", blocks, slice_bytes);
    }
    for (const int slice_bytes : {0, 48, 384}) measure_grid_barrier(blocks, slice_bytes);
  }
}
