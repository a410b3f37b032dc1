// Values that the CPU ops read from tensors or write to them: labels, class counts, small vectors.
#pragma once

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "cpu_memory.h"
#include "row_math.h"

namespace pycdgkd {

inline void torch_threads(int64_t count, int64_t grain, RangeBody body, void* context) {
  if (count <= grain) {
    if (count > 0) body(0, count, context);
    return;
  }
  torch::stable::parallel_for(0, count, grain,
                              [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

inline double sum_of(const std::vector<double>& values) {
  double sum = 0.0;
  for (const double value : values) sum += value;
  return sum;
}

inline double at_least_one(int64_t count) {
  return static_cast<double>(std::max<int64_t>(count, 1));
}

// Element i of a 1-D (or 0-D) floating tensor.
inline double value_at(const Tensor& tensor, int64_t i) {
  const int64_t at = tensor.dim() == 0 ? 0 : i * tensor.stride(0);
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return static_cast<const double*>(tensor.const_data_ptr())[at];
    case ScalarType::Float:
      return static_cast<const float*>(tensor.const_data_ptr())[at];
    case ScalarType::BFloat16:
      return baseline::to_arithmetic(
          static_cast<const baseline::bfloat16*>(tensor.const_data_ptr())[at]);
    case ScalarType::Half:
      return baseline::to_arithmetic(
          static_cast<const baseline::float16*>(tensor.const_data_ptr())[at]);
    default:
      throw std::runtime_error("pycdgkd: expected a floating tensor, got " + describe(tensor));
  }
}

inline void fill(Tensor& out, const double* values, int64_t count) {
  void* data = out.mutable_data_ptr();
  for (int64_t i = 0; i < count; ++i) {
    if (out.scalar_type() == ScalarType::Double) {
      static_cast<double*>(data)[i] = values[i];
    } else {
      static_cast<float*>(data)[i] = static_cast<float>(values[i]);
    }
  }
}

// A 1-D output filled from doubles.
inline Tensor filled(const std::vector<double>& values, ScalarType type) {
  const auto count = static_cast<int64_t>(values.size());
  Tensor out = empty({count}, type);
  fill(out, values.data(), count);
  return out;
}

inline Tensor scalar(double value, ScalarType type) {
  Tensor out = empty({}, type);
  fill(out, &value, 1);
  return out;
}

template <class Integer>
void read_labels(const Arguments& args, const Tensor& labels, int64_t K, int64_t ignore_index,
                 std::vector<int32_t>& classes) {
  const auto* data = static_cast<const Integer*>(labels.const_data_ptr());
  const int64_t stride = labels.stride(0);
  for (size_t i = 0; i < classes.size(); ++i) {
    const auto label = static_cast<int64_t>(data[static_cast<int64_t>(i) * stride]);
    const bool ignored = label == ignore_index;
    if (!ignored && (label < 0 || label >= K)) {
      fail(args.op(), element("labels", i),
           "a class from 0 to " + std::to_string(K - 1) + " or ignore_index (" +
               std::to_string(ignore_index) + ")",
           std::to_string(label));
    }
    classes[i] = ignored ? -1 : static_cast<int32_t>(label);
  }
}

// Class of each row, -1 where it is ignored.
inline std::vector<int32_t> read_classes(const Arguments& args, const Tensor& labels, int64_t N,
                                         int64_t K, int64_t ignore_index) {
  if (labels.dim() != 1 || labels.size(0) != N) {
    fail(args.op(), "labels", "shape (" + std::to_string(N) + ",)", describe(labels));
  }
  if (K < 1 || K > std::numeric_limits<int32_t>::max() / 2) {
    fail(args.op(), "number of classes", "at least 1 and below 2^30", std::to_string(K));
  }
  std::vector<int32_t> classes(static_cast<size_t>(N));
  switch (labels.scalar_type()) {
    case ScalarType::Long:
      read_labels<int64_t>(args, labels, K, ignore_index, classes);
      break;
    case ScalarType::Int:
      read_labels<int32_t>(args, labels, K, ignore_index, classes);
      break;
    case ScalarType::Byte:
      read_labels<uint8_t>(args, labels, K, ignore_index, classes);
      break;
    default:
      fail(args.op(), "labels", "int64, int32 or uint8", describe(labels));
  }
  return classes;
}

inline int64_t count_rows(const std::vector<int32_t>& classes) {
  return std::count_if(classes.begin(), classes.end(), [](int32_t c) { return c >= 0; });
}

inline void count_classes(const std::vector<int32_t>& classes, int64_t K, int64_t* counts) {
  std::fill(counts, counts + K, 0);
  for (const int32_t c : classes) {
    if (c >= 0) ++counts[c];
  }
}

// Which classes take part: all, or those with a count above zero.
inline std::vector<uint8_t> read_active(const Arguments& args, const std::optional<Tensor>& counts,
                                        int64_t K) {
  std::vector<uint8_t> active(static_cast<size_t>(K), 1);
  if (!counts.has_value()) return active;
  if (counts->dim() != 1 || counts->size(0) != K || counts->scalar_type() != ScalarType::Long) {
    fail(args.op(), "class_counts", "int64 of shape (" + std::to_string(K) + ",)",
         describe(*counts));
  }
  const auto* data = static_cast<const int64_t*>(counts->const_data_ptr());
  for (int64_t k = 0; k < K; ++k) active[k] = data[k * counts->stride(0)] > 0;
  return active;
}

// A row of an absent class has no prototype to be near to: it takes no part.
inline std::vector<int32_t> active_classes(std::vector<int32_t> classes,
                                           const std::vector<uint8_t>& active) {
  for (int32_t& c : classes) c = c >= 0 && active[c] ? c : -1;
  return classes;
}

// Eq. 6.
inline std::vector<double> weights_from(const std::vector<double>& rates) {
  double largest = rates[0];
  for (const double rate : rates) largest = rate > largest || rate != rate ? rate : largest;
  std::vector<double> weights;
  for (const double rate : rates) weights.push_back(baseline::modality_weight(largest, rate));
  return weights;
}

// grad_loss (scalar or one a row) times the gradient that the forward pass left, in logits' dtype.
inline Tensor scaled_gradient(const char* op, const Tensor& grad_loss, const Tensor& unit_grad,
                              const Tensor& logits) {
  Arguments args(op);
  args.matrix("logits", logits, -1, -1);
  const int64_t N = logits.size(0), K = logits.size(1);
  args.saved("unit_grad", unit_grad, {N, K}, args.arithmetic());
  args.grad_loss(grad_loss, N);
  Tensor grad = empty_like_contiguous(logits);
  const bool rows = grad_loss.dim() > 0;
  std::vector<double> factors(static_cast<size_t>(rows ? N : 1));
  for (size_t i = 0; i < factors.size(); ++i) {
    factors[i] = value_at(grad_loss, static_cast<int64_t>(i));
  }
  cpu::kernels().scale_rows(
      {N, K, args.wide(), factors.data(), rows ? 1 : 0, unit_grad.const_data_ptr(),
       grad.mutable_data_ptr(), dtype_of(op, "logits", logits)},
      torch_threads);
  return grad;
}

}  // namespace pycdgkd
