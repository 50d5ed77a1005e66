// SPDX-License-Identifier: Apache-2.0
//
// Guarded buffers of the host for CUDA kernels, and the C functions for ctypes.
#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <vector>

#include "cuda_host.h"

namespace cuda_host {
namespace {

constexpr unsigned char kPoison = 0xFF;

size_t page_bytes() {
  static const size_t bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

std::vector<GuardedBuffer*>& all_buffers() {
  static std::vector<GuardedBuffer*> buffers;
  return buffers;
}

std::map<void*, std::unique_ptr<GuardedBuffer>>& device_buffers() {
  static std::map<void*, std::unique_ptr<GuardedBuffer>> buffers;
  return buffers;
}

std::string last_error;

bool is_poison(char byte) { return static_cast<unsigned char>(byte) == kPoison; }

}  // namespace

GuardedPages::GuardedPages(size_t bytes) {
  const size_t page = page_bytes();
  const size_t inside = (bytes + page - 1) / page * page;
  void* map = mmap(nullptr, inside + 2 * page, PROT_NONE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map == MAP_FAILED) throw std::runtime_error("mmap failed: too much memory");
  begin_ = static_cast<char*>(map) + page;
  end_ = begin_ + inside;
  if (inside != 0 && mprotect(begin_, inside, PROT_READ | PROT_WRITE) != 0) {
    munmap(map, inside + 2 * page);
    throw std::runtime_error("mprotect failed: too many buffers");
  }
}

GuardedPages::~GuardedPages() {
  munmap(begin_ - page_bytes(), static_cast<size_t>(end_ - begin_) + 2 * page_bytes());
}

bool GuardedPages::owns(const void* address) const {
  const char* byte = static_cast<const char*>(address);
  return byte >= begin_ - page_bytes() && byte < end_ + page_bytes();
}

GuardedBuffer::GuardedBuffer(size_t bytes, size_t alignment, std::string name)
    : pages_(bytes + alignment - 1), bytes_(bytes), name_(std::move(name)) {
  const uintptr_t start = reinterpret_cast<uintptr_t>(pages_.end()) - bytes;
  data_ = reinterpret_cast<char*>(start / alignment * alignment);
  poison();
  all_buffers().push_back(this);
}

GuardedBuffer::~GuardedBuffer() {
  std::vector<GuardedBuffer*>& all = all_buffers();
  all.erase(std::remove(all.begin(), all.end(), this), all.end());
}

void GuardedBuffer::poison() {
  std::memset(pages_.begin(), kPoison, static_cast<size_t>(pages_.end() - pages_.begin()));
}

std::string GuardedBuffer::repair() {
  std::string report;
  char* end = data_ + bytes_;
  for (char* byte = pages_.begin(); byte != pages_.end(); ++byte) {
    if (byte == data_) byte = end;
    if (byte == pages_.end()) break;
    if (is_poison(*byte)) continue;
    if (report.empty()) report = "write " + describe(byte);
    *byte = static_cast<char>(kPoison);
  }
  return report;
}

std::string GuardedBuffer::describe(const void* address) {
  const char* byte = static_cast<const char*>(address);
  for (const GuardedBuffer* buffer : all_buffers()) {
    if (!buffer->pages_.owns(address)) continue;
    const char* end = buffer->data_ + buffer->bytes_;
    const std::string name =
        "of buffer '" + buffer->name_ + "' (" + std::to_string(buffer->bytes_) + " bytes)";
    if (byte < buffer->data_)
      return std::to_string(buffer->data_ - byte) + " bytes before the start " + name;
    if (byte >= end) return std::to_string(byte - end) + " bytes past the end " + name;
    return "at byte " + std::to_string(byte - buffer->data_) + " " + name;
  }
  char text[64];
  snprintf(text, sizeof(text), "at address %p, near no buffer", address);
  return text;
}

std::string GuardedBuffer::repair_all() {
  std::string report;
  for (GuardedBuffer* buffer : all_buffers()) {
    const std::string damage = buffer->repair();
    if (!damage.empty()) report += (report.empty() ? "" : "; ") + damage;
  }
  return report;
}

void* allocate(size_t bytes, const char* name) {
  auto buffer = std::make_unique<GuardedBuffer>(bytes, 1, name);
  void* data = buffer->data();
  device_buffers()[data] = std::move(buffer);
  return data;
}

void release(void* data) {
  if (device_buffers().erase(data) == 0) {
    throw std::runtime_error("release of something that allocate did not return");
  }
}

void set_last_error(const char* message) { last_error = message; }

}  // namespace cuda_host

extern "C" {

void* fastrnn_host_allocate(size_t bytes, const char* name) {
  void* data = nullptr;
  cuda_host::guarded([&] { data = cuda_host::allocate(bytes, name); });
  return data;
}

int fastrnn_host_release(void* data) {
  return cuda_host::guarded([&] { cuda_host::release(data); });
}

int fastrnn_host_set_order(int kind, uint64_t seed) {
  return cuda_host::guarded(
      [&] { cuda_host::set_order({static_cast<cuda_host::Order::Kind>(kind), seed}); });
}

int fastrnn_host_launches() { return cuda_host::launches(); }

const char* fastrnn_host_last_error() { return cuda_host::last_error.c_str(); }
}
