// The CPU side of multi_source_kl and distillation_loss.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "cpu_modality.h"

namespace pycdgkd {
namespace {

enum class Reduction : int64_t { none, mean, sum };

// The sources as matrices and their weights; None means 1/S each. Those of weight 0 are not
// touched.
struct Sources {
  Sources(Arguments& args, const Tensors& sources, const std::optional<Tensor>& given, int64_t N,
          int64_t K) {
    for (size_t j = 0; j < sources.size(); ++j) {
      matrices.push_back(args.matrix(element("sources", j), sources[j], N, K));
    }
    const auto S = static_cast<int64_t>(sources.size());
    weights.assign(sources.size(), 1.0 / at_least_one(S));
    if (!given.has_value()) return;
    if (given->dim() != 1 || given->size(0) != S) {
      fail(args.op(), "source_weights", "shape (" + std::to_string(S) + ",), one weight a source",
           describe(*given));
    }
    dtype_of(args.op(), "source_weights", *given);
    for (int64_t j = 0; j < S; ++j) weights[static_cast<size_t>(j)] = value_at(*given, j);
  }
  std::vector<Matrix> matrices;
  std::vector<double> weights;
};

std::tuple<Tensor, Tensor> multi_source_kl(const Tensor& logits, const Tensors& sources,
                                           const std::optional<Tensor>& source_weights,
                                           double temperature, int64_t direction, int64_t reduction,
                                           bool need_grad) {
  Arguments args("multi_source_kl");
  const Matrix l = args.matrix("logits", logits, -1, -1);
  const int64_t N = logits.size(0), K = logits.size(1);
  const Sources s(args, sources, source_weights, N, K);
  const auto kind = static_cast<Reduction>(reduction);
  Tensor rows = kind == Reduction::none ? empty({N}, args.arithmetic()) : Tensor();
  Tensor grad = output({N, K}, args.arithmetic(), need_grad);
  const double divisor = kind == Reduction::mean ? at_least_one(N) : 1.0;
  std::vector<double> ce(num_blocks(N)), kl(num_blocks(N));
  cpu::kernels().distillation(
      {N, K, static_cast<int64_t>(sources.size()), args.wide(), temperature,
       static_cast<Direction>(direction), l, s.matrices.data(), s.weights.data(), nullptr, 0.0,
       1.0 / divisor, kind == Reduction::none ? rows.mutable_data_ptr() : nullptr,
       data_or_null(grad, need_grad), ce.data(), kl.data()},
      torch_threads);
  if (kind == Reduction::none) return {rows, grad};
  const double sum = sum_of(kl);
  return {scalar(kind == Reduction::mean ? sum / static_cast<double>(N) : sum, args.arithmetic()),
          grad};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> distillation_loss(
    const Tensor& logits, const Tensors& sources, const Tensor& labels,
    const std::optional<Tensor>& source_weights, double kd_weight, double temperature,
    int64_t direction, double temperature_power, int64_t ignore_index, bool need_grad) {
  Arguments args("distillation_loss");
  const Matrix l = args.matrix("logits", logits, -1, -1);
  const int64_t N = logits.size(0), K = logits.size(1);
  const Sources s(args, sources, source_weights, N, K);
  const auto classes = read_classes(args, labels, N, K, ignore_index);
  const int64_t rows = count_rows(classes);
  const double kl_weight = kd_weight * std::pow(temperature, temperature_power);
  Tensor grad = output({N, K}, args.arithmetic(), need_grad);
  std::vector<double> ce(num_blocks(N)), kl(num_blocks(N));
  cpu::kernels().distillation(
      {N, K, static_cast<int64_t>(sources.size()), args.wide(), temperature,
       static_cast<Direction>(direction), l, s.matrices.data(), s.weights.data(), classes.data(),
       (1.0 - kd_weight) / at_least_one(rows), kl_weight / at_least_one(rows), nullptr,
       data_or_null(grad, need_grad), ce.data(), kl.data()},
      torch_threads);
  const double mean_ce = sum_of(ce) / static_cast<double>(rows);
  const double mean_kl = sum_of(kl) / static_cast<double>(rows);
  const ScalarType type = args.arithmetic();
  const double loss = baseline::weighted_mean(1.0 - kd_weight, mean_ce) +
                      baseline::weighted_mean(kl_weight, mean_kl);
  return {scalar(loss, type), scalar(mean_ce, type), scalar(mean_kl, type), grad};
}

Tensor multi_source_kl_backward(const Tensor& grad_loss, const Tensor& unit_grad,
                                const Tensor& logits) {
  return scaled_gradient("multi_source_kl_backward", grad_loss, unit_grad, logits);
}

Tensor distillation_loss_backward(const Tensor& grad_loss, const Tensor& unit_grad,
                                  const Tensor& logits) {
  return scaled_gradient("distillation_loss_backward", grad_loss, unit_grad, logits);
}

}  // namespace
}  // namespace pycdgkd

STABLE_TORCH_LIBRARY_IMPL(pycdgkd, CPU, m) {
  m.impl("multi_source_kl", TORCH_BOX(&pycdgkd::multi_source_kl));
  m.impl("multi_source_kl_backward", TORCH_BOX(&pycdgkd::multi_source_kl_backward));
  m.impl("distillation_loss", TORCH_BOX(&pycdgkd::distillation_loss));
  m.impl("distillation_loss_backward", TORCH_BOX(&pycdgkd::distillation_loss_backward));
}
