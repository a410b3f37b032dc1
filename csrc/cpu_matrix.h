// torch's matrix product on plain arrays, on the calling thread alone.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <array>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

#include "tensors.h"

namespace pycdgkd {

// While it lives, matrix products of this thread use no other. The library that shares a product
// out sums in an order that depends on the number of threads; we share out whole products instead,
// so that the bits do not. Inside a parallel region that is not enough for MKL: it still cuts the
// work up as if for the threads it may not have. Other libraries run on one thread there.
class OneThread {
 public:
  OneThread() : previous_(set_threads() == nullptr ? 0 : set_threads()(1)) {}
  ~OneThread() {
    if (set_threads() != nullptr) set_threads()(previous_);
  }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  using SetThreads = int (*)(int);
  static SetThreads set_threads() {
#if defined(__unix__) || defined(__APPLE__)
    static const auto found =
        reinterpret_cast<SetThreads>(dlsym(RTLD_DEFAULT, "MKL_Set_Num_Threads_Local"));
    return found;
#else
    return nullptr;
#endif
  }
  int previous_;
};

// Products of fewer columns are summed class by class by some libraries, which costs digits where
// there are thousands of classes: they are made of pieces of so many classes.
inline constexpr int64_t kThin = 16, kPiece = 256;

// A (rows, columns) array of the arithmetic type as torch sees it.
inline Tensor array_view(void* data, int64_t rows, int64_t columns, bool wide, int64_t row_stride,
                         int64_t col_stride = 1) {
  const std::array<int64_t, 2> sizes{rows, columns}, strides{row_stride, col_stride};
  return torch::stable::from_blob(data, sizes, strides,
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                  wide ? ScalarType::Double : ScalarType::Float);
}

inline void matrix_product(const Tensor& a, const Tensor& b, const Tensor& out) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  PYCDGKD_CHECK_TORCH(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  // The result is `out` again, in a reference of its own.
  torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace pycdgkd
