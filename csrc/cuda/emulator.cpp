// The fibers behind emulator.h.
#include "emulator.h"

#include <setjmp.h>
#include <ucontext.h>

#include <cstdlib>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace pycdgkd {
namespace cuda {
namespace emulator {

Coordinates here;

namespace {

constexpr size_t kStackBytes = size_t{256} << 10;

enum class State { ready, at_block_barrier, at_cluster_barrier, at_warp_barrier, done };

// Switching goes by _setjmp and _longjmp, which are ten times faster than swapcontext (two system
// calls); address sanitizing understands the latter only.
struct Fiber {
  ucontext_t context;
  jmp_buf place;
  std::unique_ptr<char[]> stack;
  bool entered = false;
  State state = State::done;
  dim3 thread;
  unsigned rank = 0;
  unsigned mask = 0;
  uint64_t given = 0, taken[32] = {};
};

// The one cluster that runs, and the fibers of all so far, which are kept for the next.
struct Cluster {
  std::vector<std::unique_ptr<Fiber>> fibers;
  size_t count = 0;        // threads of the cluster
  size_t block_count = 0;  // of each of its blocks
  dim3 first;              // block
  Fiber* current = nullptr;
  ucontext_t scheduler;
  jmp_buf scheduler_place;
  const std::function<void()>* body = nullptr;
  std::vector<char> shared;
  size_t shared_bytes = 0;  // of each block
  std::string error;
  uint32_t order = 1;
#if defined(__SANITIZE_ADDRESS__)
  const void* main_stack = nullptr;
  size_t main_size = 0;
#endif
};

Cluster cluster;

struct Trap {};

#if defined(__SANITIZE_ADDRESS__)
void to_scheduler() {
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, cluster.main_stack, cluster.main_size);
  swapcontext(&cluster.current->context, &cluster.scheduler);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
}

void resume(Fiber& fiber) {
  cluster.current = &fiber;
  here.thread = fiber.thread;
  here.rank = fiber.rank;
  here.block = {cluster.first.x + fiber.rank, cluster.first.y, cluster.first.z};
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fiber.stack.get(), kStackBytes);
  swapcontext(&cluster.scheduler, &fiber.context);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
}
#else
void to_scheduler() {
  if (_setjmp(cluster.current->place) == 0) _longjmp(cluster.scheduler_place, 1);
}

void resume(Fiber& fiber) {
  cluster.current = &fiber;
  here.thread = fiber.thread;
  here.rank = fiber.rank;
  here.block = {cluster.first.x + fiber.rank, cluster.first.y, cluster.first.z};
  if (_setjmp(cluster.scheduler_place) != 0) return;
  if (fiber.entered) _longjmp(fiber.place, 1);
  fiber.entered = true;
  setcontext(&fiber.context);
}
#endif

// A fiber serves one thread of a block after another.
void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &cluster.main_stack, &cluster.main_size);
#endif
  while (true) {
    try {
      (*cluster.body)();
    } catch (const Trap&) {
      cluster.error = "a kernel trapped";
    } catch (const std::exception& error) {
      cluster.error = error.what();
    }
    cluster.current->state = State::done;
    to_scheduler();
  }
}

void start(Fiber& fiber) {
  fiber.state = State::ready;
  if (fiber.stack) return;
  fiber.stack.reset(new char[kStackBytes]);
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
}

// Opens the barrier of every warp whose named threads have all come.
bool open_warps() {
  bool opened = false;
  for (size_t first = 0; first < cluster.count; first += 32) {
    const size_t end = first + 32 < cluster.count ? first + 32 : cluster.count;
    for (size_t i = first; i < end; ++i) {
      if (cluster.fibers[i]->state != State::at_warp_barrier) continue;
      const unsigned mask = cluster.fibers[i]->mask;
      bool all = true;
      for (size_t j = first; j < end; ++j) {
        const Fiber& other = *cluster.fibers[j];
        const bool named = ((mask >> (j - first)) & 1u) != 0;
        // A thread that has returned is no longer waited for.
        if (named && other.state != State::done) {
          all = all && other.state == State::at_warp_barrier && other.mask == mask;
        }
      }
      if (!all) continue;
      for (size_t j = first; j < end; ++j) {
        Fiber& to = *cluster.fibers[j];
        if (((mask >> (j - first)) & 1u) == 0 || to.state == State::done) continue;
        for (size_t k = first; k < end; ++k) {
          to.taken[k - first] =
              cluster.fibers[k]->state == State::done ? 0 : cluster.fibers[k]->given;
        }
      }
      for (size_t j = first; j < end; ++j) {
        Fiber& to = *cluster.fibers[j];
        if (((mask >> (j - first)) & 1u) != 0 && to.state != State::done) to.state = State::ready;
      }
      opened = true;
    }
  }
  return opened;
}

// Opens the barrier of the fibers from `first` to `end` if all that have not returned are there.
bool open(State barrier, size_t first, size_t end) {
  bool any = false;
  for (size_t i = first; i < end; ++i) {
    const State state = cluster.fibers[i]->state;
    if (state == State::done) continue;
    if (state != barrier) return false;
    any = true;
  }
  for (size_t i = first; any && i < end; ++i) {
    if (cluster.fibers[i]->state != State::done) cluster.fibers[i]->state = State::ready;
  }
  return any;
}

bool open_blocks() {
  bool opened = false;
  for (size_t first = 0; first < cluster.count; first += cluster.block_count) {
    opened = open(State::at_block_barrier, first, first + cluster.block_count) || opened;
  }
  return opened || open(State::at_cluster_barrier, 0, cluster.count);
}

void run_cluster() {
  for (size_t i = 0; i < cluster.count; ++i) start(*cluster.fibers[i]);
  while (cluster.error.empty()) {
    // Another first thread, and another direction, each time.
    cluster.order = cluster.order * 1664525u + 1013904223u;
    const size_t offset = (cluster.order >> 8) % cluster.count;
    const bool backwards = (cluster.order >> 31) != 0;
    bool ran = false;
    for (size_t n = 0; n < cluster.count && cluster.error.empty(); ++n) {
      const size_t step = backwards ? cluster.count - n : n;
      Fiber& fiber = *cluster.fibers[(offset + step) % cluster.count];
      if (fiber.state != State::ready) continue;
      resume(fiber);
      ran = true;
    }
    if (!cluster.error.empty()) return;
    const bool opened = open_warps();
    if (ran || opened || open_blocks()) continue;
    for (size_t i = 0; i < cluster.count; ++i) {
      if (cluster.fibers[i]->state != State::done) {
        cluster.error = "a barrier that not all of its threads reach";
        return;
      }
    }
    return;
  }
}

}  // namespace

char* shared_memory(unsigned rank) { return cluster.shared.data() + rank * cluster.shared_bytes; }

void block_barrier() {
  cluster.current->state = State::at_block_barrier;
  to_scheduler();
}

void cluster_barrier() {
  cluster.current->state = State::at_cluster_barrier;
  to_scheduler();
}

uint64_t exchange(unsigned mask, uint64_t value, int lane) {
  Fiber* self = cluster.current;
  self->mask = mask;
  self->given = value;
  self->state = State::at_warp_barrier;
  to_scheduler();
  return self->taken[lane];
}

unsigned vote(unsigned mask, bool condition) {
  exchange(mask, condition ? 1 : 0, 0);
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (((mask >> lane) & 1u) != 0 && cluster.current->taken[lane] != 0) votes |= 1u << lane;
  }
  return votes;
}

void trap() { throw Trap{}; }

void run_grid(dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()>& body,
              unsigned blocks) {
  const size_t count = size_t{size.x} * size.y * size.z;
  if (count == 0 || count > 1024 || grid.x == 0 || grid.y == 0 || grid.y > 65535 || grid.z == 0 ||
      grid.z > 65535 || shared_bytes > device_limits().shared_bytes || grid.x % blocks != 0 ||
      (blocks > 1 && count % 32 != 0)) {
    throw std::runtime_error("pycdgkd: emulated CUDA: invalid launch configuration");
  }
  cluster.count = count * blocks;
  cluster.block_count = count;
  while (cluster.fibers.size() < cluster.count) {
    cluster.fibers.push_back(std::make_unique<Fiber>());
  }
  cluster.body = &body;
  cluster.error.clear();
  cluster.shared_bytes = (shared_bytes + 15) / 16 * 16;
  here.block_size = size;
  here.grid_size = grid;
  here.cluster = blocks;
  for (size_t i = 0; i < cluster.count; ++i) {
    const auto n = static_cast<unsigned>(i % count);
    cluster.fibers[i]->thread = {n % size.x, n / size.x % size.y, n / size.x / size.y};
    cluster.fibers[i]->rank = static_cast<unsigned>(i / count);
  }
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; x += blocks) {
        cluster.first = {x, y, z};
        // Not zeroed on a GPU either: all bits set are NaN in every type.
        cluster.shared.assign(cluster.shared_bytes * blocks, static_cast<char>(0xff));
        run_cluster();
        if (!cluster.error.empty()) {
          cluster.fibers.clear();  // some stand in the middle of the kernel
          throw std::runtime_error("pycdgkd: emulated CUDA: " + cluster.error);
        }
      }
    }
  }
}

}  // namespace emulator

DeviceLimits device_limits() {
  static const char* given = std::getenv("PYCDGKD_EMULATED_SHARED");
  return {4, given != nullptr ? std::strtoull(given, nullptr, 10) : size_t{96} << 10};
}

}  // namespace cuda
}  // namespace pycdgkd
