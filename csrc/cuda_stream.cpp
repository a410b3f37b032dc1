#include <mutex>

#if !defined(PYCDGKD_EMULATE)
#include <dlfcn.h>
#endif

#include "cuda_tensors.h"

namespace pycdgkd {

#if defined(PYCDGKD_EMULATE)
cuda::Stream current_stream(int32_t) { return nullptr; }
#else
cuda::Stream current_stream(int32_t device) {
  using Current = AOTITorchError (*)(int32_t, void**);
  static const auto current = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    void* found =
        library != nullptr ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<Current>(found);
  }();
  if (current == nullptr) {
    throw std::runtime_error(
        "pycdgkd: libtorch_cuda.so with aoti_torch_get_current_cuda_stream is not loaded; expected "
        "a CUDA build of torch, 2.10 or newer; remedy: install one");
  }
  void* stream = nullptr;
  PYCDGKD_CHECK_TORCH(current(device, &stream));
  return static_cast<cuda::Stream>(stream);
}
#endif

}  // namespace pycdgkd
