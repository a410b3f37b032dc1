// One modality's prototype kernels as the CPU ops call them: forward sums and gradients.
#pragma once

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu_values.h"

namespace pycdgkd {

// The prototypes of one modality, centred, in memory of their own.
struct Centred {
  Centred(const Matrix& prototypes, int64_t D, int64_t K, bool wide, double scale,
          const std::vector<uint8_t>& active)
      : storage(static_cast<size_t>((D + K * D + K) * (wide ? 2 : 1))) {
    char* base = reinterpret_cast<char*>(storage.data());
    const int64_t size = wide ? sizeof(double) : sizeof(float);
    mean = base;
    centred = base + D * size;
    bias = base + (D + K * D) * size;
    cpu::kernels().centre_prototypes(
        {D, K, wide, scale, prototypes, active.data(), mean, centred, bias});
  }
  std::vector<float> storage;
  void *mean, *centred, *bias;
};

struct ModalitySums {
  double loss, rate;
};

inline ModalitySums prototype_forward(const Arguments& args, const Matrix& features, int64_t N,
                                      int64_t D, int64_t K, double scale, const Centred& c,
                                      const std::vector<int32_t>& classes, void* row_loss,
                                      void* true_prob, void* residual) {
  std::vector<double> loss(num_blocks(N)), rate(num_blocks(N));
  cpu::kernels().prototype_forward(
      {N, D, K, args.wide(), scale, features, c.mean, c.centred, c.bias, classes.data(), row_loss,
       true_prob, residual, loss.data(), rate.data()},
      torch_threads);
  return {sum_of(loss), sum_of(rate)};
}

inline Tensor residual_output(const Arguments& args, std::initializer_list<int64_t> sizes,
                              bool wanted, const Tensor& like) {
  return wanted ? empty(sizes, args.arithmetic(), like) : empty({0}, args.arithmetic(), like);
}

inline void* data_or_null(const Tensor& tensor, bool wanted) {
  return wanted ? tensor.mutable_data_ptr() : nullptr;
}

inline double at_least_one(int64_t count) {
  return static_cast<double>(std::max<int64_t>(count, 1));
}

// Gradients of one modality, each made only if wanted.
inline std::tuple<Tensor, Tensor> modality_backward(Arguments& args, double factor,
                                                    const void* row_factor, const void* residual,
                                                    const Tensor& features,
                                                    const Tensor& prototypes,
                                                    const std::optional<Tensor>& class_counts,
                                                    bool need_features, bool need_prototypes) {
  const Matrix z = args.matrix("features", features, -1, -1, "ND");
  const int64_t N = features.size(0), D = features.size(1);
  const Matrix c = args.matrix("prototypes", prototypes, -1, D, "KD");
  const int64_t K = prototypes.size(0);
  const Centred centred(c, D, K, args.wide(), 1.0, read_active(args, class_counts, K));
  Tensor grad_features = need_features ? empty_like_contiguous(features)
                                       : empty({0}, features.scalar_type(), features);
  if (need_features) {
    cpu::kernels().prototype_backward(
        {N, D, K, args.wide(), factor, row_factor, residual, centred.centred,
         grad_features.mutable_data_ptr(), dtype_of(args.op(), "features", features)},
        torch_threads);
  }
  Tensor grad_prototypes = residual_output(args, {K, D}, need_prototypes, prototypes);
  if (need_prototypes) {
    cpu::kernels().prototype_grad(
        {N, D, K, args.wide(), factor, row_factor, residual, z, centred.mean, centred.centred,
         grad_prototypes.mutable_data_ptr()},
        torch_threads);
  }
  return {grad_features, grad_prototypes};
}

}  // namespace pycdgkd
