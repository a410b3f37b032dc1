// One modality's prototype loss as the CPU ops call it: sums forward, gradients backward.
//
// Few classes: the fused kernels, with the (N, K) residual kept from forward to backward. Many: the
// products with all prototypes come from torch's matrix product, a block of rows at a time, and are
// turned into gradients before the next block; no (N, K) array is ever held.
#pragma once

#include "cpu_values.h"

namespace pycdgkd {

// Above, torch's matrix product is as fast where rows are narrow, and faster soon after.
inline constexpr int64_t kFewClasses = 40;  // pycdgkd/ops/registration.py: few_classes
inline bool few_classes(int64_t K) { return K <= kFewClasses; }

struct Modality {
  int64_t N, D, K;
  bool wide;
  double scale;
  Matrix features;
  const void* centred;
};

struct ModalitySums {
  double loss, rate;
};

// Gradients wanted of a modality; null: not wanted.
struct ModalityGrads {
  double factor;
  const void* row_factor;  // (N,) or null for 1
  void* features;          // (N, D)
  Dtype features_dtype;
  void* prototypes;  // (K, D) of the arithmetic type
};

inline void centre(const Modality& m, const Matrix& prototypes, const std::vector<uint8_t>& active,
                   void* centred) {
  cpu::kernels().centre_prototypes({m.D, m.K, m.wide, m.scale, prototypes, active.data(), centred});
}

// Outputs are null where they are not wanted; gradients come with the same pass.
ModalitySums many_classes(const Modality& m, const std::vector<int32_t>& classes, void* row_loss,
                          void* true_prob, const ModalityGrads& grads);
void many_classes_backward(const Modality& m, const std::vector<int32_t>& classes,
                           const ModalityGrads& grads);

// `residual` (N, K) is written for few classes only.
inline ModalitySums modality_forward(const Modality& m, const std::vector<int32_t>& classes,
                                     void* row_loss, void* true_prob, void* residual) {
  if (!few_classes(m.K)) return many_classes(m, classes, row_loss, true_prob, {});
  std::vector<double> loss(num_blocks(m.N)), rate(num_blocks(m.N));
  cpu::kernels().prototype_forward(
      {m.N, m.D, m.K, m.wide, m.scale, m.features, m.centred, classes.data(), row_loss, true_prob,
       residual, loss.data(), rate.data()},
      torch_threads);
  return {sum_of(loss), sum_of(rate)};
}

// Few classes: from the residual of the forward pass.
inline void modality_backward(const Modality& m, const void* residual, const ModalityGrads& grads) {
  if (grads.features != nullptr) {
    cpu::kernels().prototype_backward({m.N, m.D, m.K, m.wide, grads.factor, grads.row_factor,
                                       residual, m.centred, grads.features, grads.features_dtype},
                                      torch_threads);
  }
  if (grads.prototypes != nullptr) {
    cpu::kernels().prototype_grad({m.N, m.D, m.K, m.wide, grads.factor, grads.row_factor, residual,
                                   m.features, m.centred, grads.prototypes},
                                  torch_threads);
  }
}

inline Tensor output(std::initializer_list<int64_t> sizes, ScalarType type, bool wanted) {
  return wanted ? empty(sizes, type) : empty({0}, type);
}

inline void* data_or_null(const Tensor& tensor, bool wanted) {
  return wanted ? tensor.mutable_data_ptr() : nullptr;
}

}  // namespace pycdgkd
