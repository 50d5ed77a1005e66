// SPDX-License-Identifier: Apache-2.0
//
// Memory of the host for CUDA kernels: guarded buffers and the copies that are in flight.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace cuda_host {

/// To be called by what other threads may wait for, so that polling counts as endless only when
/// nothing of the kind happens.
void made_progress();

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
  void set_accessible(bool accessible);

 private:
  char* begin_;
  char* end_;
};

/// A buffer at the end of guarded pages: see allocate() in cuda_host.h.
class GuardedBuffer {
 public:
  GuardedBuffer(size_t bytes, size_t alignment, std::string name);
  ~GuardedBuffer();

  char* data() const { return data_; }
  bool contains(const void* address, size_t bytes) const;
  /// Fills everything with 0xFF.
  void poison();
  /// Cuts access off, or gives it back: that of a block which has exited.
  void set_open(bool open);
  /// Says where writes have left 0xFF no more, outside the data; then repairs it. Empty: nowhere.
  std::string repair();

  /// Which buffer the address is in or near, and where in it.
  static std::string describe(const void* address);
  /// What repair() says of every open buffer.
  static std::string repair_all();

 private:
  GuardedPages pages_;
  char* data_;
  size_t bytes_;
  bool open_ = true;
  std::string name_;
};

/// The cp.async of one thread, oldest first.
class AsyncCopies {
 public:
  void issue(void* dst, const void* src, size_t bytes, size_t src_bytes);
  void commit() { ++groups_; }
  void wait(unsigned newest);
  void wait_all();
  void clear();

 private:
  struct Copy {
    void* dst;
    const void* src;
    size_t bytes, src_bytes;
    size_t group;
    char data[16];
  };
  void finish(const Copy& copy);

  std::vector<Copy> pending_;
  size_t groups_ = 0;  // committed so far
};

}  // namespace cuda_host
