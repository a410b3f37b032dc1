// Memory of the CPU ops: tensors and working space.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <array>
#include <cstdlib>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "tensors.h"

namespace pycdgkd {

// Memory that the system has not handed out yet costs a page fault for each 4 KiB at first touch;
// for large results that takes longer than computing them. Huge pages make it 512 times fewer.
inline void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr size_t worthwhile = size_t{4} << 20;
  if (bytes < worthwhile) return;
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  // Advice only: where it is not taken, nothing is lost.
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

inline int64_t size_of(ScalarType type) {
  return type == ScalarType::Double || type == ScalarType::Long
             ? 8
             : (type == ScalarType::Half || type == ScalarType::BFloat16 ? 2 : 4);
}

inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type) {
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
      aoti_torch_device_type_cpu(), 0, &handle));
  Tensor tensor(handle);
  advise_huge_pages(tensor.mutable_data_ptr(), static_cast<size_t>(count * size_of(type)));
  return tensor;
}

inline Tensor empty_like_contiguous(const Tensor& like) {
  return empty({like.size(0), like.size(1)}, like.scalar_type());
}

// Working space for `count` elements of 4 or 8 bytes, aligned for vectors.
class Workspace {
 public:
  Workspace(int64_t count, bool wide) : element_(wide ? 8 : 4) {
    const size_t bytes =
        (static_cast<size_t>(std::max<int64_t>(count, 1)) * element_ + 63) / 64 * 64;
    data_.reset(static_cast<char*>(std::aligned_alloc(64, bytes)));
    if (data_ == nullptr) throw std::bad_alloc();
    advise_huge_pages(data_.get(), bytes);
  }
  void* at(int64_t index) { return data_.get() + static_cast<size_t>(index) * element_; }

 private:
  struct Free {
    void operator()(char* data) const { std::free(data); }
  };
  size_t element_;
  std::unique_ptr<char, Free> data_;
};

}  // namespace pycdgkd
