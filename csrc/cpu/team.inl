// SPDX-License-Identifier: Apache-2.0
//
// Threads that share each step of a walk. Part of recurrence.inl.
//
// In each round a thread computes its own slab of the columns, then waits until the others' are
// done, since the next step reads all columns. A thread that the system does not let run would stop
// the team: so a slab whose thread is late and has not begun it goes to whoever claims it first. A
// late thread then finds its rounds done, passes through them and joins in again.
//
// By the compiler's atomics: std::atomic's functions would be compiled for this target.

namespace {

/// Turns of waiting before a slab counts as late: some microseconds, several times a hand-over.
constexpr int64_t kPatience = 4000;

class Rounds {
 public:
  explicit Rounds(const Team& team) : team_(team) {}

  /// Calls compute(slab, of how many) for the slabs that fall to this thread, and returns when all
  /// slabs of the round are in memory.
  template <typename Compute>
  FASTRNN_INLINE void next(const Compute& compute) {
    if (team_.slabs == nullptr) return compute(int64_t{0}, int64_t{1});
    if (claim(team_.home)) run(team_.home, compute);
    for (int64_t i = 1; i <= team_.size; ++i) await((team_.home + i) % team_.size, compute);
    ++round_;
  }

 private:
  bool claim(int64_t slab) {
    int64_t expected = round_;
    // A look first: an exchange takes the cache line, even in vain.
    if (__atomic_load_n(&team_.slabs[slab].claimed, __ATOMIC_RELAXED) != expected) return false;
    return __atomic_compare_exchange_n(&team_.slabs[slab].claimed, &expected, round_ + 1,
                                       /*weak=*/false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
  }

  bool is_done(int64_t slab) const {
    return __atomic_load_n(&team_.slabs[slab].done, __ATOMIC_ACQUIRE) > round_;
  }

  template <typename Compute>
  FASTRNN_INLINE void run(int64_t slab, const Compute& compute) {
    compute(slab, team_.size);
    __atomic_store_n(&team_.slabs[slab].done, round_ + 1, __ATOMIC_RELEASE);
  }

  /// Waits for a slab, or computes it where its thread is late, or was in the round before. Without
  /// a pause between two looks: it can double the time of a hand-over.
  template <typename Compute>
  FASTRNN_INLINE void await(int64_t slab, const Compute& compute) {
    const uint64_t bit = uint64_t{1} << slab;
    for (int64_t turn = 0; !is_done(slab); ++turn) {
      if (turn < kPatience && !(late_ & bit)) continue;
      if (claim(slab)) {
        late_ |= bit;
        return run(slab, compute);
      }
      late_ &= ~bit;  // begun
      if (turn >= kPatience) team_.give_way();
    }
  }

  const Team team_;
  int64_t round_ = 0;
  uint64_t late_ = 0;  // bit i: slab i
  static_assert(kMaxTeam <= 64);
};

}  // namespace
