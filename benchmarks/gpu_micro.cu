// SPDX-License-Identifier: Apache-2.0
//
// Microbenchmarks of what the CUDA kernels are built on: exchanges between blocks, a bare step of
// the recurrence, latencies, launches. Prints one JSON object: a list of entries for each section,
// of which each has numbers or an "error". Times of rounds are medians over runs, in cycles of the
// multiprocessor (clock64) and nanoseconds (globaltimer), and "ghz" is the clock that they imply.
//
//   nvcc -O3 -std=c++17 -arch=native -o gpu_micro benchmarks/gpu_micro.cu && ./gpu_micro
//
// What is expected, and which decision hangs on it, stands at the head of each file in gpu_micro/.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "gpu_micro/cluster.cuh"
#include "gpu_micro/host.cuh"
#include "gpu_micro/latency.cuh"
#include "gpu_micro/launch.cuh"
#include "gpu_micro/packets.cuh"
#include "gpu_micro/step.cuh"

namespace {

/// Seconds until a section is ended.
constexpr unsigned kLimit = 12;

struct Section {
  const char* name;
  void (*measure)();
};

constexpr Section kSections[] = {
    {"device", measure_device},
    {"residency", measure_residency},
    {"cluster_exchange", measure_cluster_exchange},
    {"packet_exchange", measure_packet_exchange},
    {"step", measure_steps},
    {"latency", measure_latencies},
    {"launch", measure_launch_overhead},
};

__global__ void spin(long long nanoseconds) {
  const long long start = read_nanoseconds();
  // Cycles too, lest a timer that stands still keeps it here.
  const long long start_cycles = read_cycles();
  while (read_nanoseconds() - start < nanoseconds && read_cycles() - start_cycles < 1'000'000'000) {
  }
}

/// An idle GPU runs at a low clock.
void warm_up() {
  launch(spin, {132, 256}, 200'000'000);
  check(cudaDeviceSynchronize(), "warm-up");
}

/// Never returns. Prints one entry a line.
[[noreturn]] void run_child(const Section& section, int output) {
  alarm(kLimit);
  dup2(output, STDOUT_FILENO);
  try {
    warm_up();
    section.measure();
  } catch (const std::exception& error) {
    Entry("section").set("error", std::string(error.what())).print();
  }
  _exit(0);
}

/// The lines that a child process prints. A kernel that faults spoils its process only, and one
/// that hangs is ended with it.
std::vector<std::string> run(const Section& section) {
  std::fflush(stdout);
  int ends[2];
  if (pipe(ends) != 0) return {"{\"error\": \"no pipe\"}"};
  const pid_t child = fork();
  if (child == 0) {
    close(ends[0]);
    run_child(section, ends[1]);
  }
  close(ends[1]);
  std::string text;
  char part[4096];
  for (ssize_t size; (size = read(ends[0], part, sizeof part)) > 0;) text.append(part, size);
  close(ends[0]);
  int status = -1;
  if (child > 0) waitpid(child, &status, 0);

  std::vector<std::string> lines;
  for (size_t begin = 0, end; (end = text.find('\n', begin)) != std::string::npos;
       begin = end + 1) {
    if (text[begin] == '{') lines.push_back(text.substr(begin, end - begin));
  }
  if (status != 0) {
    const int signal = WIFSIGNALED(status) ? WTERMSIG(status) : 0;
    lines.push_back("{\"what\": \"section\", \"error\": \"" +
                    (signal == SIGALRM ? std::string("ended after its limit of time")
                                       : "ended by signal " + std::to_string(signal)) +
                    "\"}");
  }
  return lines;
}

}  // namespace

int main() {
  bool any = false;
  std::printf("{");
  for (const Section& section : kSections) {
    std::printf("%s\n\"%s\": [", &section == kSections ? "" : ",", section.name);
    const char* separator = "\n  ";
    for (const std::string& line : run(section)) {
      any = any || line.find("\"error\"") == std::string::npos;
      std::printf("%s%s", separator, line.c_str());
      separator = ",\n  ";
    }
    std::printf("]");
  }
  std::printf("\n}\n");
  return any ? 0 : 1;
}
