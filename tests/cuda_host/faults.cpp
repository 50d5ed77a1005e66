// SPDX-License-Identifier: Apache-2.0
//
// See faults.h. The signals are raised by the kernel's own instructions, so that the handler may
// allocate and leave with a jump; it runs on a stack of its own, since a fiber's may be exhausted.
#include "faults.h"

#include <ucontext.h>

#include <iterator>
#include <string>

#include "scheduler.h"

namespace cuda_host {
namespace {

std::string describe(int signal, const siginfo_t* info, const void* context) {
  if (signal == SIGFPE) return "integer division by zero";
  if (signal == SIGILL) return "trap";
  if (signal == SIGABRT) return "abort";
  if (scheduler.current->stack.owns(info->si_addr)) {
    return "stack overflow: a thread has " + std::to_string(kStackBytes) + " bytes";
  }
  if (info->si_code == SI_KERNEL) return "access to a misaligned or wild address";
  const char* access = "access ";
#if defined(__x86_64__)
  const auto* machine = static_cast<const ucontext_t*>(context);
  access = machine->uc_mcontext.gregs[REG_ERR] & 2 ? "write " : "read ";
#else
  (void)context;
#endif
  return access + GuardedBuffer::describe(info->si_addr);
}

void on_fault(int signal, siginfo_t* info, void* context) {
  if (scheduler.current == nullptr) {  // the host's own fault: it comes again, and kills
    ::signal(signal, SIG_DFL);
    return;
  }
  fail(describe(signal, info, context).c_str());
}

}  // namespace

FaultHandlers::FaultHandlers() {
  static char stack[64 << 10];
  stack_t ours{};
  ours.ss_sp = stack;
  ours.ss_size = sizeof(stack);
  sigaltstack(&ours, &old_stack_);
  struct sigaction action{};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (size_t i = 0; i < std::size(kFaultSignals); ++i) {
    sigaction(kFaultSignals[i], &action, &old_[i]);
  }
}

FaultHandlers::~FaultHandlers() {
  for (size_t i = 0; i < std::size(kFaultSignals); ++i) {
    sigaction(kFaultSignals[i], &old_[i], nullptr);
  }
  sigaltstack(&old_stack_, nullptr);
}

}  // namespace cuda_host
