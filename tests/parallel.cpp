// SPDX-License-Identifier: Apache-2.0
//
// A region of parallel.h for two threads, one of them late on purpose, for test_parallel.py.
#include "parallel.h"

#include <unistd.h>

#include <atomic>

extern "C" {

/// Nanoseconds that may be lost by waiting from now on.
void set_credit(int64_t ns) {
  fastrnn::pool.credit = ns;
  fastrnn::pool.counted_at = fastrnn::now();
}

/// As if nobody had done anything for some milliseconds; the next call takes so long.
void rest(int64_t expected) {
  const int64_t before = fastrnn::now() - 2 * fastrnn::Pool::kAwake;
  fastrnn::pool.last_region = fastrnn::pool.last_share = before;
  fastrnn::pool.expected = expected;
}

/// Two turns, the second of which sleeps if it has a thread of its own, and the caller if it runs
/// both; the first waits for the second if it `needs` it. Returns how many threads there were.
int64_t run_region(int64_t milliseconds, bool needs, bool parallel) {
  std::atomic<int64_t> threads = 0;
  std::atomic<bool> done = false;
  const auto run = [&](int64_t begin, int64_t end) {
    ++threads;
    if (begin == 1 || end == 2) {
      usleep(milliseconds * 1000);
      done = true;
    }
    while (needs && end == 1 && !done) fastrnn::give_way();
  };
  fastrnn::share(2, 1, run, parallel);
  return threads;
}

}  // extern "C"
