// CUDA's words on the CPU, for tests where no GPU is: the kernels' own source runs here, thread by
// thread, with its barriers and shuffles.
//
// A block's threads are fibers. One runs until it meets a barrier or ends; a barrier opens once all
// threads that it joins have come. Which thread goes first changes from barrier to barrier, so that
// a missing barrier shows as a wrong result; a barrier that not all threads reach, which would hang
// or corrupt a GPU, is an error; built with address sanitizing, so is an access out of bounds.
// Clusters of blocks run one after another, in order; the blocks of a cluster run together.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __restrict__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __grid_constant__

namespace pycdgkd {
namespace cuda {

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};

inline constexpr int warpSize = 32;

namespace emulator {

struct Coordinates {
  dim3 thread, block, block_size, grid_size;
  unsigned rank, cluster;  // the block's place in its cluster, the cluster's size
};
extern Coordinates here;  // of the thread that runs

// `cluster` blocks that follow one another in x form a cluster.
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body,
              unsigned cluster = 1);
char* shared_memory(unsigned rank);
void block_barrier();
void cluster_barrier();
// Joins the warp's threads named in `mask`: puts in one 8-byte value, takes that of `lane`.
uint64_t exchange(unsigned mask, uint64_t value, int lane);
unsigned vote(unsigned mask, bool condition);
[[noreturn]] void trap();

template <class T>
T shuffle(unsigned mask, T value, int lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(mask, bits, lane);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline int lane() {
  const dim3 &t = here.thread, &size = here.block_size;
  return static_cast<int>((t.x + size.x * (t.y + size.y * t.z)) % 32);
}

}  // namespace emulator

#define threadIdx (::pycdgkd::cuda::emulator::here.thread)
#define blockIdx (::pycdgkd::cuda::emulator::here.block)
#define blockDim (::pycdgkd::cuda::emulator::here.block_size)
#define gridDim (::pycdgkd::cuda::emulator::here.grid_size)

inline void __syncthreads() { emulator::block_barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator::vote(mask, false); }
inline void __threadfence() {}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return emulator::shuffle(mask, value, lane & 31);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return emulator::shuffle(mask, value, emulator::lane() ^ bits);
}
inline int __reduce_max_sync(unsigned mask, int value) {
  for (int bits = 16; bits > 0; bits /= 2) {
    value = std::max(value, __shfl_xor_sync(mask, value, bits));
  }
  return value;
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int by) {
  const int from = emulator::lane() + by;
  return emulator::shuffle(mask, value, from < 32 ? from : emulator::lane());
}
inline unsigned __ballot_sync(unsigned mask, bool condition) {
  return emulator::vote(mask, condition);
}
inline bool __any_sync(unsigned mask, bool condition) {
  return emulator::vote(mask, condition) != 0;
}
inline bool __all_sync(unsigned mask, bool condition) {
  return emulator::vote(mask, !condition) == 0;
}

template <class T>
T __ldg(const T* at) {
  return *at;
}
template <class T>
T __ldcs(const T* at) {
  return *at;
}
template <class T>
void __stcs(T* at, T value) {
  *at = value;
}
inline unsigned atomicAdd(unsigned* at, unsigned value) {
  const unsigned before = *at;
  *at = before + value;
  return before;
}
inline unsigned atomicInc(unsigned* at, unsigned limit) {
  const unsigned before = *at;
  *at = before >= limit ? 0 : before + 1;
  return before;
}
inline float __expf(float x) { return std::exp(x); }
inline float exp2_approximate(float x) { return std::exp2(x); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

// ---- the host's side ----------------------------------------------------------------------------

using Stream = void*;

template <auto kernel, class... Args>
void launch(dim3 grid, dim3 block, size_t shared_bytes, Stream, const Args&... args) {
  emulator::run_grid(grid, block, shared_bytes, [&] { kernel(args...); });
}

template <auto kernel, class... Args>
void launch_early(dim3 grid, dim3 block, size_t shared_bytes, Stream stream, const Args&... args) {
  launch<kernel>(grid, block, shared_bytes, stream, args...);
}

template <auto kernel, class... Args>
void launch_clusters(unsigned clusters, unsigned size, unsigned threads, size_t shared_bytes,
                     Stream, const Args&... args) {
  emulator::run_grid(clusters * size, threads, shared_bytes, [&] { kernel(args...); }, size);
}
template <auto kernel>
unsigned resident_clusters(unsigned, unsigned, size_t) {
  return 3;
}

struct DeviceLimits {
  int multiprocessors;
  size_t shared_bytes;
};
// A small device, so that small tests fill it; PYCDGKD_EMULATED_SHARED overrides its shared memory.
DeviceLimits device_limits();

inline int current_device() { return 0; }
inline void zero_async(void* data, size_t bytes, Stream) { std::memset(data, 0, bytes); }
inline bool is_capturing(Stream) { return false; }
inline char* dynamic_shared() { return emulator::shared_memory(emulator::here.rank); }
// Small clusters of small blocks, so that short rows need several.
template <auto kernel>
unsigned most_cluster_blocks() {
  return 4;
}
inline unsigned most_cluster_threads() { return 64; }
inline unsigned cluster_rank() { return emulator::here.rank; }
inline unsigned cluster_size() { return emulator::here.cluster; }
inline void cluster_barrier(bool) { emulator::cluster_barrier(); }
template <class T>
T* in_block(T* shared, unsigned rank) {
  return reinterpret_cast<T*>(emulator::shared_memory(rank) +
                              (reinterpret_cast<char*>(shared) - dynamic_shared()));
}
inline void copy_async(void* shared, const void* from) { std::memcpy(shared, from, 16); }
inline void await_copies() {}
inline void prefetch(const void*, unsigned) {}
inline void await_previous() {}
inline void let_next_begin() {}
inline void require(bool condition) {
  if (!condition) emulator::trap();
}

}  // namespace cuda
}  // namespace pycdgkd
