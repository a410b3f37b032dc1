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

enum class State { ready, at_block_barrier, at_warp_barrier, done };

// Switching goes by _setjmp and _longjmp, which are ten times faster than swapcontext (two system
// calls); address sanitizing understands the latter only.
struct Fiber {
  ucontext_t context;
  jmp_buf place;
  std::unique_ptr<char[]> stack;
  bool entered = false;
  State state = State::done;
  dim3 thread;
  unsigned mask = 0;
  uint64_t given = 0, taken[32] = {};
};

// The one block that runs, and the fibers of all blocks so far, which are kept for the next.
struct Block {
  std::vector<std::unique_ptr<Fiber>> fibers;
  size_t count = 0;
  Fiber* current = nullptr;
  ucontext_t scheduler;
  jmp_buf scheduler_place;
  const std::function<void()>* body = nullptr;
  std::vector<char> shared;
  std::string error;
  uint32_t order = 1;
#if defined(__SANITIZE_ADDRESS__)
  const void* main_stack = nullptr;
  size_t main_size = 0;
#endif
};

Block block;

struct Trap {};

#if defined(__SANITIZE_ADDRESS__)
void to_scheduler() {
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, block.main_stack, block.main_size);
  swapcontext(&block.current->context, &block.scheduler);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
}

void resume(Fiber& fiber) {
  block.current = &fiber;
  here.thread = fiber.thread;
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fiber.stack.get(), kStackBytes);
  swapcontext(&block.scheduler, &fiber.context);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
}
#else
void to_scheduler() {
  if (_setjmp(block.current->place) == 0) _longjmp(block.scheduler_place, 1);
}

void resume(Fiber& fiber) {
  block.current = &fiber;
  here.thread = fiber.thread;
  if (_setjmp(block.scheduler_place) != 0) return;
  if (fiber.entered) _longjmp(fiber.place, 1);
  fiber.entered = true;
  setcontext(&fiber.context);
}
#endif

// A fiber serves one thread of a block after another.
void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block.main_stack, &block.main_size);
#endif
  while (true) {
    try {
      (*block.body)();
    } catch (const Trap&) {
      block.error = "a kernel trapped";
    } catch (const std::exception& error) {
      block.error = error.what();
    }
    block.current->state = State::done;
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
  for (size_t first = 0; first < block.count; first += 32) {
    const size_t end = first + 32 < block.count ? first + 32 : block.count;
    for (size_t i = first; i < end; ++i) {
      if (block.fibers[i]->state != State::at_warp_barrier) continue;
      const unsigned mask = block.fibers[i]->mask;
      bool all = true;
      for (size_t j = first; j < end; ++j) {
        const Fiber& other = *block.fibers[j];
        const bool named = ((mask >> (j - first)) & 1u) != 0;
        // A thread that has returned is no longer waited for.
        if (named && other.state != State::done) {
          all = all && other.state == State::at_warp_barrier && other.mask == mask;
        }
      }
      if (!all) continue;
      for (size_t j = first; j < end; ++j) {
        Fiber& to = *block.fibers[j];
        if (((mask >> (j - first)) & 1u) == 0 || to.state == State::done) continue;
        for (size_t k = first; k < end; ++k) {
          to.taken[k - first] = block.fibers[k]->state == State::done ? 0 : block.fibers[k]->given;
        }
      }
      for (size_t j = first; j < end; ++j) {
        Fiber& to = *block.fibers[j];
        if (((mask >> (j - first)) & 1u) != 0 && to.state != State::done) to.state = State::ready;
      }
      opened = true;
    }
  }
  return opened;
}

bool open_block() {
  bool any = false;
  for (size_t i = 0; i < block.count; ++i) {
    const State state = block.fibers[i]->state;
    if (state == State::done) continue;
    if (state != State::at_block_barrier) return false;
    any = true;
  }
  for (size_t i = 0; any && i < block.count; ++i) {
    if (block.fibers[i]->state != State::done) block.fibers[i]->state = State::ready;
  }
  return any;
}

void run_block() {
  for (size_t i = 0; i < block.count; ++i) start(*block.fibers[i]);
  while (block.error.empty()) {
    // Another first thread, and another direction, each time.
    block.order = block.order * 1664525u + 1013904223u;
    const size_t offset = (block.order >> 8) % block.count;
    const bool backwards = (block.order >> 31) != 0;
    bool ran = false;
    for (size_t n = 0; n < block.count && block.error.empty(); ++n) {
      const size_t step = backwards ? block.count - n : n;
      Fiber& fiber = *block.fibers[(offset + step) % block.count];
      if (fiber.state != State::ready) continue;
      resume(fiber);
      ran = true;
    }
    if (!block.error.empty()) return;
    const bool opened = open_warps();
    if (ran || opened || open_block()) continue;
    for (size_t i = 0; i < block.count; ++i) {
      if (block.fibers[i]->state != State::done) {
        block.error = "a barrier that not all of its threads reach";
        return;
      }
    }
    return;
  }
}

}  // namespace

char* shared_memory() { return block.shared.data(); }

void block_barrier() {
  block.current->state = State::at_block_barrier;
  to_scheduler();
}

uint64_t exchange(unsigned mask, uint64_t value, int lane) {
  Fiber* self = block.current;
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
    if (((mask >> lane) & 1u) != 0 && block.current->taken[lane] != 0) votes |= 1u << lane;
  }
  return votes;
}

void trap() { throw Trap{}; }

void run_grid(dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()>& body) {
  const size_t count = size_t{size.x} * size.y * size.z;
  if (count == 0 || count > 1024 || grid.x == 0 || grid.y == 0 || grid.y > 65535 || grid.z == 0 ||
      grid.z > 65535 || shared_bytes > device_limits().shared_bytes) {
    throw std::runtime_error("pycdgkd: emulated CUDA: invalid launch configuration");
  }
  while (block.fibers.size() < count) block.fibers.push_back(std::make_unique<Fiber>());
  block.count = count;
  block.body = &body;
  block.error.clear();
  here.block_size = size;
  here.grid_size = grid;
  for (size_t i = 0; i < count; ++i) {
    const auto n = static_cast<unsigned>(i);
    block.fibers[i]->thread = {n % size.x, n / size.x % size.y, n / size.x / size.y};
  }
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        here.block = {x, y, z};
        // Not zeroed on a GPU either: all bits set are NaN in every type.
        block.shared.assign(shared_bytes, static_cast<char>(0xff));
        run_block();
        if (!block.error.empty()) {
          block.fibers.clear();  // some stand in the middle of the kernel
          throw std::runtime_error("pycdgkd: emulated CUDA: " + block.error);
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
