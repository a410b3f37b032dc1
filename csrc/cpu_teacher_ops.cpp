// The CPU side of teacher_loss: all modalities and the cross-entropy in one op, one op backward.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "cpu_modality.h"

namespace pycdgkd {
namespace {

// The vector `statistics` (float64): what a group of processes sums up, then what the gradients of
// the logits and of each modality are multiplied by.
struct Statistics {
  explicit Statistics(int64_t modalities)
      : M(modalities), values(static_cast<size_t>(size(modalities))) {}
  static int64_t size(int64_t M) { return 4 + 3 * M; }
  static int64_t coefficient(int64_t M, int64_t part) { return 3 + 2 * M + part; }  // 0: the logits
  double& ce_sum() { return values[0]; }
  double& ce_rows() { return values[1]; }
  double& proto_rows() { return values[2]; }
  double& loss(int64_t m) { return values[static_cast<size_t>(3 + m)]; }
  double& rate(int64_t m) { return values[static_cast<size_t>(3 + M + m)]; }
  double& coefficient(int64_t part) { return values[static_cast<size_t>(coefficient(M, part))]; }
  int64_t M;
  std::vector<double> values;
};

// The modalities of one call: their checked features and where the centred prototypes of each
// begin.
struct Modalities {
  Modalities(Arguments& args, const Tensors& features, int64_t rows, int64_t classes)
      : N(rows), K(classes) {
    if (features.empty()) fail(args.op(), "features", "at least one modality", "none");
    for (size_t m = 0; m < features.size(); ++m) {
      z.push_back(args.matrix(element("features", m), features[m], N, -1, "ND"));
      D.push_back(features[m].size(1));
      begin.push_back(total);
      total += centred_size(D.back(), K);
    }
  }
  int64_t count() const { return static_cast<int64_t>(z.size()); }
  Modality at(size_t m, const Arguments& args, double scale, void* centred) const {
    const int64_t bytes = args.wide() ? 8 : 4;
    return {N, D[m], K, args.wide(), scale, z[m], static_cast<char*>(centred) + begin[m] * bytes};
  }
  int64_t N, K, total = 0;
  std::vector<Matrix> z;
  std::vector<int64_t> D, begin;
};

// Which classes have a prototype: those counted by the caller, or the batch's own.
std::vector<uint8_t> active_prototypes(const Arguments& args, const std::optional<Tensor>& given,
                                       const std::vector<int64_t>& batch_counts, int64_t K,
                                       bool batch_means) {
  if (!batch_means) return read_active(args, given, K);
  std::vector<uint8_t> active(static_cast<size_t>(K));
  for (size_t k = 0; k < active.size(); ++k) active[k] = batch_counts[k] > 0;
  return active;
}

// Centred prototypes of one modality: of those given, or of the batch's class means (Eq. 1).
void centre_modality(Arguments& args, const Modality& m, size_t index, const Tensors& prototypes,
                     const std::vector<int32_t>& classes, const std::vector<int64_t>& counts,
                     const std::vector<uint8_t>& active) {
  void* centred = const_cast<void*>(m.centred);
  if (!prototypes.empty()) {
    centre(m, args.matrix(element("prototypes", index), prototypes[index], m.K, m.D), active,
           centred);
    return;
  }
  Workspace means(m.K * m.D, m.wide);
  cpu::kernels().class_means(
      {m.N, m.D, m.K, m.wide, m.features, classes.data(), counts.data(), means.at(0)},
      torch_threads);
  centre(m, {means.at(0), m.D, 1, m.wide ? Dtype::float64 : Dtype::float32}, active, centred);
}

// Cross-entropy of the logits: its sum; its gradient for (weight / rows) goes to `grad`.
double cross_entropy(const Arguments& args, const Matrix& logits, int64_t N, int64_t K,
                     const std::vector<int32_t>& classes, double factor, void* grad) {
  std::vector<double> ce(num_blocks(N)), kl(num_blocks(N));
  cpu::kernels().distillation(
      {N, K, 0, args.wide(), 1.0, Direction::reverse, logits, nullptr, nullptr, classes.data(),
       factor, 0.0, nullptr, grad, ce.data(), kl.data()},
      torch_threads);
  return sum_of(ce);
}

using TeacherOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Eqs. 4-6 from the sums of all parts.
TeacherOutputs combine(Statistics& s, double proto_weight, double scale, ScalarType type,
                       Tensor centred, Tensor residuals) {
  const double ce = s.ce_sum() / s.ce_rows();
  std::vector<double> losses, rates;
  for (int64_t m = 0; m < s.M; ++m) {
    losses.push_back(s.loss(m) / s.proto_rows());
    rates.push_back(s.rate(m));
  }
  const std::vector<double> weights = weights_from(rates);
  double loss = (1.0 - proto_weight) * ce;
  s.coefficient(0) = 1.0;
  for (int64_t m = 0; m < s.M; ++m) {
    const double weight = proto_weight * weights[static_cast<size_t>(m)];
    // A modality of weight 0 takes no part, even where its own loss is NaN for want of rows.
    if (weights[static_cast<size_t>(m)] != 0.0) loss += weight * losses[static_cast<size_t>(m)];
    s.coefficient(1 + m) = weight * 2.0 * scale / std::max(s.proto_rows(), 1.0);
  }
  return {scalar(loss, type),  scalar(ce, type),      filled(losses, type),
          filled(rates, type), filled(weights, type), filled(s.values, ScalarType::Double),
          std::move(centred),  std::move(residuals)};
}

TeacherOutputs teacher_loss(const Tensor& logits, const Tensors& features,
                            const Tensors& prototypes, const Tensor& labels,
                            const std::optional<Tensor>& class_counts, double proto_weight,
                            double scale, int64_t ignore_index, bool need_grad) {
  Arguments args("teacher_loss");
  if (!prototypes.empty()) check_modalities(args, features, prototypes);
  const Matrix l = args.matrix("logits", logits, -1, -1);
  const int64_t N = logits.size(0), K = logits.size(1);
  const Modalities modalities(args, features, N, K);
  const int64_t M = modalities.count();
  for (size_t m = 0; m < prototypes.size(); ++m) {
    args.matrix(element("prototypes", m), prototypes[m], K, modalities.D[m]);
  }
  const auto classes = read_classes(args, labels, N, K, ignore_index);
  std::vector<int64_t> counts(static_cast<size_t>(K));
  count_classes(classes, K, counts.data());
  const auto active = active_prototypes(args, class_counts, counts, K, prototypes.empty());
  const auto proto_classes = active_classes(classes, active);

  // Gradients of the logits, then the residuals of each modality of few classes.
  const int64_t parts = 1 + (few_classes(K) ? M : 0);
  Tensor residuals =
      need_grad ? empty({parts, N, K}, args.arithmetic()) : empty({0}, args.arithmetic());
  Tensor centred =
      need_grad ? empty({modalities.total}, args.arithmetic()) : empty({0}, args.arithmetic());
  std::optional<Workspace> unsaved;
  if (!need_grad) unsaved.emplace(modalities.total, args.wide());
  void* prototypes_at = need_grad ? centred.mutable_data_ptr() : unsaved->at(0);
  auto* residual = static_cast<char*>(data_or_null(residuals, need_grad));
  const int64_t part_bytes = N * K * (args.wide() ? 8 : 4);

  Statistics s(M);
  const int64_t ce_rows = count_rows(classes);
  s.ce_rows() = static_cast<double>(ce_rows);
  s.proto_rows() = static_cast<double>(count_rows(proto_classes));
  s.ce_sum() =
      cross_entropy(args, l, N, K, classes, (1.0 - proto_weight) / at_least_one(ce_rows), residual);
  for (int64_t m = 0; m < M; ++m) {
    const Modality modality = modalities.at(static_cast<size_t>(m), args, scale, prototypes_at);
    centre_modality(args, modality, static_cast<size_t>(m), prototypes, classes, counts, active);
    const bool keep = need_grad && few_classes(K);
    const ModalitySums sums = modality_forward(modality, proto_classes, nullptr, nullptr,
                                               keep ? residual + (1 + m) * part_bytes : nullptr);
    s.loss(m) = sums.loss;
    s.rate(m) = sums.rate;
  }
  return combine(s, proto_weight, scale, args.arithmetic(), std::move(centred),
                 std::move(residuals));
}

std::tuple<Tensor, Tensors, Tensors> teacher_loss_backward(
    const Tensor& grad_loss, const Tensor& statistics, const Tensor& centred,
    const Tensor& residuals, const Tensor& logits, const Tensors& features, const Tensor& labels,
    const std::optional<Tensor>& class_counts, double scale, int64_t ignore_index,
    bool need_prototypes) {
  Arguments args("teacher_loss_backward");
  args.matrix("logits", logits, -1, -1);
  const int64_t N = logits.size(0), K = logits.size(1);
  const Modalities modalities(args, features, N, K);
  const int64_t M = modalities.count();
  const bool few = few_classes(K);
  args.saved("statistics", statistics, {Statistics::size(M)}, ScalarType::Double);
  args.saved("centred", centred, {modalities.total}, args.arithmetic());
  args.saved("residuals", residuals, {1 + (few ? M : 0), N, K}, args.arithmetic());
  if (grad_loss.dim() != 0) fail(args.op(), "grad_loss", "a scalar", describe(grad_loss));
  std::vector<int32_t> classes;
  if (!few) {
    classes = active_classes(read_classes(args, labels, N, K, ignore_index),
                             read_active(args, class_counts, K));
  }
  const double grad = value_at(grad_loss, 0);
  const auto* coefficients =
      static_cast<const double*>(statistics.const_data_ptr()) + Statistics::coefficient(M, 0);
  const auto* residual = static_cast<const char*>(residuals.const_data_ptr());
  const int64_t part_bytes = N * K * (args.wide() ? 8 : 4);

  Tensor grad_logits = empty_like_contiguous(logits);
  const double logits_factor = grad * coefficients[0];
  cpu::kernels().scale_rows({N, K, args.wide(), &logits_factor, 0, residual,
                             grad_logits.mutable_data_ptr(), dtype_of(args.op(), "logits", logits)},
                            torch_threads);
  Tensors grad_features, grad_prototypes;
  for (size_t m = 0; m < features.size(); ++m) {
    const Modality modality =
        modalities.at(m, args, scale, const_cast<void*>(centred.const_data_ptr()));
    grad_features.push_back(empty_like_contiguous(features[m]));
    grad_prototypes.push_back(output({K, modality.D}, args.arithmetic(), need_prototypes));
    const ModalityGrads grads{grad * coefficients[1 + m], nullptr,
                              grad_features[m].mutable_data_ptr(),
                              dtype_of(args.op(), "features", features[m]),
                              data_or_null(grad_prototypes[m], need_prototypes)};
    if (few) {
      modality_backward(modality, residual + static_cast<int64_t>(1 + m) * part_bytes, grads);
    } else {
      many_classes_backward(modality, classes, grads);
    }
  }
  return {grad_logits, grad_features, grad_prototypes};
}

}  // namespace
}  // namespace pycdgkd

STABLE_TORCH_LIBRARY_IMPL(pycdgkd, CPU, m) {
  m.impl("teacher_loss", TORCH_BOX(&pycdgkd::teacher_loss));
  m.impl("teacher_loss_backward", TORCH_BOX(&pycdgkd::teacher_loss_backward));
}
