// SPDX-License-Identifier: Apache-2.0
//
// Guarded buffers, asynchronous copies and mbarriers of the host for CUDA kernels, and the C
// functions for ctypes. Nothing here switches threads.
#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>

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
  if (map == MAP_FAILED) throw std::runtime_error("mmap failed: too much memory, or threads");
  begin_ = static_cast<char*>(map) + page;
  end_ = begin_ + inside;
  if (inside != 0 && mprotect(begin_, inside, PROT_READ | PROT_WRITE) != 0) {
    munmap(map, inside + 2 * page);
    throw std::runtime_error("mprotect failed: too many concurrent threads or buffers");
  }
}

GuardedPages::~GuardedPages() {
  munmap(begin_ - page_bytes(), static_cast<size_t>(end_ - begin_) + 2 * page_bytes());
}

bool GuardedPages::owns(const void* address) const {
  const char* byte = static_cast<const char*>(address);
  return byte >= begin_ - page_bytes() && byte < end_ + page_bytes();
}

void GuardedPages::set_accessible(bool accessible) {
  if (begin_ == end_) return;
  mprotect(begin_, static_cast<size_t>(end_ - begin_),
           accessible ? PROT_READ | PROT_WRITE : PROT_NONE);
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

bool GuardedBuffer::contains(const void* address, size_t bytes) const {
  const char* byte = static_cast<const char*>(address);
  return byte >= data_ && byte + bytes <= data_ + bytes_;
}

void GuardedBuffer::poison() {
  std::memset(pages_.begin(), kPoison, static_cast<size_t>(pages_.end() - pages_.begin()));
}

void GuardedBuffer::set_open(bool open) {
  if (open != open_) pages_.set_accessible(open);
  open_ = open;
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
    const std::string exited = buffer->open_ ? "" : ", whose block has exited";
    return "at byte " + std::to_string(byte - buffer->data_) + " " + name + exited;
  }
  char text[64];
  snprintf(text, sizeof(text), "at address %p, near no buffer", address);
  return text;
}

std::string GuardedBuffer::repair_all() {
  std::string report;
  for (GuardedBuffer* buffer : all_buffers()) {
    if (!buffer->open_) continue;
    const std::string damage = buffer->repair();
    if (!damage.empty()) report += (report.empty() ? "" : "; ") + damage;
  }
  return report;
}

void* allocate(size_t bytes, const char* name, size_t alignment) {
  auto buffer = std::make_unique<GuardedBuffer>(bytes, std::max<size_t>(alignment, 1), name);
  void* data = buffer->data();
  device_buffers()[data] = std::move(buffer);
  return data;
}

void release(void* data) {
  if (device_buffers().erase(data) == 0) {
    throw std::runtime_error("release of something that allocate did not return");
  }
}

void AsyncCopies::issue(void* dst, const void* src, size_t bytes, size_t src_bytes) {
  if (bytes != 4 && bytes != 8 && bytes != 16) fail("cp_async copies 4, 8 or 16 bytes");
  if (src_bytes > bytes) fail("cp_async with more source bytes than bytes");
  if (reinterpret_cast<uintptr_t>(dst) % bytes != 0) fail("cp_async to a misaligned address");
  if (src_bytes != 0 && reinterpret_cast<uintptr_t>(src) % bytes != 0) {
    fail("cp_async from a misaligned address");
  }
  Copy copy{dst, src, bytes, src_bytes, groups_, {}};
  std::memcpy(copy.data, src, src_bytes);
  std::memset(dst, kPoison, bytes);
  pending_.push_back(copy);
}

void AsyncCopies::finish(const Copy& copy) {
  if (std::memcmp(copy.data, copy.src, copy.src_bytes) != 0) {
    fail("the source of a cp_async changed before the wait for it");
  }
  std::memcpy(copy.dst, copy.data, copy.bytes);
}

void AsyncCopies::wait(unsigned newest) {
  auto copy = pending_.begin();
  for (; copy != pending_.end() && copy->group + newest < groups_; ++copy) finish(*copy);
  pending_.erase(pending_.begin(), copy);
}

void AsyncCopies::wait_all() {
  for (const Copy& copy : pending_) finish(copy);
  pending_.clear();
}

void AsyncCopies::clear() {
  pending_.clear();
  groups_ = 0;
}

namespace {

/// The 8 bytes of an mbarrier. `tag` tells an initialised one from poison and from zeros.
struct Mbarrier {
  uint64_t pending : 20, count : 20, phase : 1, tag : 2;
  int64_t tx : 21;
};
static_assert(sizeof(Mbarrier) == sizeof(uint64_t));
constexpr uint64_t kInitialised = 2;
constexpr int64_t kMostTx = (1 << 20) - 1;

/// Reads the mbarrier, lets `change` modify it, ends the phase if that is due, and stores it.
template <class Change>
void update(uint64_t* bar, Change change) {
  Mbarrier value;
  std::memcpy(&value, bar, sizeof(value));
  if (value.tag != kInitialised) fail("use of an mbarrier that is not initialised");
  change(value);
  if (value.pending == 0 && value.tx == 0) {
    value.phase ^= 1;
    value.pending = value.count;
  }
  std::memcpy(bar, &value, sizeof(value));
  made_progress();
}

void add_tx(Mbarrier& value, int64_t bytes) {
  const int64_t tx = value.tx + bytes;
  if (tx > kMostTx || tx < -kMostTx) fail("an mbarrier's count of bytes overflows");
  value.tx = tx;
}

void count_arrival(Mbarrier& value) {
  if (value.pending == 0) fail("more arrivals at an mbarrier than its count");
  value.pending -= 1;
}

}  // namespace

void mbarrier_init(uint64_t* bar, unsigned count) {
  if (count == 0 || count > kMostTx) fail("mbarrier_init with a count out of range");
  if (reinterpret_cast<uintptr_t>(bar) % sizeof(uint64_t) != 0) fail("a misaligned mbarrier");
  Mbarrier value{};
  value.pending = value.count = count;
  value.tag = kInitialised;
  std::memcpy(bar, &value, sizeof(value));
}

void mbarrier_arrive(uint64_t* bar) { update(bar, count_arrival); }

void mbarrier_expect_tx(uint64_t* bar, unsigned bytes) {
  update(bar, [=](Mbarrier& value) { add_tx(value, bytes); });
}

void mbarrier_arrive_expect_tx(uint64_t* bar, unsigned bytes) {
  update(bar, [=](Mbarrier& value) {
    add_tx(value, bytes);
    count_arrival(value);
  });
}

void mbarrier_complete_tx(uint64_t* bar, unsigned bytes) {
  update(bar, [=](Mbarrier& value) { add_tx(value, -static_cast<int64_t>(bytes)); });
}

bool mbarrier_try_wait(uint64_t* bar, unsigned parity) {
  Mbarrier value;
  std::memcpy(&value, bar, sizeof(value));
  if (value.tag != kInitialised) fail("wait at an mbarrier that is not initialised");
  return value.phase != (parity & 1);
}

void set_last_error(const char* message) { last_error = message; }

}  // namespace cuda_host

extern "C" {

void* fastrnn_host_allocate(size_t bytes, const char* name, size_t alignment) {
  void* data = nullptr;
  cuda_host::guarded([&] { data = cuda_host::allocate(bytes, name, alignment); });
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
