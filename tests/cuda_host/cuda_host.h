// SPDX-License-Identifier: Apache-2.0
//
// A host for CUDA kernels: with this header g++ compiles a torch-free .cu file, and launch() runs
// it with one fiber per CUDA thread on one OS thread, so that kernels are tested without a GPU.
//
// A thread runs until it waits, then the first ready thread in the chosen Order runs: a kernel that
// lacks a barrier goes wrong in at least one order. Blocks run one after another, unless the launch
// says that they are all resident; then so do their threads, in one order for all. Memory is
// poisoned with 0xFF bytes (NaN in every float type) and lies between inaccessible pages. Any
// misuse (an access out of bounds, a deadlock, ...) ends the launch with a std::runtime_error that
// says which thread did what. Destructors of the kernel's own objects are then not run. An endless
// loop is the one thing that hangs.
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
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace cuda_host {

// ---- Launches -------------------------------------------------------------------------------

struct LaunchShape {
  dim3 grid, block;
  size_t shared_bytes = 0;  // dynamic shared memory of a block
  bool resident = false;    // all blocks run at the same time
};

/// Runs `body`, which calls the kernel, as every thread of the launch. Throws std::runtime_error
/// after any misuse; buffers then keep what was written so far.
void launch(const LaunchShape& shape, std::function<void()> body);

/// Which ready thread runs next, and the order of the blocks. Each thread (so each warp) runs ahead
/// as far as its barriers let it, in favour of the low indices, the high ones, or those of a random
/// permutation that is drawn anew every now and then.
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
/// as aligned as `bytes` is. What lies between the front page and the start may be read (0xFF); a
/// write to it is reported at the end of the block.
void* allocate(size_t bytes, const char* name);
void release(void* data);

// ---- Inside a kernel ------------------------------------------------------------------------

/// Where the running thread is; read through threadIdx and the like.
struct Place {
  dim3 thread, block, grid;
  unsigned lane;
};
extern const Place* place;

/// Ends the launch with an error of the running thread.
[[noreturn]] void fail(const char* message);

/// The block's dynamic shared memory: as what allocate() returns, but 16-byte aligned, so that up
/// to 15 bytes may lie between its end and the page.
void* shared_memory();

/// Waits until all threads of the block, of which none may have exited, have come here.
void block_sync();

/// For a thread that waits, in a loop, for what another one writes: goes on when every other thread
/// waits too. A deadlock if none has done anything else since the last time.
void let_others_run();

/// Waits until every lane of the warp (lanes that the block lacks aside) calls this alike, then
/// copies `bytes` bytes from `mine` of each lane to all + lane * bytes. Other lanes' are 0xFF.
void warp_exchange(const void* mine, size_t bytes, void* all, const char* what);

/// What each lane of the warp deposits, seen by all of them. Twins of mma.sync and shuffles are
/// made of it; `what` is their name.
template <class In>
void warp_gather(const In& mine, In (&all)[32], const char* what) {
  static_assert(std::is_trivially_copyable_v<In>, "lanes exchange plain bytes");
  warp_exchange(&mine, sizeof(In), all, what);
}

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
void* fastrnn_host_allocate(size_t bytes, const char* name);  // null: an error
int fastrnn_host_release(void* data);
int fastrnn_host_set_order(int kind, uint64_t seed);  // Order::Kind
const char* fastrnn_host_last_error();
}

// ---- CUDA's names ---------------------------------------------------------------------------

#define threadIdx (::cuda_host::place->thread)
#define blockIdx (::cuda_host::place->block)
#define gridDim (::cuda_host::place->grid)

inline void __syncthreads() { cuda_host::block_sync(); }

/// Among all lanes of the warp: no kernel needs less.
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  if (mask != 0xffffffffu) cuda_host::fail("__shfl_xor_sync with a mask that lacks lanes");
  T all[32];
  cuda_host::warp_gather(value, all, "__shfl_xor_sync");
  const unsigned source = cuda_host::place->lane ^ static_cast<unsigned>(bits);
  return source < 32 ? all[source] : value;
}
