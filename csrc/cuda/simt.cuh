// What the CUDA kernels are written in: CUDA itself, or, with PYCDGKD_EMULATE, the same words on
// the CPU (emulator.h). Everything device-dependent that a kernel uses is named here.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(PYCDGKD_EMULATE)
#include "emulator.h"
#else
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "answers.h"

namespace pycdgkd {
namespace cuda {

using Stream = cudaStream_t;

inline void check(cudaError_t status) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("pycdgkd: CUDA: ") + cudaGetErrorString(status));
  }
}

struct DeviceLimits {
  int multiprocessors;
  size_t shared_bytes;  // of one block
};

inline DeviceLimits device_limits() {
  int device = 0, shared = 0, multiprocessors = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  return {multiprocessors, static_cast<size_t>(shared)};
}

inline int current_device() {
  int device = 0;
  check(cudaGetDevice(&device));
  return device;
}

inline void zero_async(void* data, size_t bytes, Stream stream) {
  check(cudaMemsetAsync(data, 0, bytes, stream));
}

inline bool is_capturing(Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

inline unsigned most_cluster_threads() { return 512; }

#if defined(__CUDACC__)
template <auto kernel>
cudaFuncAttributes attributes_of() {
  cudaFuncAttributes found;
  check(cudaFuncGetAttributes(&found, kernel));
  return found;
}

// Once of each device as much as it has: another thread may be about to launch with more.
template <auto kernel>
void allow_shared(size_t bytes) {
  if (bytes <= 48 * 1024) return;
  static Answers<int, size_t> allowed;
  allowed.of(current_device(), [] {
    const size_t most = device_limits().shared_bytes - attributes_of<kernel>().sharedSizeBytes;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(most)));
    return most;
  });
}

// Blocks of a cluster at most: 1 where the device has no clusters, or the kernel, compiled for
// devices without, does not know of them.
template <auto kernel>
unsigned most_cluster_blocks() {
  int clusters = 0, major = 0;
  const int device = current_device();
  check(cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device));
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  if (clusters == 0 || attributes_of<kernel>().ptxVersion < 90) return 1;
  return major == 9 || major == 10 ? 16 : 8;
}

// Whether the kernel, on this device, knows to wait for what was launched before it
// (await_previous).
template <auto kernel>
bool can_wait() {
  static Answers<int, bool> known;
  const int device = current_device();
  return known.of(device, [&] {
    int major = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    return major >= 9 && attributes_of<kernel>().ptxVersion >= 90;
  });
}

class Launch {
 public:
  Launch(dim3 grid, dim3 block, size_t shared_bytes, Stream stream) {
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = attributes_;
  }
  Launch(const Launch&) = delete;

  void in_clusters(unsigned size) {
    if (size == 1) return;
    cudaLaunchAttribute& added = attributes_[config.numAttrs++];
    added.id = cudaLaunchAttributeClusterDimension;
    added.val.clusterDim.x = size;
    added.val.clusterDim.y = added.val.clusterDim.z = 1;
  }
  // As soon as the kernel before it allows (let_next_begin).
  void early() {
    cudaLaunchAttribute& added = attributes_[config.numAttrs++];
    added.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    added.val.programmaticStreamSerializationAllowed = 1;
  }

  cudaLaunchConfig_t config = {};

 private:
  cudaLaunchAttribute attributes_[2] = {};
};

// Errors of the launch itself are told here, those of the run at the next synchronisation.
template <auto kernel, class... Args>
void launch(dim3 grid, dim3 block, size_t shared_bytes, Stream stream, const Args&... args) {
  allow_shared<kernel>(shared_bytes);
  const Launch launch(grid, block, shared_bytes, stream);
  check(cudaLaunchKernelEx(&launch.config, kernel, args...));
}

// Of a kernel that calls await_previous() first: it may already wait on the device while the one
// before it in the stream ends, which saves most of what there is between two launches.
template <auto kernel, class... Args>
void launch_early(dim3 grid, dim3 block, size_t shared_bytes, Stream stream, const Args&... args) {
  allow_shared<kernel>(shared_bytes);
  Launch launch(grid, block, shared_bytes, stream);
  if (can_wait<kernel>()) launch.early();
  check(cudaLaunchKernelEx(&launch.config, kernel, args...));
}

// Clusters of `size` blocks that the device runs at once; 0: it cannot run one.
template <auto kernel>
unsigned resident_clusters(unsigned size, unsigned threads, size_t shared_bytes) {
  int count = 0;
  allow_shared<kernel>(shared_bytes);
  if (size == 1) {
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, static_cast<int>(threads),
                                                        shared_bytes));
    return static_cast<unsigned>(count * device_limits().multiprocessors);
  }
  if (size > 8) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  }
  Launch launch(dim3(size), dim3(threads), shared_bytes, nullptr);
  launch.in_clusters(size);
  check(cudaOccupancyMaxActiveClusters(&count, kernel, &launch.config));
  return static_cast<unsigned>(count);
}

// As launch_early.
template <auto kernel, class... Args>
void launch_clusters(unsigned clusters, unsigned size, unsigned threads, size_t shared_bytes,
                     Stream stream, const Args&... args) {
  allow_shared<kernel>(shared_bytes);
  Launch launch(dim3(clusters * size), dim3(threads), shared_bytes, stream);
  launch.in_clusters(size);
  if (can_wait<kernel>()) launch.early();
  check(cudaLaunchKernelEx(&launch.config, kernel, args...));
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ unsigned cluster_size() {
  unsigned size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
// Also a barrier of the block; what a warp that releases wrote before it, in whichever block, all
// see after it.
__device__ __forceinline__ void cluster_barrier(bool releases) {
  if (releases) {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  } else {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  }
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The same place of shared memory in another block of the cluster.
template <class T>
__device__ __forceinline__ T* in_block(T* shared, unsigned rank) {
  uint64_t address;
  // volatile: cheaper to work out again than to keep in registers.
  asm volatile("mapa.u64 %0, %1, %2;"
               : "=l"(address)
               : "l"(reinterpret_cast<uint64_t>(shared)), "r"(rank));
  return reinterpret_cast<T*>(address);
}
// Asks for memory that is read soon; address and size are multiples of 16.
__device__ __forceinline__ void prefetch(const void* from, unsigned bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}
// Until the kernels launched before this one have ended and all they wrote is to be seen. Every
// thread's first step in a kernel that launch_early starts.
__device__ __forceinline__ void await_previous() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}
// From when all blocks have come here, the next kernel may take its place and wait.
__device__ __forceinline__ void let_next_begin() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
#else
__device__ __forceinline__ void await_previous() {}
__device__ __forceinline__ void let_next_begin() {}
__device__ __forceinline__ unsigned cluster_rank() { return 0; }
__device__ __forceinline__ unsigned cluster_size() { return 1; }
__device__ __forceinline__ void cluster_barrier(bool) { __syncthreads(); }
template <class T>
__device__ __forceinline__ T* in_block(T* shared, unsigned) {
  return shared;
}
__device__ __forceinline__ void prefetch(const void*, unsigned) {}
#endif

// 16 bytes from memory to this block's shared memory, which this thread may read once it has
// awaited its copies.
__device__ __forceinline__ void copy_async(void* shared, const void* from) {
  const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void await_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// 2^x to 2 units in the last place; below 2^-126 it is 0.
__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ __align__(16) char pycdgkd_dynamic_shared[];
  return pycdgkd_dynamic_shared;
}

// A wrong value that only the device can see ends the kernel: nothing is read out of bounds.
__device__ __forceinline__ void require(bool condition) {
  if (!condition) __trap();
}
#endif  // the ops beside the kernels are compiled as plain C++

}  // namespace cuda
}  // namespace pycdgkd
#endif
