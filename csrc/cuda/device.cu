// What the CUDA runtime sees: the facts that `pycdgkd doctor` reports about a machine's GPUs.
#include "device.h"

#include <cuda_runtime.h>

#include <stdexcept>

namespace pycdgkd::cuda {
namespace {

void check(cudaError_t status) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("pycdgkd._cuda: ") + cudaGetErrorString(status));
  }
}

}  // namespace

int runtime_version() {
  int version = 0;
  check(cudaRuntimeGetVersion(&version));
  return version;
}

std::vector<Device> devices() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaErrorNoDevice || status == cudaErrorInsufficientDriver) return {};
  check(status);
  std::vector<Device> found;
  for (int index = 0; index < count; ++index) {
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, index));
    found.push_back({properties.name, properties.major, properties.minor,
                     properties.multiProcessorCount, properties.totalGlobalMem});
  }
  return found;
}

}  // namespace pycdgkd::cuda
