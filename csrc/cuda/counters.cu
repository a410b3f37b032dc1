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
__device__ unsigned counters[kCounters + kMostTaken];

#if defined(PYCDGKD_EMULATE)
unsigned* counters_of_device() { return counters; }
#else
unsigned* counters_of_device() {
  constexpr int kDevices = 64;
  static std::atomic<unsigned*> known[kDevices];
  int device = 0;
  check(cudaGetDevice(&device));
  unsigned* found = device < kDevices ? known[device].load() : nullptr;
  if (found == nullptr) {
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
  if (is_capturing(stream) || count > kMostTaken) {
    zero_async(own, count * sizeof(unsigned), stream);
    return static_cast<unsigned*>(own);
  }
  static std::atomic<unsigned> next{0};
  return counters_of_device() + next.fetch_add(count) % kCounters;
}

}  // namespace cuda
}  // namespace pycdgkd
