// SPDX-License-Identifier: Apache-2.0
//
// The host's side of a measurement: errors as exceptions, buffers, launches, medians, JSON.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

#include "report.cuh"

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next launch would report it again
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

template <class T>
class Buffer {
 public:
  explicit Buffer(size_t count) : count_(count) {
    check(cudaMalloc(&data_, count * sizeof(T)), "cudaMalloc");
    zero();
  }
  explicit Buffer(const std::vector<T>& values) : Buffer(values.size()) {
    check(cudaMemcpy(data_, values.data(), count_ * sizeof(T), cudaMemcpyHostToDevice), "upload");
  }
  ~Buffer() { cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() const { return data_; }
  void zero() { check(cudaMemset(data_, 0, count_ * sizeof(T)), "cudaMemset"); }
  std::vector<T> download() const {
    std::vector<T> values(count_);
    check(cudaMemcpy(values.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost), "download");
    return values;
  }

 private:
  T* data_ = nullptr;
  size_t count_;
};

// ---- Launches ---------------------------------------------------------------------------------

struct Shape {
  unsigned blocks, threads;
  size_t shared = 0;         // dynamic shared memory of a block
  unsigned cluster = 0;      // blocks in a cluster; 0: without clusters
  bool cooperative = false;  // all blocks are resident, or the launch fails
};

/// The shape in CUDA's terms, with the kernel's attributes set for it.
class Config {
 public:
  template <class Kernel>
  Config(Kernel* kernel, const Shape& shape, cudaStream_t stream = nullptr) {
    config_.gridDim = shape.blocks;
    config_.blockDim = shape.threads;
    config_.dynamicSmemBytes = shape.shared;
    config_.stream = stream;
    config_.attrs = attributes_;
    const int bytes = static_cast<int>(shape.shared);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
          "shared memory");
    if (shape.cluster != 0) add_cluster(kernel, shape.cluster);
    if (shape.cooperative) {
      attributes_[config_.numAttrs].id = cudaLaunchAttributeCooperative;
      attributes_[config_.numAttrs++].val.cooperative = 1;
    }
  }
  Config(const Config&) = delete;
  Config& operator=(const Config&) = delete;

  const cudaLaunchConfig_t* get() const { return &config_; }

 private:
  template <class Kernel>
  void add_cluster(Kernel* kernel, unsigned cluster) {
    cudaFuncAttributes found;
    check(cudaFuncGetAttributes(&found, kernel), "cudaFuncGetAttributes");
    int major = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "capability");
    if (major < 9 || found.ptxVersion < 90) throw std::runtime_error("needs sm_90");
    // 8 is the most that every GPU with clusters takes.
    if (cluster > 8) {
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
            "non-portable cluster");
    }
    attributes_[config_.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes_[config_.numAttrs++].val.clusterDim = {cluster, 1, 1};
  }

  cudaLaunchConfig_t config_{};
  cudaLaunchAttribute attributes_[2]{};
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Shape& shape, Arguments... arguments) {
  const Config config(kernel, shape);
  check(cudaLaunchKernelEx(config.get(), kernel, Parameters(arguments)...), "launch");
}

// ---- JSON -------------------------------------------------------------------------------------

inline double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

/// For each round: medians over the runs, and the range.
struct Timing {
  double cycles, cycles_min, cycles_max, nanoseconds;
};

/// One object of the JSON: what was measured, and either the numbers or an "error".
class Entry {
 public:
  explicit Entry(const std::string& what) { set("what", what); }

  Entry& set(const char* key, double value) {
    char text[32];
    std::snprintf(text, sizeof text, "%.10g", value);
    return add(key, std::isfinite(value) ? text : "null");
  }
  Entry& set(const char* key, const std::string& value) {
    std::string text = "\"";
    for (const char letter : value) {
      if (letter == '"' || letter == '\\') text += '\\';
      text += static_cast<unsigned char>(letter) < ' ' ? ' ' : letter;
    }
    return add(key, text + '"');
  }
  Entry& set(const Timing& timing) {
    set("cycles", timing.cycles).set("ns", timing.nanoseconds);
    set("cycles_min", timing.cycles_min).set("cycles_max", timing.cycles_max);
    return set("ghz", timing.cycles / timing.nanoseconds);
  }
  void print() const {
    std::printf("{%s}\n", fields_.c_str());
    std::fflush(stdout);
  }

 private:
  Entry& add(const char* key, const std::string& json) {
    fields_ += (fields_.empty() ? "\"" : ", \"") + std::string(key) + "\": " + json;
    return *this;
  }
  std::string fields_;
};

/// Prints the entry with what body(entry) has added, or with the error that it threw.
template <class Body>
void measure(Entry entry, Body body) {
  Entry result = entry;
  try {
    body(result);
  } catch (const std::exception& error) {
    result = entry.set("error", std::string(error.what()));
  }
  result.print();
}

/// Runs run(report), which launches one kernel of `rounds` rounds, a few times. Throws if a wait
/// came to its end or a value was wrong: the time of a protocol that does not work says nothing.
template <class Run>
Timing time_rounds(int rounds, Run run) {
  constexpr int kRuns = 7;
  Buffer<Report> report(1);
  std::vector<double> cycles, nanoseconds;
  for (int i = -1; i < kRuns; ++i) {
    report.zero();
    run(report.data());
    check(cudaDeviceSynchronize(), "kernel");
    const Report found = report.download()[0];
    if (found.late != 0) throw std::runtime_error("a wait came to its limit");
    if (found.wrong != 0) throw std::runtime_error(std::to_string(found.wrong) + " wrong values");
    if (i < 0) continue;  // the first run loads the code
    cycles.push_back(static_cast<double>(found.cycles) / rounds);
    nanoseconds.push_back(static_cast<double>(found.nanoseconds) / rounds);
  }
  return {median(cycles), *std::min_element(cycles.begin(), cycles.end()),
          *std::max_element(cycles.begin(), cycles.end()), median(nanoseconds)};
}
