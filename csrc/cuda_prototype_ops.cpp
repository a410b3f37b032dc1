// The CUDA side of class_prototypes, prototype_loss, convergence_rates and modality_weights.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda_many_classes.h"

namespace pycdgkd {
namespace {

using cuda::Reduction;

constexpr cuda::Values kNoValues{nullptr, 0, Dtype::float32};

std::tuple<Tensors, Tensor> class_prototypes(const Tensors& features, const Tensor& labels,
                                             int64_t num_classes, int64_t ignore_index) {
  Arguments args("class_prototypes");
  if (features.empty()) fail(args.op(), "features", "at least one tensor", "none");
  const int64_t N = rows_of(args, "features[0]", features[0], "shape (N, D)");
  const OnDevice device(args, "features[0]", features[0]);
  std::vector<Matrix> matrices;
  for (size_t m = 0; m < features.size(); ++m) {
    matrices.push_back(args.matrix(element("features", m), features[m], N, -1, "ND"));
    device.check(element("features", m), features[m]);
  }
  const cuda::Labels classes = device.labels(labels, N, num_classes, ignore_index);
  Tensor counts = device.empty({num_classes}, ScalarType::Long);
  const cuda::ClassMeans problem{N, num_classes, args.wide(), classes,
                                 static_cast<int64_t*>(counts.mutable_data_ptr())};
  Tensors means;
  std::vector<cuda::Averaged> averaged;
  for (size_t m = 0; m < features.size(); ++m) {
    const int64_t D = features[m].size(1);
    means.push_back(device.empty({num_classes, D}, args.arithmetic()));
    averaged.push_back({D, matrices[m], means[m].mutable_data_ptr()});
  }
  const auto M = static_cast<int64_t>(averaged.size());
  Tensor workspace = device.workspace(cuda::class_means_bytes(problem, averaged.data(), M));
  cuda::class_means(problem, averaged.data(), M, workspace.mutable_data_ptr(), device.stream());
  return {means, counts};
}

Tensors class_prototypes_backward(const Tensors& grad_prototypes, const Tensors& features,
                                  const Tensor& labels, const Tensor& counts,
                                  int64_t ignore_index) {
  Arguments args("class_prototypes_backward");
  check_modalities(args, features, grad_prototypes, "grad_prototypes");
  const int64_t N = rows_of(args, "features[0]", features[0], "shape (N, D)");
  const int64_t K = counts.numel();
  const OnDevice device(args, "features[0]", features[0]);
  args.saved("counts", counts, {K}, ScalarType::Long);
  device.check("counts", counts);
  const cuda::Labels classes = device.labels(labels, N, K, ignore_index);
  Tensors grads;
  for (size_t m = 0; m < features.size(); ++m) {
    args.matrix(element("features", m), features[m], N, -1, "ND");
    device.check(element("features", m), features[m]);
    const int64_t D = features[m].size(1);
    const Matrix grad = args.matrix(element("grad_prototypes", m), grad_prototypes[m], K, D);
    device.check(element("grad_prototypes", m), grad_prototypes[m]);
    grads.push_back(device.empty({N, D}, features[m].scalar_type()));
    cuda::class_means_backward(
        {N, D, K, args.wide(), classes, static_cast<const int64_t*>(counts.const_data_ptr()), grad,
         grads[m].mutable_data_ptr(), dtype_of(args.op(), "features", features[m])},
        device.stream());
  }
  return grads;
}

// ---- prototype_loss -----------------------------------------------------------------------------

// What both passes need: checked arguments on one device.
struct Problem {
  Problem(Arguments& args, const OnDevice& device, const Tensor& features, const Tensor& prototypes,
          const Tensor& labels, const std::optional<Tensor>& class_counts, int64_t ignore_index)
      : z(args.matrix("features", features, -1, -1, "ND")),
        N(features.size(0)),
        D(features.size(1)),
        c(args.matrix("prototypes", prototypes, -1, D, "KD")),
        K(prototypes.size(0)),
        classes(device.labels(labels, N, K, ignore_index)),
        counts(device.class_counts(class_counts, K)),
        centred(device.empty({centred_size(D, K)}, args.arithmetic())) {
    device.check("prototypes", prototypes);
  }
  cuda::Modality modality(void* residual, void* row_loss, void* true_prob) const {
    return {D, z, c, centred.mutable_data_ptr(), residual, row_loss, true_prob};
  }
  ManyClasses many(const Arguments& args, double scale, void* row_loss, void* true_prob) const {
    return {N, K, args.wide(), scale, modality(nullptr, row_loss, true_prob), classes, counts};
  }
  Matrix z;
  int64_t N, D;
  Matrix c;
  int64_t K;
  cuda::Labels classes;
  cuda::ClassCounts counts;
  Tensor centred;
};

void centre(const Arguments& args, const OnDevice& device, const Problem& p, double scale) {
  Tensor workspace = device.workspace(cuda::centre_bytes(p.D, p.K));
  cuda::centre_prototypes(
      {p.D, p.K, args.wide(), scale, p.c, p.counts, p.centred.mutable_data_ptr()},
      workspace.mutable_data_ptr(), device.stream());
}

// The few-class forward pass, or the sums of what many_classes left, without cross-entropy.
void run_teacher(const Arguments& args, const OnDevice& device, const Problem& p,
                 const cuda::Modality* modalities, int64_t M, double scale, Reduction reduction,
                 const cuda::Results& results) {
  const cuda::Teacher teacher{p.N,     p.K,        M,         args.wide(), scale,     1.0,    {},
                              nullptr, modalities, p.classes, p.counts,    reduction, results};
  Tensor workspace = device.workspace(cuda::teacher_bytes(teacher));
  cuda::teacher(teacher, workspace.mutable_data_ptr(), device.stream());
}

std::tuple<Tensor, Tensor, Tensors> prototype_loss(const Tensor& features, const Tensor& prototypes,
                                                   const Tensor& labels,
                                                   const std::optional<Tensor>& class_counts,
                                                   double scale, int64_t reduction,
                                                   int64_t ignore_index, bool need_features,
                                                   bool need_prototypes) {
  Arguments args("prototype_loss");
  const OnDevice device(args, "features", features);
  const Problem p(args, device, features, prototypes, labels, class_counts, ignore_index);
  const auto kind = static_cast<Reduction>(reduction);
  const bool rows = kind == Reduction::none, few = few_classes(p.K);
  const bool need_grad = need_features || need_prototypes;
  Tensor row_loss = device.output({p.N}, args.arithmetic(), rows || !few);
  Tensor true_prob = device.empty({p.N}, args.arithmetic());
  Tensor loss = device.empty({}, args.arithmetic());
  Tensor statistics = device.empty({cuda::statistics_size(1)}, ScalarType::Double);
  Tensors saved;
  if (few) {
    if (need_grad) saved = {device.empty({p.N, p.K}, args.arithmetic()), statistics, p.centred};
  } else {
    centre(args, device, p, scale);
    const bool at_once = need_grad && !rows;  // the gradient of many row losses waits for weights
    Tensor count = device.empty({}, ScalarType::Double);
    auto* number = static_cast<double*>(count.mutable_data_ptr());
    if (at_once) {
      saved = {device.output({p.N, p.D}, args.arithmetic(), need_features),
               device.output({p.K, p.D}, args.arithmetic(), need_prototypes)};
      cuda::count_rows(p.N, p.K, p.classes, p.counts, number, device.stream());
    }
    many_classes(device,
                 p.many(args, scale, row_loss.mutable_data_ptr(), true_prob.mutable_data_ptr()),
                 {{2.0 * scale, kNoValues, nullptr},
                  at_once && kind == Reduction::mean ? number : nullptr,
                  at_once ? data_or_null(saved[0], need_features) : nullptr,
                  arithmetic_dtype(args.wide()),
                  at_once ? data_or_null(saved[1], need_prototypes) : nullptr});
  }
  const cuda::Modality modality =
      p.modality(few && need_grad ? saved[0].mutable_data_ptr() : nullptr,
                 data_or_null(row_loss, rows || !few), true_prob.mutable_data_ptr());
  if (few || !rows) {
    run_teacher(args, device, p, &modality, 1, scale, kind,
                {loss.mutable_data_ptr(), nullptr, nullptr, nullptr, nullptr,
                 static_cast<double*>(statistics.mutable_data_ptr())});
  }
  return {rows ? row_loss : loss, true_prob, saved};
}

// The unit gradients that the forward pass of a many-class loss left, times grad_loss.
void scale_unit_gradient(const Arguments& args, const OnDevice& device, const char* name,
                         const Tensor& grad_loss, const Tensor& unit, const Tensor& grad) {
  const int64_t N = grad.size(0), D = grad.size(1);
  args.saved(name, unit, {N, D}, args.arithmetic());
  const cuda::Factor factor{1.0, device.values("grad_loss", grad_loss), nullptr};
  cuda::teacher_backward({N, D, 0, args.wide(), factor, unit.const_data_ptr(),
                          grad.mutable_data_ptr(), dtype_of(args.op(), "features", grad), nullptr},
                         device.stream());
}

std::tuple<Tensor, Tensor> prototype_loss_backward(
    const Tensor& grad_loss, const Tensors& saved, const Tensor& features, const Tensor& prototypes,
    const Tensor& labels, const std::optional<Tensor>& class_counts, double scale,
    int64_t reduction, int64_t ignore_index, bool need_features, bool need_prototypes) {
  Arguments args("prototype_loss_backward");
  const OnDevice device(args, "features", features);
  const Problem p(args, device, features, prototypes, labels, class_counts, ignore_index);
  args.grad_loss(grad_loss, p.N);
  const bool few = few_classes(p.K), rows = grad_loss.dim() == 1;
  const size_t expected = few ? 3 : (rows ? 0 : 2);
  if (saved.size() != expected) {
    fail(args.op(), "saved", "what the forward op left: " + std::to_string(expected) + " tensors",
         std::to_string(saved.size()));
  }
  Tensor grad_features = device.output({p.N, p.D}, features.scalar_type(), need_features);
  Tensor grad_prototypes = device.output({p.K, p.D}, args.arithmetic(), need_prototypes);
  if (!few && !rows) {
    if (need_features)
      scale_unit_gradient(args, device, "saved[0]", grad_loss, saved[0], grad_features);
    if (need_prototypes)
      scale_unit_gradient(args, device, "saved[1]", grad_loss, saved[1], grad_prototypes);
    return {grad_features, grad_prototypes};
  }
  const cuda::Values grad = device.values("grad_loss", grad_loss);
  if (!few) {
    centre(args, device, p, scale);
    many_classes(device, p.many(args, scale, nullptr, nullptr),
                 {{2.0 * scale, grad, nullptr},
                  nullptr,
                  data_or_null(grad_features, need_features),
                  p.z.dtype,
                  data_or_null(grad_prototypes, need_prototypes)});
    return {grad_features, grad_prototypes};
  }
  args.saved("saved[0]", saved[0], {p.N, p.K}, args.arithmetic());
  args.saved("saved[1]", saved[1], {cuda::statistics_size(1)}, ScalarType::Double);
  args.saved("saved[2]", saved[2], {centred_size(p.D, p.K)}, args.arithmetic());
  const void* centred = saved[2].const_data_ptr();
  // The forward pass left 2 scale / max(rows, 1) as the coefficient of its one modality.
  const bool mean = static_cast<Reduction>(reduction) == Reduction::mean;
  const auto* coefficient = static_cast<const double*>(saved[1].const_data_ptr()) + 6;
  const cuda::Factor factor{mean ? 1.0 : 2.0 * scale, grad, mean ? coefficient : nullptr};
  if (need_features) {
    const cuda::ModalityBackward modality{
        p.D,      factor, saved[0].const_data_ptr(), centred, grad_features.mutable_data_ptr(),
        p.z.dtype};
    cuda::teacher_backward({p.N, p.K, 1, args.wide(), {}, nullptr, nullptr, p.z.dtype, &modality},
                           device.stream());
  }
  if (need_prototypes) {
    const cuda::PrototypeGrad problem{p.N,         p.D,     p.K,
                                      args.wide(), factor,  saved[0].const_data_ptr(),
                                      p.z,         centred, grad_prototypes.mutable_data_ptr()};
    Tensor workspace = device.workspace(cuda::prototype_grad_bytes(problem));
    cuda::prototype_grad(problem, workspace.mutable_data_ptr(), device.stream());
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
  rows_of(args, "prototypes[0]", prototypes[0], "shape (K, D)");
  const OnDevice device(args, "features[0]", features[0]);
  const auto M = static_cast<int64_t>(features.size());
  std::vector<Problem> problems;
  std::vector<Tensor> true_probs;
  std::vector<cuda::Modality> modalities;
  for (size_t m = 0; m < features.size(); ++m) {
    args.matrix(element("features", m), features[m], N, -1, "ND");
    args.matrix(element("prototypes", m), prototypes[m], prototypes[0].size(0),
                features[m].size(1));
    device.check(element("features", m), features[m]);
    problems.emplace_back(args, device, features[m], prototypes[m], labels, class_counts,
                          ignore_index);
    const Problem& p = problems.back();
    const bool few = few_classes(p.K);
    true_probs.push_back(device.output({N}, args.arithmetic(), !few));
    modalities.push_back(p.modality(nullptr, nullptr, data_or_null(true_probs[m], !few)));
    if (few) continue;
    centre(args, device, p, scale);
    many_classes(device, p.many(args, scale, nullptr, true_probs[m].mutable_data_ptr()),
                 {{0.0, kNoValues, nullptr}, nullptr, nullptr, p.z.dtype, nullptr});
  }
  Tensor rates = device.empty({M}, args.arithmetic());
  Tensor statistics = device.empty({cuda::statistics_size(M)}, ScalarType::Double);
  run_teacher(args, device, problems[0], modalities.data(), M, scale, Reduction::sum,
              {nullptr, nullptr, nullptr, rates.mutable_data_ptr(), nullptr,
               static_cast<double*>(statistics.mutable_data_ptr())});
  return rates;
}

Tensor modality_weights(const Tensor& rates) {
  Arguments args("modality_weights");
  if (rates.dim() != 1 || rates.size(0) < 1) {
    fail(args.op(), "convergence_rates", "shape (M,) with M >= 1", describe(rates));
  }
  const OnDevice device(args, "convergence_rates", rates);
  const cuda::Values values = device.values("convergence_rates", rates);
  const bool wide = values.dtype == Dtype::float64;
  Tensor weights = device.empty({rates.size(0)}, wide ? ScalarType::Double : ScalarType::Float);
  cuda::modality_weights(values, rates.size(0), wide, weights.mutable_data_ptr(), device.stream());
  return weights;
}

}  // namespace
}  // namespace pycdgkd

STABLE_TORCH_LIBRARY_IMPL(pycdgkd, PYCDGKD_CUDA_KEY, m) {
  m.impl("class_prototypes", TORCH_BOX(&pycdgkd::class_prototypes));
  m.impl("class_prototypes_backward", TORCH_BOX(&pycdgkd::class_prototypes_backward));
  m.impl("prototype_loss", TORCH_BOX(&pycdgkd::prototype_loss));
  m.impl("prototype_loss_backward", TORCH_BOX(&pycdgkd::prototype_loss_backward));
  m.impl("convergence_rates", TORCH_BOX(&pycdgkd::convergence_rates));
  m.impl("modality_weights", TORCH_BOX(&pycdgkd::modality_weights));
}
