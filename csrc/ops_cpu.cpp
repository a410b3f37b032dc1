// The CPU side of every op: checks, allocation, launch. What the quantities mean is said in
// pycdgkd/losses.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "cpu_modality.h"

namespace pycdgkd {
namespace {

enum class Reduction : int64_t { none, mean, sum };

void check_modalities(const Arguments& args, const Tensors& features, const Tensors& prototypes,
                      const char* name = "prototypes") {
  args.check(!features.empty(), "features", "at least one modality", "none");
  args.check(prototypes.size() == features.size(), name,
             "as many tensors as features (" + std::to_string(features.size()) + ")",
             std::to_string(prototypes.size()));
}

int64_t rows_of(const Arguments& args, const std::string& name, const Tensor& tensor,
                const char* shape) {
  args.check(tensor.dim() == 2, name, shape, describe(tensor));
  return tensor.size(0);
}

// ---- class_prototypes ---------------------------------------------------------------------------

std::tuple<Tensors, Tensor> class_prototypes(const Tensors& features, const Tensor& labels,
                                             int64_t num_classes, int64_t ignore_index) {
  Arguments args("class_prototypes");
  args.check(!features.empty(), "features", "at least one tensor", "none");
  const int64_t N = rows_of(args, "features[0]", features[0], "shape (N, D)");
  std::vector<Matrix> matrices;
  for (size_t m = 0; m < features.size(); ++m) {
    matrices.push_back(args.matrix(element("features", m), features[m], N, -1, "ND"));
  }
  const auto classes = read_classes(args, labels, N, num_classes, ignore_index);
  Tensor counts = empty({num_classes}, ScalarType::Long, features[0]);
  auto* count = static_cast<int64_t*>(counts.mutable_data_ptr());
  std::fill(count, count + num_classes, 0);
  for (const int32_t c : classes) {
    if (c >= 0) ++count[c];
  }
  Tensors means;
  for (size_t m = 0; m < features.size(); ++m) {
    const int64_t D = features[m].size(1);
    means.push_back(empty({num_classes, D}, args.arithmetic(), features[m]));
    cpu::kernels().class_means({N, D, num_classes, args.wide(), matrices[m], classes.data(), count,
                                means[m].mutable_data_ptr()},
                               torch_threads);
  }
  return {means, counts};
}

Tensors class_prototypes_backward(const Tensors& grad_prototypes, const Tensors& features,
                                  const Tensor& labels, const Tensor& counts,
                                  int64_t ignore_index) {
  Arguments args("class_prototypes_backward");
  check_modalities(args, features, grad_prototypes, "grad_prototypes");
  const int64_t N = rows_of(args, "features[0]", features[0], "shape (N, D)");
  const int64_t K = counts.numel();
  args.saved("counts", counts, {K}, ScalarType::Long);
  const auto classes = read_classes(args, labels, N, K, ignore_index);
  Tensors grads;
  for (size_t m = 0; m < features.size(); ++m) {
    args.matrix(element("features", m), features[m], N, -1, "ND");
    const int64_t D = features[m].size(1);
    const Matrix grad = args.matrix(element("grad_prototypes", m), grad_prototypes[m], K, D);
    grads.push_back(empty_like_contiguous(features[m]));
    cpu::kernels().class_means_backward(
        {N, D, K, args.wide(), classes.data(), static_cast<const int64_t*>(counts.const_data_ptr()),
         grad, grads[m].mutable_data_ptr(), dtype_of(args.op(), "features", features[m])},
        torch_threads);
  }
  return grads;
}

// ---- prototype_loss -----------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor> prototype_loss(const Tensor& features,
                                                          const Tensor& prototypes,
                                                          const Tensor& labels,
                                                          const std::optional<Tensor>& class_counts,
                                                          double scale, int64_t reduction,
                                                          int64_t ignore_index, bool need_grad) {
  Arguments args("prototype_loss");
  const Matrix z = args.matrix("features", features, -1, -1, "ND");
  const int64_t N = features.size(0), D = features.size(1);
  const Matrix c = args.matrix("prototypes", prototypes, -1, D, "KD");
  const int64_t K = prototypes.size(0);
  const auto active = read_active(args, class_counts, K);
  const auto classes = active_classes(read_classes(args, labels, N, K, ignore_index), active);
  const Centred centred(c, D, K, args.wide(), scale, active);

  const auto kind = static_cast<Reduction>(reduction);
  const bool rows = kind == Reduction::none;
  Tensor row_loss = rows ? empty({N}, args.arithmetic(), features) : Tensor();
  Tensor true_prob = empty({N}, args.arithmetic(), features);
  Tensor residual = residual_output(args, {N, K}, need_grad, features);
  const ModalitySums sums = prototype_forward(
      args, z, N, D, K, scale, centred, classes, rows ? row_loss.mutable_data_ptr() : nullptr,
      true_prob.mutable_data_ptr(), data_or_null(residual, need_grad));

  const int64_t count = count_rows(classes);
  const bool mean = kind == Reduction::mean;
  const double divisor = mean ? at_least_one(count) : 1.0;
  Tensor loss = rows ? row_loss
                     : scalar(mean ? sums.loss / static_cast<double>(count) : sums.loss,
                              args.arithmetic(), features);
  return {loss, true_prob, residual, scalar(2.0 * scale / divisor, ScalarType::Double, features)};
}

std::tuple<Tensor, Tensor> prototype_loss_backward(const Tensor& grad_loss,
                                                   const Tensor& coefficient,
                                                   const Tensor& residual, const Tensor& features,
                                                   const Tensor& prototypes,
                                                   const std::optional<Tensor>& class_counts,
                                                   bool need_features, bool need_prototypes) {
  Arguments args("prototype_loss_backward");
  args.matrix("features", features, -1, -1, "ND");
  args.matrix("prototypes", prototypes, -1, -1, "KD");
  args.saved("coefficient", coefficient, {}, ScalarType::Double);
  args.saved("residual", residual, {features.size(0), prototypes.size(0)}, args.arithmetic());
  args.grad_loss(grad_loss, features.size(0));
  const double factor = value_at(coefficient, 0);
  if (grad_loss.dim() == 0) {
    return modality_backward(args, factor * value_at(grad_loss, 0), nullptr,
                             residual.const_data_ptr(), features, prototypes, class_counts,
                             need_features, need_prototypes);
  }
  const Tensor rows =
      torch::stable::contiguous(torch::stable::to(grad_loss, residual.scalar_type()));
  return modality_backward(args, factor, rows.const_data_ptr(), residual.const_data_ptr(), features,
                           prototypes, class_counts, need_features, need_prototypes);
}

// ---- convergence_rates, modality_weights --------------------------------------------------------

Tensor convergence_rates(const Tensors& features, const Tensors& prototypes, const Tensor& labels,
                         const std::optional<Tensor>& class_counts, double scale,
                         int64_t ignore_index) {
  Arguments args("convergence_rates");
  check_modalities(args, features, prototypes);
  const int64_t N = rows_of(args, "features[0]", features[0], "shape (N, D)");
  const int64_t K = rows_of(args, "prototypes[0]", prototypes[0], "shape (K, D)");
  const auto active = read_active(args, class_counts, K);
  const auto classes = active_classes(read_classes(args, labels, N, K, ignore_index), active);
  std::vector<double> rates;
  for (size_t m = 0; m < features.size(); ++m) {
    const Matrix z = args.matrix(element("features", m), features[m], N, -1, "ND");
    const int64_t D = features[m].size(1);
    const Matrix c = args.matrix(element("prototypes", m), prototypes[m], K, D);
    const Centred centred(c, D, K, args.wide(), scale, active);
    rates.push_back(
        prototype_forward(args, z, N, D, K, scale, centred, classes, nullptr, nullptr, nullptr)
            .rate);
  }
  return filled(rates, false, args.arithmetic(), features[0]);
}

std::vector<double> weights_from(const std::vector<double>& rates) {
  double largest = rates[0];
  for (const double rate : rates) largest = rate > largest || rate != rate ? rate : largest;
  std::vector<double> weights;
  for (const double rate : rates) weights.push_back(baseline::modality_weight(largest, rate));
  return weights;
}

Tensor modality_weights(const Tensor& rates) {
  Arguments args("modality_weights");
  args.check(rates.dim() == 1 && rates.size(0) >= 1, "convergence_rates", "shape (M,) with M >= 1",
             describe(rates));
  dtype_of(args.op(), "convergence_rates", rates);
  std::vector<double> values;
  for (int64_t m = 0; m < rates.size(0); ++m) values.push_back(value_at(rates, m));
  const bool wide = rates.scalar_type() == ScalarType::Double;
  return filled(weights_from(values), false, wide ? ScalarType::Double : ScalarType::Float, rates);
}

// ---- teacher_loss -------------------------------------------------------------------------------

struct CrossEntropy {
  double sum;
  int64_t rows;
};

// Cross-entropy of the logits; its gradient for (loss weight / rows) goes to `grad`.
CrossEntropy cross_entropy(const Arguments& args, const Matrix& logits, int64_t N, int64_t K,
                           const std::vector<int32_t>& classes, double weight, void* grad) {
  const int64_t rows = count_rows(classes);
  std::vector<double> ce(num_blocks(N)), kl(num_blocks(N));
  cpu::kernels().distillation(
      {N, K, 0, args.wide(), 1.0, Direction::reverse, logits, nullptr, nullptr, classes.data(),
       weight / at_least_one(rows), 0.0, nullptr, grad, ce.data(), kl.data()},
      torch_threads);
  return {sum_of(ce), rows};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> teacher_loss(
    const Tensor& logits, const Tensors& features, const Tensors& prototypes, const Tensor& labels,
    const std::optional<Tensor>& class_counts, double proto_weight, double scale,
    int64_t ignore_index, bool need_grad) {
  Arguments args("teacher_loss");
  check_modalities(args, features, prototypes);
  const Matrix l = args.matrix("logits", logits, -1, -1);
  const int64_t N = logits.size(0), K = logits.size(1);
  const auto M = static_cast<int64_t>(features.size());
  std::vector<Matrix> z, c;
  for (size_t m = 0; m < features.size(); ++m) {
    z.push_back(args.matrix(element("features", m), features[m], N, -1, "ND"));
    c.push_back(args.matrix(element("prototypes", m), prototypes[m], K, features[m].size(1)));
  }
  const auto classes = read_classes(args, labels, N, K, ignore_index);
  const auto active = read_active(args, class_counts, K);
  const auto proto_classes = active_classes(classes, active);
  const int64_t proto_rows = count_rows(proto_classes);

  Tensor unit_grad = residual_output(args, {N, K}, need_grad, logits);
  Tensor residuals = residual_output(args, {M, N, K}, need_grad, logits);
  const CrossEntropy ce =
      cross_entropy(args, l, N, K, classes, 1.0 - proto_weight, data_or_null(unit_grad, need_grad));
  const double mean_ce = ce.sum / static_cast<double>(ce.rows);
  std::vector<double> statistics = {ce.sum, static_cast<double>(ce.rows),
                                    static_cast<double>(proto_rows)};
  std::vector<double> losses, rates;
  auto* residual = static_cast<char*>(data_or_null(residuals, need_grad));
  const int64_t residual_bytes = N * K * (args.wide() ? sizeof(double) : sizeof(float));
  for (size_t m = 0; m < features.size(); ++m) {
    const int64_t D = features[m].size(1);
    const Centred centred(c[m], D, K, args.wide(), scale, active);
    const ModalitySums sums =
        prototype_forward(args, z[m], N, D, K, scale, centred, proto_classes, nullptr, nullptr,
                          need_grad ? residual + m * residual_bytes : nullptr);
    statistics.push_back(sums.loss);
    losses.push_back(sums.loss / static_cast<double>(proto_rows));
    rates.push_back(sums.rate);
  }
  statistics.insert(statistics.end(), rates.begin(), rates.end());
  const std::vector<double> weights = weights_from(rates);
  double loss = (1.0 - proto_weight) * mean_ce;
  std::vector<double> coefficients = {1.0};
  for (size_t m = 0; m < features.size(); ++m) {
    // A modality of weight 0 takes no part, even where its own loss is NaN for want of rows.
    if (weights[m] != 0.0) loss += proto_weight * weights[m] * losses[m];
    coefficients.push_back(proto_weight * weights[m] * 2.0 * scale / at_least_one(proto_rows));
  }
  const ScalarType type = args.arithmetic();
  return {scalar(loss, type, logits),
          scalar(mean_ce, type, logits),
          filled(losses, false, type, logits),
          filled(rates, false, type, logits),
          filled(weights, false, type, logits),
          filled(statistics, false, ScalarType::Double, logits),
          filled(coefficients, false, ScalarType::Double, logits),
          residuals,
          unit_grad};
}

// ---- multi_source_kl, distillation_loss ---------------------------------------------------------

// grad_loss (scalar or one a row) times the gradient that the forward pass left, in logits' dtype.
Tensor scaled_gradient(const char* op, const Tensor& grad_loss, const Tensor& unit_grad,
                       const Tensor& logits) {
  Arguments args(op);
  args.matrix("logits", logits, -1, -1);
  const int64_t N = logits.size(0), K = logits.size(1);
  args.saved("unit_grad", unit_grad, {N, K}, args.arithmetic());
  args.grad_loss(grad_loss, N);
  const bool wide = args.wide();
  Tensor grad = empty_like_contiguous(logits);
  const bool rows = grad_loss.dim() > 0;
  std::vector<double> factors(static_cast<size_t>(rows ? N : 1));
  for (size_t i = 0; i < factors.size(); ++i)
    factors[i] = value_at(grad_loss, static_cast<int64_t>(i));
  cpu::kernels().scale_rows({N, K, wide, factors.data(), rows ? 1 : 0, unit_grad.const_data_ptr(),
                             grad.mutable_data_ptr(), dtype_of(op, "logits", logits)},
                            torch_threads);
  return grad;
}

std::tuple<Tensor, Tensors, Tensors> teacher_loss_backward(
    const Tensor& grad_loss, const Tensor& coefficients, const Tensor& residuals,
    const Tensor& unit_grad_logits, const Tensor& logits, const Tensors& features,
    const Tensors& prototypes, const std::optional<Tensor>& class_counts, bool need_prototypes) {
  Arguments args("teacher_loss_backward");
  check_modalities(args, features, prototypes);
  args.matrix("logits", logits, -1, -1);
  const auto M = static_cast<int64_t>(features.size());
  args.saved("coefficients", coefficients, {1 + M}, ScalarType::Double);
  args.saved("residuals", residuals, {M, logits.size(0), logits.size(1)}, args.arithmetic());
  args.check(grad_loss.dim() == 0, "grad_loss", "a scalar", describe(grad_loss));
  for (size_t m = 0; m < features.size(); ++m) {
    args.matrix(element("features", m), features[m], logits.size(0), -1, "ND");
    args.matrix(element("prototypes", m), prototypes[m], logits.size(1), features[m].size(1));
  }
  const double grad = value_at(grad_loss, 0);
  const Tensor logits_factor =
      scalar(grad * value_at(coefficients, 0), ScalarType::Double, grad_loss);
  Tensor grad_logits = scaled_gradient(args.op(), logits_factor, unit_grad_logits, logits);
  Tensors grad_features, grad_prototypes;
  const auto* residual = static_cast<const char*>(residuals.const_data_ptr());
  const int64_t bytes =
      static_cast<int64_t>(residuals.element_size()) * residuals.size(1) * residuals.size(2);
  for (size_t m = 0; m < features.size(); ++m) {
    const double factor = grad * value_at(coefficients, static_cast<int64_t>(m) + 1);
    auto [grad_z, grad_c] =
        modality_backward(args, factor, nullptr, residual + static_cast<int64_t>(m) * bytes,
                          features[m], prototypes[m], class_counts, true, need_prototypes);
    grad_features.push_back(std::move(grad_z));
    grad_prototypes.push_back(std::move(grad_c));
  }
  return {grad_logits, grad_features, grad_prototypes};
}

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
    args.check(given->dim() == 1 && given->size(0) == S, "source_weights",
               "shape (" + std::to_string(S) + ",), one weight a source", describe(*given));
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
  Tensor rows = kind == Reduction::none ? empty({N}, args.arithmetic(), logits) : Tensor();
  Tensor grad = residual_output(args, {N, K}, need_grad, logits);
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
  return {scalar(kind == Reduction::mean ? sum / static_cast<double>(N) : sum, args.arithmetic(),
                 logits),
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
  Tensor grad = residual_output(args, {N, K}, need_grad, logits);
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
  // A divergence of weight 0 takes no part, even where it is infinite.
  const double kl_term = kl_weight == 0.0 && std::isinf(mean_kl) ? 0.0 : kl_weight * mean_kl;
  return {scalar((1.0 - kd_weight) * mean_ce + kl_term, type, logits),
          scalar(mean_ce, type, logits), scalar(mean_kl, type, logits), grad};
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
  m.impl("class_prototypes", TORCH_BOX(&pycdgkd::class_prototypes));
  m.impl("class_prototypes_backward", TORCH_BOX(&pycdgkd::class_prototypes_backward));
  m.impl("prototype_loss", TORCH_BOX(&pycdgkd::prototype_loss));
  m.impl("prototype_loss_backward", TORCH_BOX(&pycdgkd::prototype_loss_backward));
  m.impl("convergence_rates", TORCH_BOX(&pycdgkd::convergence_rates));
  m.impl("modality_weights", TORCH_BOX(&pycdgkd::modality_weights));
  m.impl("teacher_loss", TORCH_BOX(&pycdgkd::teacher_loss));
  m.impl("teacher_loss_backward", TORCH_BOX(&pycdgkd::teacher_loss_backward));
  m.impl("multi_source_kl", TORCH_BOX(&pycdgkd::multi_source_kl));
  m.impl("multi_source_kl_backward", TORCH_BOX(&pycdgkd::multi_source_kl_backward));
  m.impl("distillation_loss", TORCH_BOX(&pycdgkd::distillation_loss));
  m.impl("distillation_loss_backward", TORCH_BOX(&pycdgkd::distillation_loss_backward));
}
