// Between torch's stable ABI and the kernels, the same for every device: argument checks with one
// form of message (op, argument, expected, got) and views of tensors as plain structs.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

// Before 2.13 torch's headers can only say which call failed (torch itself logs why), and say it by
// a stream: beside a CUDA build of torch 2.11, writing a number to one crashed in this library.
#ifdef STABLE_TORCH_ERROR_CODE_CHECK
#define PYCDGKD_CHECK_TORCH STABLE_TORCH_ERROR_CODE_CHECK
#else
#define PYCDGKD_CHECK_TORCH(call) \
  if ((call) != TORCH_SUCCESS) throw std::runtime_error("pycdgkd: torch could not do: " #call)
#endif

namespace pycdgkd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

inline std::string name_of(ScalarType type) {
  std::string name = torch::headeronly::toString(type);
  for (const auto& [from, to] : {std::pair{"Float", "float32"},
                                 {"Double", "float64"},
                                 {"BFloat16", "bfloat16"},
                                 {"Half", "float16"},
                                 {"Long", "int64"},
                                 {"Int", "int32"},
                                 {"Byte", "uint8"}}) {
    if (name == from) return to;
  }
  return name;
}

inline std::string describe(const Tensor& tensor) {
  // No stream, see above.
  std::string text = name_of(tensor.scalar_type()) + " of shape (";
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    text += (d > 0 ? ", " : "") + std::to_string(tensor.size(d));
  }
  return text + ")";
}

[[noreturn]] inline void fail(const char* op, const std::string& argument,
                              const std::string& expected, const std::string& got) {
  throw std::runtime_error("pycdgkd." + std::string(op) + ": " + argument + ": expected " +
                           expected + ", got " + got);
}

inline std::string element(const char* name, size_t index) {
  return std::string(name) + "[" + std::to_string(index) + "]";
}

inline Dtype dtype_of(const char* op, const std::string& argument, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::Double:
      return Dtype::float64;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    case ScalarType::Half:
      return Dtype::float16;
    default:
      fail(op, argument, "float32, float64, bfloat16 or float16", describe(tensor));
  }
}

// One op's arguments: collects the arithmetic type (float64 only if every floating tensor is).
class Arguments {
 public:
  explicit Arguments(const char* op) : op_(op) {}

  const char* op() const { return op_; }
  bool wide() const { return wide_.value_or(false); }
  ScalarType arithmetic() const { return wide() ? ScalarType::Double : ScalarType::Float; }
  int64_t bytes() const { return wide() ? 8 : 4; }  // of an element of the arithmetic type

  // Of a floating tensor of any shape.
  Dtype dtype(const std::string& name, const Tensor& tensor) {
    const Dtype dtype = dtype_of(op_, name, tensor);
    arithmetic(name, dtype == Dtype::float64, tensor);
    return dtype;
  }

  // A (rows, columns) tensor; a negative size accepts any and is called by its letter.
  Matrix matrix(const std::string& name, const Tensor& tensor, int64_t rows, int64_t columns,
                const char* letters = "NK") {
    const Dtype dtype = dtype_of(op_, name, tensor);
    const bool fits = tensor.dim() == 2 && (rows < 0 || tensor.size(0) == rows) &&
                      (columns < 0 || tensor.size(1) == columns);
    if (!fits) {
      const auto text = [](int64_t size, char letter) {
        return size < 0 ? std::string(1, letter) : std::to_string(size);
      };
      fail(op_, name, "shape (" + text(rows, letters[0]) + ", " + text(columns, letters[1]) + ")",
           describe(tensor));
    }
    arithmetic(name, dtype == Dtype::float64, tensor);
    return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), dtype};
  }

  // An array that a forward op left for its backward op, read by pointer: anything else than what
  // that op made would be read out of bounds.
  void saved(const std::string& name, const Tensor& tensor, std::initializer_list<int64_t> sizes,
             ScalarType type) const {
    bool fits = tensor.scalar_type() == type && tensor.is_contiguous() &&
                tensor.dim() == static_cast<int64_t>(sizes.size());
    int64_t d = 0;
    for (const int64_t size : sizes) fits = fits && tensor.size(d++) == size;
    if (fits) return;
    std::string shape;
    for (const int64_t size : sizes) shape += (shape.empty() ? "" : ", ") + std::to_string(size);
    fail(op_, name, "what the forward op left: " + name_of(type) + " of shape (" + shape + ")",
         describe(tensor));
  }

  // The gradient of a loss: a scalar, or one value a row.
  void grad_loss(const Tensor& tensor, int64_t rows) const {
    dtype_of(op_, "grad_loss", tensor);
    if (tensor.dim() == 0 || (tensor.dim() == 1 && tensor.size(0) == rows)) return;
    fail(op_, "grad_loss", "a scalar or shape (" + std::to_string(rows) + ",)", describe(tensor));
  }

 private:
  void arithmetic(const std::string& name, bool wide, const Tensor& tensor) {
    if (wide_.has_value() && *wide_ != wide) {
      fail(op_, name,
           *wide_ ? "float64 like the other floating-point arguments"
                  : "no float64 beside arguments of lower precision",
           describe(tensor));
    }
    wide_ = wide;
  }

  const char* op_;
  std::optional<bool> wide_;
};

inline void check_modalities(const Arguments& args, const Tensors& features,
                             const Tensors& prototypes, const char* name = "prototypes") {
  if (features.empty()) fail(args.op(), "features", "at least one modality", "none");
  if (prototypes.size() != features.size()) {
    fail(args.op(), name, "as many tensors as features (" + std::to_string(features.size()) + ")",
         std::to_string(prototypes.size()));
  }
}

inline int64_t rows_of(const Arguments& args, const std::string& name, const Tensor& tensor,
                       const char* shape) {
  if (tensor.dim() != 2) fail(args.op(), name, shape, describe(tensor));
  return tensor.size(0);
}

}  // namespace pycdgkd
