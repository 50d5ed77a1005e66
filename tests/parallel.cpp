// SPDX-License-Identifier: Apache-2.0
//
// A region of parallel.h for two threads, one of them late on purpose, for test_parallel.py.
#include "parallel.h"

#include <unistd.h>

extern "C" {

/// Nanoseconds that the account holds from now on.
void set_saved(int64_t ns) {
  fastrnn::saved = ns;
  fastrnn::counted_at = fastrnn::now();
}

/// Threads took so long to wake up, so many seconds ago.
void set_wake_time(int64_t ns, int64_t seconds) {
  fastrnn::rest.wake_time = ns;
  fastrnn::rest.woken_at = fastrnn::now() - seconds * 1'000'000'000;
}

/// As if nobody had done anything for some milliseconds.
void rest() {
  fastrnn::rest.last_region = fastrnn::rest.last_share = fastrnn::now() - 2 * fastrnn::kAwake;
}

/// Two turns, the second of which sleeps if it has a thread of its own, and the caller if it runs
/// both; the first waits for the second if it `needs` it. In a call of so many multiply-adds.
/// Returns how many threads there were.
int64_t run_region(int64_t milliseconds, bool needs, bool parallel, int64_t multiply_adds) {
  const fastrnn::Call call(multiply_adds);
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
