// The CUDA side of teacher_loss: one launch forward and one backward for given prototypes, one more
// for class means. Nothing here waits for the device.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda_many_classes.h"

namespace pycdgkd {
namespace {

// The modalities of one call: their checked features and where the centred prototypes of each
// begin in the array of all.
struct Modalities {
  Modalities(Arguments& args, const OnDevice& device, const Tensors& features, int64_t rows,
             int64_t classes)
      : N(rows), K(classes), bytes(0) {
    if (features.empty()) fail(args.op(), "features", "at least one modality", "none");
    for (size_t m = 0; m < features.size(); ++m) {
      z.push_back(args.matrix(element("features", m), features[m], N, -1, "ND"));
      device.check(element("features", m), features[m]);
      D.push_back(features[m].size(1));
      begin.push_back(total);
      total += centred_size(D.back(), K);
    }
    bytes = args.bytes();
  }
  void* own(const Tensor& centred, size_t m) const {
    return static_cast<char*>(centred.mutable_data_ptr()) + begin[m] * bytes;
  }
  int64_t N, K, bytes, total = 0;
  std::vector<Matrix> z;
  std::vector<int64_t> D, begin;
};

// Prototypes to work with: those given, or the batch's class means (Eq. 1), then with their counts.
struct Prototypes {
  Prototypes(Arguments& args, const OnDevice& device, const Modalities& modalities,
             const Tensors& given, const cuda::Labels& labels,
             const std::optional<Tensor>& class_counts)
      : counts(device.class_counts(class_counts, modalities.K)) {
    const int64_t K = modalities.K;
    for (size_t m = 0; m < given.size(); ++m) {
      matrices.push_back(args.matrix(element("prototypes", m), given[m], K, modalities.D[m]));
      device.check(element("prototypes", m), given[m]);
    }
    if (!given.empty()) return;
    count = device.empty({K}, ScalarType::Long);
    auto* number = static_cast<int64_t*>(count.mutable_data_ptr());
    std::vector<cuda::Averaged> averaged;
    for (size_t m = 0; m < modalities.D.size(); ++m) {
      means.push_back(device.empty({K, modalities.D[m]}, args.arithmetic()));
      averaged.push_back({modalities.D[m], modalities.z[m], means[m].mutable_data_ptr()});
      matrices.push_back(
          {means[m].const_data_ptr(), modalities.D[m], 1, arithmetic_dtype(args.wide())});
    }
    const cuda::ClassMeans problem{modalities.N, K, args.wide(), labels, number};
    const auto M = static_cast<int64_t>(averaged.size());
    workspace = device.workspace(cuda::class_means_bytes(problem, averaged.data(), M));
    cuda::class_means(problem, averaged.data(), M, workspace.mutable_data_ptr(), device.stream());
    counts = {number, 1};
  }
  cuda::ClassCounts counts;
  std::vector<Matrix> matrices;
  Tensors means;
  Tensor count, workspace;
};

using TeacherOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensors>;

TeacherOutputs teacher_loss(const Tensor& logits, const Tensors& features,
                            const Tensors& prototypes, const Tensor& labels,
                            const std::optional<Tensor>& class_counts, double proto_weight,
                            double scale, int64_t ignore_index, bool need_grad, bool) {
  Arguments args("teacher_loss");
  if (!prototypes.empty()) check_modalities(args, features, prototypes);
  const Matrix l = args.matrix("logits", logits, -1, -1);
  const int64_t N = logits.size(0), K = logits.size(1);
  const OnDevice device(args, "logits", logits);
  const Modalities modalities(args, device, features, N, K);
  const auto M = static_cast<int64_t>(features.size());
  const cuda::Labels classes = device.labels(labels, N, K, ignore_index);
  const Prototypes c(args, device, modalities, prototypes, classes, class_counts);

  const ScalarType type = args.arithmetic();
  const bool few = few_classes(K);
  Tensor residuals = device.output({few ? 1 + M : 1, N, K}, type, need_grad);
  Tensor centred = device.empty({modalities.total}, type);
  Tensor statistics = device.empty({cuda::statistics_size(M)}, ScalarType::Double);
  // Of many classes, the launches of each modality leave its rows here.
  Tensor row_losses = device.output({M, N}, type, !few);
  Tensor true_probs = device.output({M, N}, type, !few);
  const auto row = [&](const Tensor& of, int64_t index, int64_t width) {
    return static_cast<char*>(of.mutable_data_ptr()) + index * width * args.bytes();
  };
  std::vector<cuda::Modality> parts;
  for (int64_t m = 0; m < M; ++m) {
    const auto at = static_cast<size_t>(m);
    parts.push_back({modalities.D[at], modalities.z[at], c.matrices[at],
                     modalities.own(centred, at),
                     few && need_grad ? row(residuals, 1 + m, N * K) : nullptr,
                     few ? nullptr : row(row_losses, m, N), few ? nullptr : row(true_probs, m, N)});
    if (few) continue;
    Tensor workspace = device.workspace(cuda::centre_bytes(modalities.D[at], K));
    cuda::centre_prototypes(
        {modalities.D[at], K, args.wide(), scale, c.matrices[at], c.counts, parts[at].centred},
        workspace.mutable_data_ptr(), device.stream());
    many_classes(device, {N, K, args.wide(), scale, parts[at], classes, c.counts},
                 {{0.0, {nullptr, 0, Dtype::float32}, nullptr},
                  nullptr,
                  nullptr,
                  modalities.z[at].dtype,
                  nullptr});
  }
  Tensor loss = device.empty({}, type), cross_entropy = device.empty({}, type);
  Tensor losses = device.empty({M}, type), rates = device.empty({M}, type);
  Tensor weights = device.empty({M}, type);
  const cuda::Teacher problem{
      N,
      K,
      M,
      args.wide(),
      scale,
      proto_weight,
      l,
      data_or_null(residuals, need_grad),
      parts.data(),
      classes,
      c.counts,
      cuda::Reduction::mean,
      {loss.mutable_data_ptr(), cross_entropy.mutable_data_ptr(), losses.mutable_data_ptr(),
       rates.mutable_data_ptr(), weights.mutable_data_ptr(),
       static_cast<double*>(statistics.mutable_data_ptr())}};
  Tensor workspace = device.workspace(cuda::teacher_bytes(problem));
  cuda::teacher(problem, workspace.mutable_data_ptr(), device.stream());
  Tensors saved;
  if (need_grad) saved = {statistics, centred, residuals};
  return {loss, cross_entropy, losses, rates, weights, saved};
}

using TeacherGrads = std::tuple<Tensor, Tensors, Tensors>;

TeacherGrads teacher_loss_backward(const Tensor& grad_loss, const Tensors& saved,
                                   const Tensor& logits, const Tensors& features,
                                   const Tensor& labels, const std::optional<Tensor>& class_counts,
                                   double scale, int64_t ignore_index,
                                   const std::vector<int64_t>& need_features,
                                   bool need_prototypes) {
  Arguments args("teacher_loss_backward");
  args.matrix("logits", logits, -1, -1);
  const int64_t N = logits.size(0), K = logits.size(1);
  const OnDevice device(args, "logits", logits);
  const Modalities modalities(args, device, features, N, K);
  const auto M = static_cast<int64_t>(features.size());
  if (grad_loss.dim() != 0) fail(args.op(), "grad_loss", "a scalar", describe(grad_loss));
  if (need_features.size() != features.size()) {
    fail(args.op(), "need_features", "one flag a modality", std::to_string(need_features.size()));
  }
  if (saved.size() != 3) {
    fail(args.op(), "saved", "what the forward op left: 3 tensors", std::to_string(saved.size()));
  }
  const bool few = few_classes(K);
  args.saved("saved[0]", saved[0], {cuda::statistics_size(M)}, ScalarType::Double);
  args.saved("saved[1]", saved[1], {modalities.total}, args.arithmetic());
  args.saved("saved[2]", saved[2], {few ? 1 + M : 1, N, K}, args.arithmetic());
  const cuda::Values grad = device.values("grad_loss", grad_loss);
  const auto* coefficients = static_cast<const double*>(saved[0].const_data_ptr()) + 3 + 2 * M;
  const auto* residuals = static_cast<const char*>(saved[2].const_data_ptr());

  Tensor grad_logits = device.empty({N, K}, logits.scalar_type());
  Tensors grad_features, grad_prototypes;
  std::vector<cuda::ModalityBackward> parts;
  for (size_t m = 0; m < features.size(); ++m) {
    const bool needed = need_features[m] != 0;
    const int64_t D = modalities.D[m];
    grad_features.push_back(device.output({N, D}, features[m].scalar_type(), needed));
    grad_prototypes.push_back(device.output({K, D}, args.arithmetic(), need_prototypes));
    const cuda::Factor factor{1.0, grad, coefficients + 1 + m};
    const void* own = modalities.own(saved[1], m);
    void* to = data_or_null(grad_features[m], needed);
    if (few) {
      const char* residual = residuals + static_cast<int64_t>(1 + m) * N * K * args.bytes();
      parts.push_back({D, factor, residual, own, to, modalities.z[m].dtype});
      if (!need_prototypes) continue;
      const cuda::PrototypeGrad problem{N,
                                        D,
                                        K,
                                        args.wide(),
                                        factor,
                                        residual,
                                        modalities.z[m],
                                        own,
                                        grad_prototypes[m].mutable_data_ptr()};
      Tensor workspace = device.workspace(cuda::prototype_grad_bytes(problem));
      cuda::prototype_grad(problem, workspace.mutable_data_ptr(), device.stream());
      continue;
    }
    const cuda::Modality modality{D,       modalities.z[m], {},     modalities.own(saved[1], m),
                                  nullptr, nullptr,         nullptr};
    many_classes(device,
                 {N, K, args.wide(), scale, modality, device.labels(labels, N, K, ignore_index),
                  device.class_counts(class_counts, K)},
                 {factor, nullptr, to, modalities.z[m].dtype,
                  data_or_null(grad_prototypes[m], need_prototypes)});
  }
  cuda::teacher_backward({N,
                          K,
                          static_cast<int64_t>(parts.size()),
                          args.wide(),
                          {1.0, grad, coefficients},
                          residuals,
                          grad_logits.mutable_data_ptr(),
                          dtype_of(args.op(), "logits", logits),
                          parts.data()},
                         device.stream());
  return {grad_logits, grad_features, grad_prototypes};
}

}  // namespace
}  // namespace pycdgkd

STABLE_TORCH_LIBRARY_IMPL(pycdgkd, PYCDGKD_CUDA_KEY, m) {
  m.impl("teacher_loss", TORCH_BOX(&pycdgkd::teacher_loss));
  m.impl("teacher_loss_backward", TORCH_BOX(&pycdgkd::teacher_loss_backward));
}
