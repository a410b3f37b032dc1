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
  Modality at(size_t m, const Arguments& args, double scale, void* centred) const {
    void* own = static_cast<char*>(centred) + begin[m] * args.bytes();
    return {N, D[m], K, args.wide(), scale, z[m], own};
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

// Cross-entropy of the logits: its sum; factor times its gradient goes to `grad`.
double cross_entropy(const Arguments& args, const Matrix& logits, int64_t N, int64_t K,
                     const std::vector<int32_t>& classes, double factor, void* grad) {
  std::vector<double> ce(num_blocks(N)), kl(num_blocks(N));
  cpu::kernels().distillation(
      {N, K, 0, args.wide(), 1.0, Direction::reverse, logits, nullptr, nullptr, classes.data(),
       factor, 0.0, nullptr, grad, ce.data(), kl.data()},
      torch_threads);
  return sum_of(ce);
}

using TeacherOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensors>;

// Eqs. 4-6 from the sums of all parts; the coefficients of the gradients go to the statistics.
TeacherOutputs combine(Statistics& s, double proto_weight, double scale, ScalarType type) {
  const double ce = s.ce_sum() / s.ce_rows();
  std::vector<double> losses, rates;
  for (int64_t m = 0; m < s.M; ++m) {
    losses.push_back(s.loss(m) / s.proto_rows());
    rates.push_back(s.rate(m));
  }
  const std::vector<double> weights = weights_from(rates);
  double loss = baseline::weighted_mean(1.0 - proto_weight, ce);
  s.coefficient(0) = (1.0 - proto_weight) / std::max(s.ce_rows(), 1.0);
  for (int64_t m = 0; m < s.M; ++m) {
    const double weight = proto_weight * weights[static_cast<size_t>(m)];
    // A modality of weight 0 takes no part, even where its own loss is NaN for want of rows.
    if (weights[static_cast<size_t>(m)] != 0.0) loss += weight * losses[static_cast<size_t>(m)];
    s.coefficient(1 + m) = weight * 2.0 * scale / std::max(s.proto_rows(), 1.0);
  }
  return {scalar(loss, type),  scalar(ce, type),      filled(losses, type),
          filled(rates, type), filled(weights, type), {}};
}

// A batch as small as the paper's costs less to compute than to come back for: its gradients are
// made in the forward pass, where all operands lie in a cache. Larger ones are not kept.
constexpr int64_t kSmallFeatures = int64_t{1} << 18;

bool gradients_at_once(const Arguments& args, const Modalities& modalities, bool need_prototypes) {
  int64_t elements = 0;
  for (size_t m = 0; m < modalities.D.size(); ++m) {
    if (modalities.z[m].dtype != (args.wide() ? Dtype::float64 : Dtype::float32)) return false;
    elements += modalities.N * modalities.D[m];
  }
  return !need_prototypes && few_classes(modalities.K) && elements <= kSmallFeatures;
}

TeacherOutputs teacher_loss(const Tensor& logits, const Tensors& features,
                            const Tensors& prototypes, const Tensor& labels,
                            const std::optional<Tensor>& class_counts, double proto_weight,
                            double scale, int64_t ignore_index, bool need_grad,
                            bool need_prototypes) {
  Arguments args("teacher_loss");
  if (!prototypes.empty()) check_modalities(args, features, prototypes);
  const Matrix l = args.matrix("logits", logits, -1, -1);
  const int64_t N = logits.size(0), K = logits.size(1);
  const Modalities modalities(args, features, N, K);
  const auto M = static_cast<int64_t>(features.size());
  for (size_t m = 0; m < prototypes.size(); ++m) {
    args.matrix(element("prototypes", m), prototypes[m], K, modalities.D[m]);
  }
  const auto classes = read_classes(args, labels, N, K, ignore_index);
  std::vector<int64_t> counts(static_cast<size_t>(K));
  count_classes(classes, K, counts.data());
  const auto active = active_prototypes(args, class_counts, counts, K, prototypes.empty());
  const auto proto_classes = active_classes(classes, active);

  // Kept for the backward pass, or scratch: the gradient of the logits, then the residual of each
  // modality of few classes; the centred prototypes.
  const bool at_once = need_grad && gradients_at_once(args, modalities, need_prototypes);
  const bool keep = need_grad && !at_once;
  const int64_t parts = need_grad ? (few_classes(K) ? 1 + M : 1) : 0;
  Tensor residuals = output({parts, N, K}, args.arithmetic(), keep);
  Tensor centred = output({modalities.total}, args.arithmetic(), keep);
  Workspace scratch(keep ? 0 : modalities.total + parts * N * K, args.wide());
  void* prototypes_at = keep ? centred.mutable_data_ptr() : scratch.at(0);
  void* residuals_at = keep ? residuals.mutable_data_ptr() : scratch.at(modalities.total);
  Tensor grad_logits = output({N, K}, args.arithmetic(), at_once);
  const auto residual = [&](int64_t part) -> void* {
    if (part >= parts) return nullptr;
    if (part == 0 && at_once) return grad_logits.mutable_data_ptr();
    return static_cast<char*>(residuals_at) + part * N * K * args.bytes();
  };

  Statistics s(M);
  const int64_t rows = count_rows(classes);
  s.ce_rows() = static_cast<double>(rows);
  s.proto_rows() = static_cast<double>(count_rows(proto_classes));
  s.ce_sum() =
      cross_entropy(args, l, N, K, classes,
                    at_once ? (1.0 - proto_weight) / at_least_one(rows) : 1.0, residual(0));
  for (int64_t m = 0; m < M; ++m) {
    const Modality modality = modalities.at(static_cast<size_t>(m), args, scale, prototypes_at);
    centre_modality(args, modality, static_cast<size_t>(m), prototypes, classes, counts, active);
    const ModalitySums sums =
        modality_forward(modality, proto_classes, nullptr, nullptr, residual(1 + m));
    s.loss(m) = sums.loss;
    s.rate(m) = sums.rate;
  }
  TeacherOutputs outputs = combine(s, proto_weight, scale, args.arithmetic());
  Tensors& saved = std::get<5>(outputs);
  if (keep) saved = {filled(s.values, ScalarType::Double), centred, residuals};
  if (!at_once) return outputs;
  saved.push_back(std::move(grad_logits));
  for (int64_t m = 0; m < M; ++m) {
    const Modality modality = modalities.at(static_cast<size_t>(m), args, scale, prototypes_at);
    saved.push_back(empty({N, modality.D}, args.arithmetic()));
    modality_backward(modality, residual(1 + m),
                      {s.coefficient(1 + m), nullptr, saved.back().mutable_data_ptr(),
                       modality.features.dtype, nullptr});
  }
  return outputs;
}

using TeacherGrads = std::tuple<Tensor, Tensors, Tensors>;

// The gradients that the forward pass made at once, times grad_loss.
TeacherGrads scaled_gradients(const Arguments& args, double grad, const Tensors& saved,
                              const Tensor& logits, const Tensors& features,
                              const std::vector<int64_t>& need_features) {
  Tensors grads;
  for (size_t part = 0; part <= features.size(); ++part) {
    const Tensor& like = part == 0 ? logits : features[part - 1];
    const int64_t rows = like.size(0), columns = like.size(1);
    args.saved(element("saved", part), saved[part], {rows, columns}, args.arithmetic());
    const bool needed = part == 0 || need_features[part - 1] != 0;
    grads.push_back(output({rows, columns}, like.scalar_type(), needed));
    if (!needed) continue;
    cpu::kernels().scale_rows(
        {rows, columns, args.wide(), &grad, 0, saved[part].const_data_ptr(),
         grads.back().mutable_data_ptr(), dtype_of(args.op(), "logits", like)},
        torch_threads);
  }
  Tensors unused;
  for (size_t m = 0; m < features.size(); ++m) unused.push_back(empty({0}, args.arithmetic()));
  return {grads[0], Tensors(grads.begin() + 1, grads.end()), unused};
}

TeacherGrads teacher_loss_backward(const Tensor& grad_loss, const Tensors& saved,
                                   const Tensor& logits, const Tensors& features,
                                   const Tensor& labels, const std::optional<Tensor>& class_counts,
                                   double scale, int64_t ignore_index,
                                   const std::vector<int64_t>& need_features,
                                   bool need_prototypes) {
  Arguments args("teacher_loss_backward");
  args.matrix("logits", logits, -1, -1);
  const int64_t N = logits.size(0), K = logits.size(1);
  const Modalities modalities(args, features, N, K);
  const auto M = static_cast<int64_t>(features.size());
  if (grad_loss.dim() != 0) fail(args.op(), "grad_loss", "a scalar", describe(grad_loss));
  const double grad = value_at(grad_loss, 0);
  if (need_features.size() != features.size()) {
    fail(args.op(), "need_features", "one flag a modality", std::to_string(need_features.size()));
  }
  if (saved.size() == features.size() + 1 && saved[0].dim() == 2 && !need_prototypes) {
    return scaled_gradients(args, grad, saved, logits, features, need_features);
  }
  if (saved.size() != 3) {
    fail(args.op(), "saved", "what the forward op left: 3 tensors", std::to_string(saved.size()));
  }
  const bool few = few_classes(K);
  args.saved("saved[0]", saved[0], {Statistics::size(M)}, ScalarType::Double);
  args.saved("saved[1]", saved[1], {modalities.total}, args.arithmetic());
  args.saved("saved[2]", saved[2], {few ? 1 + M : 1, N, K}, args.arithmetic());
  std::vector<int32_t> classes;
  if (!few) {
    classes = active_classes(read_classes(args, labels, N, K, ignore_index),
                             read_active(args, class_counts, K));
  }
  const auto* coefficients =
      static_cast<const double*>(saved[0].const_data_ptr()) + Statistics::coefficient(M, 0);
  void* centred = const_cast<void*>(saved[1].const_data_ptr());
  const auto* residuals = static_cast<const char*>(saved[2].const_data_ptr());

  Tensor grad_logits = empty_like_contiguous(logits);
  const double logits_factor = grad * coefficients[0];
  cpu::kernels().scale_rows({N, K, args.wide(), &logits_factor, 0, residuals,
                             grad_logits.mutable_data_ptr(), dtype_of(args.op(), "logits", logits)},
                            torch_threads);
  Tensors grad_features, grad_prototypes;
  for (size_t m = 0; m < features.size(); ++m) {
    const Modality modality = modalities.at(m, args, scale, centred);
    const bool needed = need_features[m] != 0;
    grad_features.push_back(output({N, modality.D}, features[m].scalar_type(), needed));
    grad_prototypes.push_back(output({K, modality.D}, args.arithmetic(), need_prototypes));
    const ModalityGrads grads{grad * coefficients[1 + m], nullptr,
                              data_or_null(grad_features[m], needed), modality.features.dtype,
                              data_or_null(grad_prototypes[m], need_prototypes)};
    if (few) {
      modality_backward(modality, residuals + static_cast<int64_t>(1 + m) * N * K * args.bytes(),
                        grads);
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
