#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace pycdgkd::cuda {

struct Device {
  std::string name;
  int major, minor;
  int multiprocessors;
  size_t memory_bytes;
};

int runtime_version();
std::vector<Device> devices();  // empty where there is no device or no driver

}  // namespace pycdgkd::cuda
