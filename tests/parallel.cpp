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

/// Two turns, the second of which sleeps if it has a thread of its own; the first waits for it if
/// it `needs` it. Returns how many threads there were.
int64_t run_region(int64_t milliseconds, bool needs, bool parallel) {
  std::atomic<int64_t> threads = 0;
  std::atomic<bool> done = false;
  const auto run = [&](int64_t begin, int64_t end) {
    ++threads;
    if (begin == 1) {
      usleep(milliseconds * 1000);
      done = true;
    }
    while (needs && end == 1 && !done) fastrnn::give_way();
  };
  fastrnn::share(2, 1, run, parallel);
  return threads;
}

}  // extern "C"
