// SPDX-License-Identifier: Apache-2.0
//
// What the device is, and what a launch costs.
//
// Expected: 2.1 us from kernel to kernel in a stream, 1.3 us in a CUDA graph, a few us of the
// host's time per launch. What hangs on it: below how many time steps a single launch matters more
// than the recurrence, and whether the input product is worth a kernel of its own there.
#pragma once

#include <chrono>

#include "cluster.cuh"
#include "host.cuh"

inline int attribute(cudaDeviceAttr which) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, 0), "cudaDeviceGetAttribute");
  return value;
}

inline void measure_device() {
  measure(Entry("device"), [](Entry& result) {
    cudaDeviceProp found;
    check(cudaGetDeviceProperties(&found, 0), "cudaGetDeviceProperties");
    int driver = 0, runtime = 0;
    check(cudaDriverGetVersion(&driver), "driver");
    check(cudaRuntimeGetVersion(&runtime), "runtime");
    cudaFuncAttributes code;
    check(cudaFuncGetAttributes(&code, occupant), "cudaFuncGetAttributes");
    result.set("name", std::string(found.name));
    result.set("capability", found.major * 10 + found.minor).set("compiled_for", code.ptxVersion);
    result.set("multiprocessors", found.multiProcessorCount);
    result.set("clock_mhz", attribute(cudaDevAttrClockRate) / 1e3);
    result.set("memory_clock_mhz", attribute(cudaDevAttrMemoryClockRate) / 1e3);
    result.set("shared_bytes_block", static_cast<double>(found.sharedMemPerBlockOptin));
    result.set("shared_bytes_sm", static_cast<double>(found.sharedMemPerMultiprocessor));
    result.set("registers_sm", found.regsPerMultiprocessor);
    result.set("l2_bytes", found.l2CacheSize);
    result.set("memory_bytes", static_cast<double>(found.totalGlobalMem));
    result.set("cooperative_launch", attribute(cudaDevAttrCooperativeLaunch));
    result.set("driver_version", driver).set("runtime_version", runtime);
  });
}

/// Microseconds of body(), which the host waits for.
template <class Body>
double host_microseconds(Body body) {
  const auto start = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start)
      .count();
}

class Stream {
 public:
  Stream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "stream"); }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  cudaStream_t get() const { return stream_; }
  void wait() const { check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize"); }

 private:
  cudaStream_t stream_ = nullptr;
};

// Fewer than the launches that the driver queues before it makes the host wait.
constexpr int kLaunches = 500;
constexpr int kLaunchRuns = 9;

/// Empty kernels back to back: the host's time of a call, and the time from kernel to kernel.
inline void measure_launches(const char* name, const Shape& shape) {
  measure(Entry(name), [&](Entry& result) {
    const Stream stream;
    const Config config(occupant, shape, stream.get());
    std::vector<double> calls, totals, singles;
    for (int run = -1; run < kLaunchRuns; ++run) {
      double call = 0;
      const double total = host_microseconds([&] {
        call = host_microseconds([&] {
          for (int i = 0; i < kLaunches; ++i) {
            check(cudaLaunchKernelEx(config.get(), occupant, nullptr), "launch");
          }
        });
        stream.wait();
      });
      const double single = host_microseconds([&] {
        check(cudaLaunchKernelEx(config.get(), occupant, nullptr), "launch");
        stream.wait();
      });
      if (run < 0) continue;
      calls.push_back(call / kLaunches);
      totals.push_back(total / kLaunches);
      singles.push_back(single);
    }
    result.set("host_us_per_call", median(calls)).set("us_per_kernel", median(totals));
    result.set("us_launch_and_wait", median(singles));
  });
}

/// The same kernels as the nodes of one CUDA graph.
inline void measure_graph() {
  measure(Entry("empty kernel, graph"), [](Entry& result) {
    const Stream stream;
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    check(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeThreadLocal), "capture");
    for (int i = 0; i < kLaunches; ++i) occupant<<<1, 256, 0, stream.get()>>>(nullptr);
    check(cudaStreamEndCapture(stream.get(), &graph), "capture");
    check(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
    cudaEvent_t start, end;
    check(cudaEventCreate(&start), "cudaEventCreate");
    check(cudaEventCreate(&end), "cudaEventCreate");
    std::vector<double> calls, totals;
    for (int run = -1; run < kLaunchRuns; ++run) {
      check(cudaEventRecord(start, stream.get()), "cudaEventRecord");
      const double call = host_microseconds(
          [&] { check(cudaGraphLaunch(executable, stream.get()), "cudaGraphLaunch"); });
      check(cudaEventRecord(end, stream.get()), "cudaEventRecord");
      stream.wait();
      float milliseconds = 0;
      check(cudaEventElapsedTime(&milliseconds, start, end), "cudaEventElapsedTime");
      if (run < 0) continue;
      calls.push_back(call);
      totals.push_back(1e3 * milliseconds / kLaunches);
    }
    result.set("kernels", kLaunches).set("host_us_per_graph", median(calls));
    result.set("us_per_kernel", median(totals));
  });
}

inline void measure_launch_overhead() {
  measure_launches("empty kernel, stream", {1, 256});
  measure_launches("empty kernel, 132 blocks, stream", {132, 256});
  measure_launches("empty kernel, cluster of 8, stream", {8, 256, 0, 8});
  measure_launches("empty kernel, cooperative, stream", {8, 256, 0, 0, true});
  // Documents disagree on whether the two go together.
  measure_launches("empty kernel, cooperative and cluster of 8, stream", {16, 256, 0, 8, true});
  measure_graph();
}
