// SPDX-License-Identifier: Apache-2.0
//
// Threads that share each step of a walk. Part of recurrence.inl.
//
// By the compiler's atomics: std::atomic's functions would be compiled for this target.

namespace {

class Rounds {
 public:
  explicit Rounds(const Team& team) : team_(team) {}

  /// Calls compute(slab, of how many) for this thread's slabs, and returns when all slabs of the
  /// round are in memory.
  template <typename Compute>
  FASTRNN_INLINE void next(const Compute& compute) {
    if (team_.slabs == nullptr) return compute(int64_t{0}, int64_t{1});
    for (int64_t slab = team_.begin; slab < team_.end; ++slab) compute(slab, team_.size);
    ++round_;
    for (int64_t slab = team_.begin; slab < team_.end; ++slab)
      __atomic_store_n(&team_.slabs[slab].done, round_, __ATOMIC_RELEASE);
    for (int64_t slab = 0; slab < team_.size; ++slab) await(slab);
  }

 private:
  /// Without a pause between two looks: it can double the time of a hand-over. A thread that is
  /// late by some microseconds may be waiting for this core.
  FASTRNN_INLINE void await(int64_t slab) const {
    constexpr int64_t kPatience = 4000;  // looks
    for (int64_t look = 0;; ++look) {
      if (__atomic_load_n(&team_.slabs[slab].done, __ATOMIC_ACQUIRE) >= round_) return;
      if (look >= kPatience) team_.give_way();
    }
  }

  const Team team_;
  int64_t round_ = 0;  // done by this thread
};

}  // namespace
