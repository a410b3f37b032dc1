// What the CUDA ops share: the device and its current stream, memory from torch's allocator, views
// of tensors as the kernels' plain structs. Built for emulation, the device is the CPU.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <limits>

#include "cuda/kernels.h"
#include "tensors.h"

#if defined(PYCDGKD_EMULATE)
#define PYCDGKD_CUDA_KEY CPU
#else
#define PYCDGKD_CUDA_KEY CUDA
#endif

namespace pycdgkd {

// torch's current stream of a device; the function lives in a library that a CPU build of torch
// does not have, so it is looked up, not linked.
cuda::Stream current_stream(int32_t device);

// The device of one call: all its tensors lie there, and it is the current one while this lives.
class OnDevice {
 public:
  OnDevice(const Arguments& args, const std::string& name, const Tensor& first)
      : op_(args.op()), name_(name), device_(first.device()) {
#if !defined(PYCDGKD_EMULATE)
    guard_.emplace(static_cast<torch::stable::accelerator::DeviceIndex>(device_.index()));
#endif
    stream_ = current_stream(device_.index());
  }
  cuda::Stream stream() const { return stream_; }
  const torch::stable::Device& device() const { return device_; }

  void check(const std::string& argument, const Tensor& tensor) const {
    if (tensor.device() == device_) return;
    fail(op_, argument, "the device of " + name_, "another device");
  }

  Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type) const {
    std::array<int64_t, 4> strides{};
    int64_t count = 1;
    for (size_t d = sizes.size(); d-- > 0;) {
      strides[d] = count;
      count *= sizes.begin()[d] > 0 ? sizes.begin()[d] : 1;
    }
    AtenTensorHandle handle = nullptr;
    PYCDGKD_CHECK_TORCH(aoti_torch_empty_strided(
        static_cast<int64_t>(sizes.size()), sizes.begin(), strides.data(),
        torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
        torch::stable::detail::to<int32_t>(torch::stable::detail::from(device_.type())),
        device_.index(), &handle));
    return Tensor(handle);
  }

  // Working space; the allocator keeps it for this stream until the kernels are done.
  Tensor workspace(size_t bytes) const {
    return empty({static_cast<int64_t>(bytes > 0 ? bytes : 1)}, ScalarType::Byte);
  }

  // Where it is not wanted, an output is empty.
  Tensor output(std::initializer_list<int64_t> sizes, ScalarType type, bool wanted) const {
    return wanted ? empty(sizes, type) : empty({0}, type);
  }

  cuda::Labels labels(const Tensor& labels, int64_t N, int64_t K, int64_t ignore_index) const {
    if (labels.dim() != 1 || labels.size(0) != N) {
      fail(op_, "labels", "shape (" + std::to_string(N) + ",)", describe(labels));
    }
    if (K < 1 || K > std::numeric_limits<int32_t>::max() / 2) {
      fail(op_, "number of classes", "at least 1 and below 2^30", std::to_string(K));
    }
    check("labels", labels);
    cuda::LabelType type;
    switch (labels.scalar_type()) {
      case ScalarType::Long:
        type = cuda::LabelType::int64;
        break;
      case ScalarType::Int:
        type = cuda::LabelType::int32;
        break;
      case ScalarType::Byte:
        type = cuda::LabelType::uint8;
        break;
      default:
        fail(op_, "labels", "int64, int32 or uint8", describe(labels));
    }
    // An address even where there is none: null means no labels at all.
    const void* data = N > 0 ? labels.const_data_ptr() : op_;
    return {data, labels.stride(0), type, ignore_index};
  }

  cuda::ClassCounts class_counts(const std::optional<Tensor>& counts, int64_t K) const {
    if (!counts.has_value()) return {nullptr, 0};
    if (counts->dim() != 1 || counts->size(0) != K || counts->scalar_type() != ScalarType::Long) {
      fail(op_, "class_counts", "int64 of shape (" + std::to_string(K) + ",)", describe(*counts));
    }
    check("class_counts", *counts);
    return {static_cast<const int64_t*>(counts->const_data_ptr()), counts->stride(0)};
  }

  // A scalar, or a vector's elements.
  cuda::Values values(const std::string& argument, const Tensor& tensor) const {
    check(argument, tensor);
    return {tensor.const_data_ptr(), tensor.dim() == 0 ? 0 : tensor.stride(0),
            dtype_of(op_, argument, tensor)};
  }

 private:
  const char* op_;
  std::string name_;
  torch::stable::Device device_;
#if !defined(PYCDGKD_EMULATE)
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
#endif
  cuda::Stream stream_ = nullptr;
};

inline void* data_or_null(const Tensor& tensor, bool wanted) {
  return wanted ? tensor.mutable_data_ptr() : nullptr;
}

}  // namespace pycdgkd
