// SPDX-License-Identifier: Apache-2.0
//
// A host for CUDA kernels: with this header g++ compiles a torch-free .cu file, and launch() runs
// it with one fiber per CUDA thread on one OS thread, so that kernels are tested without a GPU.
//
// A thread runs until it waits or polls, then the first ready thread in the chosen Order runs: a
// kernel that lacks a barrier goes wrong in at least one order. Memory is poisoned with 0xFF bytes
// (NaN in every float type) and lies between inaccessible pages. Any misuse (an access out of
// bounds, a deadlock, endless polling, ...) ends the launch with a std::runtime_error that says
// which thread did what. Destructors of the kernel's own objects are then not run. An endless loop
// that calls nothing of this header is the one thing that hangs.
//
// Compile with the .cpp files of this folder, or from Python: see __init__.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorUnknown = 999 };

namespace cuda_host {

// ---- Launches -------------------------------------------------------------------------------

struct LaunchShape {
  dim3 grid, block;
  size_t shared_bytes = 0;   // dynamic shared memory of a block
  unsigned cluster = 1;      // blocks per cluster, along x
  bool cooperative = false;  // all blocks run concurrently, else only those of a cluster
};

/// Runs `body`, which calls the kernel, as every thread of the launch. Throws std::runtime_error
/// after any misuse; buffers then keep what was written so far.
void launch(const LaunchShape& shape, std::function<void()> body);

/// Which ready thread runs next, and the order of blocks that run one after another. Each thread
/// (so each warp) runs ahead as far as its barriers let it, in favour of the low indices, the high
/// ones, or those of a random permutation that is drawn anew every now and then. Threads that poll
/// go on when no other thread can; when shuffled, at every draw too.
struct Order {
  enum Kind { kAscending, kDescending, kShuffled };
  Kind kind = kAscending;
  uint64_t seed = 0;  // of kShuffled; each launch starts from it
};
void set_order(Order order);
/// How many launches there have been.
int launches();

// ---- Device memory --------------------------------------------------------------------------

/// `bytes` bytes of 0xFF that end at an inaccessible page, with another one in front. The start is
/// as aligned as `bytes` is; where `alignment` asks for more, less than `alignment` bytes lie
/// between the end and the page. These, and those between the front page and the start, may be
/// read (0xFF); a write to them is reported at the end of the launch.
void* allocate(size_t bytes, const char* name, size_t alignment = 1);
void release(void* data);

// ---- Inside a kernel ------------------------------------------------------------------------

/// Where the running thread is; read through threadIdx and the like.
struct Place {
  dim3 thread, block, block_size, grid;
  unsigned lane;
};
extern const Place* place;

/// Ends the launch with an error of the running thread.
[[noreturn]] void fail(const char* message);

/// The block's dynamic shared memory: 16-byte aligned, 0xFF when the block's first thread starts.
void* shared_memory();

/// Lets other threads run: to be called in every loop that polls memory. The launch fails when
/// the threads do nothing but poll for a long time.
void yield();

/// bar.sync id, threads: waits for `threads` threads of the block, in whole warps.
void barrier(int id, int threads);
/// Barrier 0 with all threads of the block, of which none may have exited.
void block_sync();

/// Waits until every lane of `mask` (lanes that the block lacks aside) calls this alike, then
/// copies `bytes` bytes from `mine` of each lane to all + lane * bytes. Other lanes' are 0xFF.
void warp_exchange(const void* mine, size_t bytes, void* all, unsigned mask, const char* what);

constexpr unsigned kAllLanes = 0xffffffffu;

/// What each lane of the warp deposits, seen by all of them. Twins of mma.sync, ldmatrix and
/// shuffles are made of it.
template <class In>
void warp_gather(const In& mine, In (&all)[32], unsigned mask = kAllLanes,
                 const char* what = "warp_gather") {
  static_assert(std::is_trivially_copyable_v<In>, "lanes exchange plain bytes");
  warp_exchange(&mine, sizeof(In), all, mask, what);
}

// Clusters. The barrier waits for all threads of all its blocks, and none may have exited. The
// shared memory of a block that has exited cannot be accessed.
unsigned cluster_size();
unsigned cluster_rank();
void cluster_arrive();
void cluster_wait();
void cluster_sync();
/// mapa: the same place in the shared memory of the cluster's block `rank`.
void* peer_shared(void* own_shared_address, unsigned rank);

/// cp.async: until the issuing thread waits for the copy, `dst` (in its block's shared memory)
/// holds 0xFF, then `src_bytes` bytes as they are at `src` now, then zeros up to `bytes` (4, 8 or
/// 16, to which the addresses are aligned). `src` must not change before the wait.
void cp_async(void* dst, const void* src, size_t bytes, size_t src_bytes);
void cp_async_commit();
/// Waits until at most `newest` of the thread's committed groups are pending.
void cp_async_wait(unsigned newest);
/// Waits for every copy of the thread, committed or not.
void cp_async_wait_all();

// mbarrier, 8 bytes of any block's shared memory. A phase ends when `count` threads have arrived
// and as many bytes were completed as expected.
void mbarrier_init(uint64_t* bar, unsigned count);
void mbarrier_arrive(uint64_t* bar);
void mbarrier_expect_tx(uint64_t* bar, unsigned bytes);
void mbarrier_arrive_expect_tx(uint64_t* bar, unsigned bytes);
/// To be called after the store of `bytes` bytes, as the twin of st.async or a bulk copy.
void mbarrier_complete_tx(uint64_t* bar, unsigned bytes);
/// Whether the phase of that parity has ended; to be polled with yield().
bool mbarrier_try_wait(uint64_t* bar, unsigned parity);

// ---- For ctypes -----------------------------------------------------------------------------

void set_last_error(const char* message);

/// The body of an exported `extern "C" int f(...)`: 0, or 1 and the message in last_error.
template <class Body>
int guarded(Body&& body) noexcept {
  try {
    body();
    return 0;
  } catch (const std::exception& error) {
    set_last_error(error.what());
    return 1;
  }
}

}  // namespace cuda_host

extern "C" {
void* fastrnn_host_allocate(size_t bytes, const char* name, size_t alignment);  // null: an error
int fastrnn_host_release(void* data);
int fastrnn_host_set_order(int kind, uint64_t seed);  // Order::Kind
const char* fastrnn_host_last_error();
}

// ---- CUDA's names ---------------------------------------------------------------------------

#define threadIdx (::cuda_host::place->thread)
#define blockIdx (::cuda_host::place->block)
#define blockDim (::cuda_host::place->block_size)
#define gridDim (::cuda_host::place->grid)

inline void __syncthreads() { cuda_host::block_sync(); }

inline void __syncwarp(unsigned mask = cuda_host::kAllLanes) {
  cuda_host::warp_exchange(nullptr, 0, nullptr, mask, "__syncwarp");
}

namespace cuda_host {

/// The value of lane `source`, or the lane's own where `source` leaves its segment of `width`.
template <class T>
T shuffle(unsigned mask, T value, int source, int width, const char* what) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  T all[32];
  warp_gather(value, all, mask, what);
  const int first = static_cast<int>(place->lane) & ~(width - 1);
  return source >= first && source < first + width ? all[source] : value;
}

inline unsigned ballot(unsigned mask, bool vote, const char* what) {
  unsigned char all[32];
  warp_gather(static_cast<unsigned char>(vote), all, mask, what);
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) votes |= (all[lane] == 1 ? 1u : 0u) << lane;
  return votes;
}

}  // namespace cuda_host

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int first = static_cast<int>(cuda_host::place->lane) & ~(width - 1);
  return cuda_host::shuffle(mask, value, first + (source & (width - 1)), width, "__shfl_sync");
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const int lane = cuda_host::place->lane;
  return cuda_host::shuffle(mask, value, lane ^ bits, width, "__shfl_xor_sync");
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const int lane = cuda_host::place->lane;
  return cuda_host::shuffle(mask, value, lane - static_cast<int>(by), width, "__shfl_up_sync");
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const int lane = cuda_host::place->lane;
  return cuda_host::shuffle(mask, value, lane + static_cast<int>(by), width, "__shfl_down_sync");
}

inline unsigned __ballot_sync(unsigned mask, int vote) {
  return cuda_host::ballot(mask, vote != 0, "__ballot_sync");
}
inline int __any_sync(unsigned mask, int vote) {
  return cuda_host::ballot(mask, vote != 0, "__any_sync") != 0;
}
inline int __all_sync(unsigned mask, int vote) {
  return cuda_host::ballot(mask, vote == 0, "__all_sync") == 0;
}
