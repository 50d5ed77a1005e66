// SPDX-License-Identifier: Apache-2.0
//
// Memory of the host for CUDA kernels.
#pragma once

#include <cstddef>
#include <string>

namespace cuda_host {

/// `bytes` bytes, rounded up to whole pages, between two inaccessible pages.
class GuardedPages {
 public:
  explicit GuardedPages(size_t bytes);
  ~GuardedPages();
  GuardedPages(const GuardedPages&) = delete;
  GuardedPages& operator=(const GuardedPages&) = delete;

  char* begin() const { return begin_; }
  char* end() const { return end_; }
  /// Whether the address is inside, or in one of the two inaccessible pages.
  bool owns(const void* address) const;

 private:
  char* begin_;
  char* end_;
};

/// A buffer at the end of guarded pages, or where its start is aligned, less than `alignment` bytes
/// before it: see allocate() in cuda_host.h.
class GuardedBuffer {
 public:
  GuardedBuffer(size_t bytes, size_t alignment, std::string name);
  ~GuardedBuffer();

  char* data() const { return data_; }
  /// Fills everything with 0xFF.
  void poison();
  /// Says where writes have left 0xFF no more, outside the data; then repairs it. Empty: nowhere.
  std::string repair();

  /// Which buffer the address is in or near, and where in it.
  static std::string describe(const void* address);
  /// What repair() says of every buffer.
  static std::string repair_all();

 private:
  GuardedPages pages_;
  char* data_;
  size_t bytes_;
  std::string name_;
};

}  // namespace cuda_host
