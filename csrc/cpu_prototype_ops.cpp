// The CPU side of class_prototypes, prototype_loss, convergence_rates and modality_weights.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu_modality.h"

namespace pycdgkd {
namespace {

enum class Reduction : int64_t { none, mean, sum };

std::tuple<Tensors, Tensor> class_prototypes(const Tensors& features, const Tensor& labels,
                                             int64_t num_classes, int64_t ignore_index) {
  Arguments args("class_prototypes");
  if (features.empty()) fail(args.op(), "features", "at least one tensor", "none");
  const int64_t N = rows_of(args, "features[0]", features[0], "shape (N, D)");
  std::vector<Matrix> matrices;
  for (size_t m = 0; m < features.size(); ++m) {
    matrices.push_back(args.matrix(element("features", m), features[m], N, -1, "ND"));
  }
  const auto classes = read_classes(args, labels, N, num_classes, ignore_index);
  Tensor counts = empty({num_classes}, ScalarType::Long);
  auto* count = static_cast<int64_t*>(counts.mutable_data_ptr());
  count_classes(classes, num_classes, count);
  Tensors means;
  for (size_t m = 0; m < features.size(); ++m) {
    const int64_t D = features[m].size(1);
    means.push_back(empty({num_classes, D}, args.arithmetic()));
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

// What both passes need: checked arguments, classes, centred prototypes.
struct PrototypeProblem {
  PrototypeProblem(Arguments& args, const Tensor& features, const Tensor& prototypes,
                   const Tensor& labels, const std::optional<Tensor>& class_counts, double scale,
                   int64_t ignore_index) {
    const Matrix z = args.matrix("features", features, -1, -1, "ND");
    const int64_t N = features.size(0), D = features.size(1);
    const Matrix c = args.matrix("prototypes", prototypes, -1, D, "KD");
    const int64_t K = prototypes.size(0);
    const auto active = read_active(args, class_counts, K);
    classes = active_classes(read_classes(args, labels, N, K, ignore_index), active);
    count = count_rows(classes);
    storage.emplace(centred_size(D, K), args.wide());
    modality = {N, D, K, args.wide(), scale, z, storage->at(0)};
    centre(modality, c, active, storage->at(0));
  }
  // d loss / d logit is this times the residual.
  double factor(int64_t reduction) const {
    const bool mean = static_cast<Reduction>(reduction) == Reduction::mean;
    return 2.0 * modality.scale / (mean ? at_least_one(count) : 1.0);
  }
  std::vector<int32_t> classes;
  int64_t count;
  std::optional<Workspace> storage;
  Modality modality;
};

// Unit gradients of a many-class loss: of the features and of the prototypes, empty if not wanted.
Tensors unit_gradients(const Arguments& args, const Modality& m, bool features, bool prototypes) {
  return {output({m.N, m.D}, args.arithmetic(), features),
          output({m.K, m.D}, args.arithmetic(), prototypes)};
}

std::tuple<Tensor, Tensor, Tensors> prototype_loss(const Tensor& features, const Tensor& prototypes,
                                                   const Tensor& labels,
                                                   const std::optional<Tensor>& class_counts,
                                                   double scale, int64_t reduction,
                                                   int64_t ignore_index, bool need_features,
                                                   bool need_prototypes) {
  Arguments args("prototype_loss");
  const PrototypeProblem p(args, features, prototypes, labels, class_counts, scale, ignore_index);
  const Modality& m = p.modality;
  const bool rows = static_cast<Reduction>(reduction) == Reduction::none;
  Tensor row_loss = rows ? empty({m.N}, args.arithmetic()) : Tensor();
  Tensor true_prob = empty({m.N}, args.arithmetic());
  void* row_losses = data_or_null(row_loss, rows);
  const bool need_grad = need_features || need_prototypes;
  Tensors saved;
  ModalitySums sums;
  if (few_classes(m.K) || rows || !need_grad) {
    // The gradient of many row losses waits for their weights.
    const bool keep = need_grad && few_classes(m.K);
    if (keep) saved.push_back(empty({m.N, m.K}, args.arithmetic()));
    sums = modality_forward(m, p.classes, row_losses, true_prob.mutable_data_ptr(),
                            keep ? saved[0].mutable_data_ptr() : nullptr);
  } else {
    saved = unit_gradients(args, m, need_features, need_prototypes);
    sums = many_classes(
        m, p.classes, nullptr, true_prob.mutable_data_ptr(),
        {p.factor(reduction), nullptr, data_or_null(saved[0], need_features),
         args.wide() ? Dtype::float64 : Dtype::float32, data_or_null(saved[1], need_prototypes)});
  }
  if (rows) return {row_loss, true_prob, saved};
  const bool mean = static_cast<Reduction>(reduction) == Reduction::mean;
  const double loss = mean ? sums.loss / static_cast<double>(p.count) : sums.loss;
  return {scalar(loss, args.arithmetic()), true_prob, saved};
}

// The unit gradients that the forward pass of a many-class loss left, times grad_loss.
std::tuple<Tensor, Tensor> scaled_unit_gradients(const Arguments& args, const Tensor& grad_loss,
                                                 const Tensors& saved, const Tensor& features,
                                                 const Tensor& prototypes, bool need_features,
                                                 bool need_prototypes) {
  const double factor = value_at(grad_loss, 0);
  const int64_t K = prototypes.size(0), D = prototypes.size(1), N = features.size(0);
  Tensor grad_features = output({N, D}, features.scalar_type(), need_features);
  Tensor grad_prototypes = output({K, D}, args.arithmetic(), need_prototypes);
  if (need_features) {
    args.saved("saved[0]", saved[0], {N, D}, args.arithmetic());
    cpu::kernels().scale_rows(
        {N, D, args.wide(), &factor, 0, saved[0].const_data_ptr(), grad_features.mutable_data_ptr(),
         dtype_of(args.op(), "features", features)},
        torch_threads);
  }
  if (need_prototypes) {
    args.saved("saved[1]", saved[1], {K, D}, args.arithmetic());
    cpu::kernels().scale_rows(
        {K, D, args.wide(), &factor, 0, saved[1].const_data_ptr(),
         grad_prototypes.mutable_data_ptr(), args.wide() ? Dtype::float64 : Dtype::float32},
        torch_threads);
  }
  return {grad_features, grad_prototypes};
}

std::tuple<Tensor, Tensor> prototype_loss_backward(
    const Tensor& grad_loss, const Tensors& saved, const Tensor& features, const Tensor& prototypes,
    const Tensor& labels, const std::optional<Tensor>& class_counts, double scale,
    int64_t reduction, int64_t ignore_index, bool need_features, bool need_prototypes) {
  Arguments args("prototype_loss_backward");
  const PrototypeProblem p(args, features, prototypes, labels, class_counts, scale, ignore_index);
  const Modality& m = p.modality;
  args.grad_loss(grad_loss, m.N);
  const bool few = few_classes(m.K), rows = grad_loss.dim() == 1;
  const size_t expected = few ? 1 : (rows ? 0 : 2);
  if (saved.size() != expected) {
    fail(args.op(), "saved", "what the forward op left: " + std::to_string(expected) + " tensors",
         std::to_string(saved.size()));
  }
  if (!few && !rows) {
    return scaled_unit_gradients(args, grad_loss, saved, features, prototypes, need_features,
                                 need_prototypes);
  }
  Tensor grad_features = output({m.N, m.D}, features.scalar_type(), need_features);
  Tensor grad_prototypes = output({m.K, m.D}, args.arithmetic(), need_prototypes);
  Tensor row_factor;
  if (rows) row_factor = torch::stable::contiguous(torch::stable::to(grad_loss, args.arithmetic()));
  const ModalityGrads grads{
      p.factor(reduction) * (rows ? 1.0 : value_at(grad_loss, 0)),
      rows ? row_factor.const_data_ptr() : nullptr, data_or_null(grad_features, need_features),
      dtype_of(args.op(), "features", features), data_or_null(grad_prototypes, need_prototypes)};
  if (few) {
    args.saved("saved[0]", saved[0], {m.N, m.K}, args.arithmetic());
    modality_backward(m, saved[0].const_data_ptr(), grads);
  } else {
    many_classes_backward(m, p.classes, grads);
  }
  return {grad_features, grad_prototypes};
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
    Workspace centred(centred_size(D, K), args.wide());
    const Modality modality{N, D, K, args.wide(), scale, z, centred.at(0)};
    centre(modality, c, active, centred.at(0));
    rates.push_back(modality_forward(modality, classes, nullptr, nullptr, nullptr).rate);
  }
  return filled(rates, args.arithmetic());
}

Tensor modality_weights(const Tensor& rates) {
  Arguments args("modality_weights");
  if (rates.dim() != 1 || rates.size(0) < 1) {
    fail(args.op(), "convergence_rates", "shape (M,) with M >= 1", describe(rates));
  }
  dtype_of(args.op(), "convergence_rates", rates);
  std::vector<double> values;
  for (int64_t m = 0; m < rates.size(0); ++m) values.push_back(value_at(rates, m));
  const bool wide = rates.scalar_type() == ScalarType::Double;
  return filled(weights_from(values), wide ? ScalarType::Double : ScalarType::Float);
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
}
