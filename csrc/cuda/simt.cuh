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

inline void zero_async(void* data, size_t bytes, Stream stream) {
  check(cudaMemsetAsync(data, 0, bytes, stream));
}

inline bool is_capturing(Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

#if defined(__CUDACC__)
// Errors of the launch itself are told here, those of the run at the next synchronisation.
template <auto kernel, class... Args>
void launch(dim3 grid, dim3 block, size_t shared_bytes, Stream stream, const Args&... args) {
  if (shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)));
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, args...));
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
