// SPDX-License-Identifier: Apache-2.0
//
// What becomes of a kernel that touches an inaccessible page, divides by zero, or aborts.
#pragma once

#include <signal.h>

namespace cuda_host {

constexpr int kFaultSignals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT};

/// As long as this lives, a fault ends the launch with an error in place of the process. The
/// handlers that were there before (those of pytest's faulthandler) then come back.
class FaultHandlers {
 public:
  FaultHandlers();
  ~FaultHandlers();
  FaultHandlers(const FaultHandlers&) = delete;
  FaultHandlers& operator=(const FaultHandlers&) = delete;

 private:
  stack_t old_stack_;
  struct sigaction old_[sizeof(kFaultSignals) / sizeof(int)];
};

}  // namespace cuda_host
