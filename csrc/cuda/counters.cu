// The counters by which kernels find their last block.
#include <atomic>

#include "kernels.h"

namespace pycdgkd {
namespace cuda {
namespace {

// Two launches share a counter only if so many others were started between them: more than a GPU
// holds in flight.
constexpr unsigned kCounters = 1u << 16;
constexpr unsigned kMostTaken = 1024;  // room past the end, where a run of counters may reach
// A captured launch keeps its counters: it never runs beside itself. So a graph needs no node to
// zero them, which would take as long as a small kernel.
constexpr unsigned kCaptured = 1u << 18;
constexpr unsigned kFirstCaptured = kCounters + kMostTaken;
__device__ unsigned counters[kFirstCaptured + kCaptured];

// Null where the address would have to be asked for during a capture.
#if defined(PYCDGKD_EMULATE)
unsigned* counters_of_device(bool) { return counters; }
#else
unsigned* counters_of_device(bool capturing) {
  constexpr int kDevices = 64;
  static std::atomic<unsigned*> known[kDevices];
  int device = 0;
  check(cudaGetDevice(&device));
  unsigned* found = device < kDevices ? known[device].load() : nullptr;
  if (found == nullptr && !capturing) {
    void* address = nullptr;
    check(cudaGetSymbolAddress(&address, counters));
    found = static_cast<unsigned*>(address);
    if (device < kDevices) known[device].store(found);
  }
  return found;
}
#endif

}  // namespace

unsigned* take_counters(void* own, unsigned count, Stream stream) {
  static std::atomic<unsigned> next{0};
  static std::atomic<uint64_t> captured{0};
  const bool capturing = is_capturing(stream);
  unsigned* all = count <= kMostTaken ? counters_of_device(capturing) : nullptr;
  if (all != nullptr) {
    if (!capturing) return all + next.fetch_add(count) % kCounters;
    const uint64_t first = captured.fetch_add(count);
    if (first + count <= kCaptured) return all + kFirstCaptured + first;
  }
  zero_async(own, count * sizeof(unsigned), stream);
  return static_cast<unsigned*>(own);
}

}  // namespace cuda
}  // namespace pycdgkd
