// One modality's prototype loss of many classes on CUDA: the products with all prototypes come from
// torch's matrix product, a block of rows at a time, and are turned into gradients before the next
// block; no (N, K) array is ever held. The operands are centred, so that TF32, where the user
// allows it, costs no more than its own rounding.
#pragma once

#include "cuda_tensors.h"

namespace pycdgkd {

struct ManyClasses {
  int64_t N, K;
  bool wide;
  double scale;
  cuda::Modality modality;  // `centred` is filled already; row_loss, true_prob as wanted
  cuda::Labels labels;
  cuda::ClassCounts counts;
};

// Gradients wanted, times factor and divided by max(rows, 1) where `rows` is given; null: not
// wanted.
struct ManyClassGrads {
  cuda::Factor factor;
  const double* rows;
  void* features;  // (N, D)
  Dtype features_dtype;
  void* prototypes;  // (K, D) of the arithmetic type
};

void many_classes(const OnDevice& device, const ManyClasses& m, const ManyClassGrads& grads);

inline bool few_classes(int64_t K) { return K <= cuda::kFewClasses; }

inline Dtype arithmetic_dtype(bool wide) { return wide ? Dtype::float64 : Dtype::float32; }

}  // namespace pycdgkd
