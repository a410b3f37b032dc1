// Values that the CPU ops read from tensors or write to them: labels, class counts, small vectors.
#pragma once

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "row_math.h"
#include "tensors.h"

namespace pycdgkd {

inline void torch_threads(int64_t count, int64_t grain, RangeBody body, void* context) {
  torch::stable::parallel_for(0, count, grain,
                              [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

inline double sum_of(const std::vector<double>& values) {
  double sum = 0.0;
  for (const double value : values) sum += value;
  return sum;
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

// A 1-D or 0-D output filled from doubles.
inline Tensor filled(const std::vector<double>& values, bool scalar, ScalarType type,
                     const Tensor& like) {
  const auto count = static_cast<int64_t>(values.size());
  Tensor out = scalar ? empty({}, type, like) : empty({count}, type, like);
  for (int64_t i = 0; i < count; ++i) {
    if (type == ScalarType::Double) {
      static_cast<double*>(out.mutable_data_ptr())[i] = values[i];
    } else {
      static_cast<float*>(out.mutable_data_ptr())[i] = static_cast<float>(values[i]);
    }
  }
  return out;
}

inline Tensor scalar(double value, ScalarType type, const Tensor& like) {
  return filled({value}, true, type, like);
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
  args.check(labels.dim() == 1 && labels.size(0) == N, "labels",
             "shape (" + std::to_string(N) + ",)", describe(labels));
  args.check(K >= 1 && K <= std::numeric_limits<int32_t>::max() / 2, "number of classes",
             "at least 1 and below 2^30", std::to_string(K));
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

// Which classes take part: all, or those with a count above zero.
inline std::vector<uint8_t> read_active(const Arguments& args, const std::optional<Tensor>& counts,
                                        int64_t K) {
  std::vector<uint8_t> active(static_cast<size_t>(K), 1);
  if (!counts.has_value()) return active;
  args.check(
      counts->dim() == 1 && counts->size(0) == K && counts->scalar_type() == ScalarType::Long,
      "class_counts", "int64 of shape (" + std::to_string(K) + ",)", describe(*counts));
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

}  // namespace pycdgkd
