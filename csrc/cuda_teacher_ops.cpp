// The CUDA side of teacher_loss: one launch forward and one backward for given prototypes, one more
// for class means; of a small batch one forward, with the gradients for grad_loss = 1. Nothing here
// waits for the device.
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

// Prototypes and counts as they were given, or none.
struct Given {
  Given(Arguments& args, const OnDevice& device, const Modalities& modalities,
        const Tensors& prototypes, const std::optional<Tensor>& class_counts)
      : counts(device.class_counts(class_counts, modalities.K)) {
    for (size_t m = 0; m < prototypes.size(); ++m) {
      matrices.push_back(
          args.matrix(element("prototypes", m), prototypes[m], modalities.K, modalities.D[m]));
      device.check(element("prototypes", m), prototypes[m]);
    }
  }
  std::vector<Matrix> matrices;
  cuda::ClassCounts counts;
};

// Prototypes to work with: those given, or the batch's class means (Eq. 1), then with their counts.
struct Prototypes {
  Prototypes(const Arguments& args, const OnDevice& device, const Modalities& modalities,
             const Given& given, const cuda::Labels& labels)
      : counts(given.counts), matrices(given.matrices) {
    if (!matrices.empty()) return;
    const int64_t K = modalities.K;
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

// Where the gradients of a batch are made in the forward pass: pycdgkd/ops/registration.py,
// SMALL_FEATURES and SMALL_ROWS. Launches are most of the time there.
constexpr int64_t kSmallFeatures = int64_t{1} << 18, kSmallRows = 1024;

bool is_small(const Arguments& args, const Modalities& modalities) {
  const auto M = static_cast<int64_t>(modalities.D.size());
  int64_t elements = 0;
  for (size_t m = 0; m < modalities.D.size(); ++m) {
    if (modalities.z[m].dtype != arithmetic_dtype(args.wide())) return false;
    elements += modalities.N * modalities.D[m];
  }
  return few_classes(modalities.K) && elements <= kSmallFeatures &&
         M <= cuda::kMostSmallModalities && M * modalities.N <= kSmallRows;
}

// The gradients of the logits and features of few classes, from what the forward kernel left for
// them (statistics, centred prototypes, residuals), times `grad`; those not wanted are empty.
void gradients_of_few(const Arguments& args, const OnDevice& device, const Modalities& modalities,
                      const Tensors& left, const cuda::Values& grad, const Tensor& grad_logits,
                      const Tensors& grad_features) {
  const int64_t N = modalities.N, K = modalities.K;
  const auto M = static_cast<int64_t>(grad_features.size());
  const auto* coefficients = static_cast<const double*>(left[0].const_data_ptr()) + 3 + 2 * M;
  const auto* residuals = static_cast<const char*>(left[2].const_data_ptr());
  std::vector<cuda::ModalityBackward> parts;
  for (size_t m = 0; m < grad_features.size(); ++m) {
    const Tensor& to = grad_features[m];
    parts.push_back({modalities.D[m],
                     {1.0, grad, coefficients + 1 + m},
                     residuals + static_cast<int64_t>(1 + m) * N * K * args.bytes(),
                     modalities.own(left[1], m),
                     data_or_null(to, to.dim() == 2),
                     dtype_of(args.op(), "features", to)});
  }
  cuda::teacher_backward({N,
                          K,
                          M,
                          args.wide(),
                          {1.0, grad, coefficients},
                          residuals,
                          grad_logits.mutable_data_ptr(),
                          dtype_of(args.op(), "logits", grad_logits),
                          parts.data()},
                         device.stream());
}

// The gradients for grad_loss = 1 that a small batch leaves: of the logits, of each modality.
Tensors empty_gradients(const OnDevice& device, const Modalities& modalities, ScalarType type) {
  Tensors grads{device.empty({modalities.N, modalities.K}, type)};
  for (const int64_t D : modalities.D) grads.push_back(device.empty({modalities.N, D}, type));
  return grads;
}

// Everything by one launch, where the device can; `grads` as empty_gradients makes them, or none.
bool run_small(const Arguments& args, const OnDevice& device, const Modalities& modalities,
               const Given& given, const Matrix& logits, const cuda::Labels& labels, double scale,
               double proto_weight, const Tensors& grads, const cuda::Results& results) {
  const auto grad = [&](size_t part) {
    return grads.empty() ? nullptr : grads[part].mutable_data_ptr();
  };
  std::vector<cuda::SmallModality> parts;
  for (size_t m = 0; m < modalities.D.size(); ++m) {
    parts.push_back({modalities.D[m], modalities.z[m],
                     given.matrices.empty() ? Matrix{} : given.matrices[m], grad(1 + m)});
  }
  return cuda::small_teacher({modalities.N, modalities.K, static_cast<int64_t>(parts.size()),
                              args.wide(), scale, proto_weight, given.matrices.empty(), logits,
                              parts.data(), labels, given.counts, grad(0), results},
                             device.stream());
}

// By launches for the class means, for each modality of many classes, and for all that is left;
// returns what the backward op wants if there is to be one.
Tensors run_teacher(const Arguments& args, const OnDevice& device, const Modalities& modalities,
                    const Given& given, const Matrix& logits, const cuda::Labels& labels,
                    double scale, double proto_weight, bool need_grad, cuda::Results results) {
  const int64_t N = modalities.N, K = modalities.K;
  const auto M = static_cast<int64_t>(modalities.D.size());
  const ScalarType type = args.arithmetic();
  const Prototypes c(args, device, modalities, given, labels);
  const bool few = few_classes(K);
  Tensor residuals = device.output({few ? 1 + M : 1, N, K}, type, need_grad);
  Tensor centred = device.empty({modalities.total}, type);
  Tensor statistics = device.empty({cuda::statistics_size(M)}, ScalarType::Double);
  results.statistics = static_cast<double*>(statistics.mutable_data_ptr());
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
    many_classes(device, {N, K, args.wide(), scale, parts[at], labels, c.counts},
                 {{0.0, {nullptr, 0, Dtype::float32}, nullptr},
                  nullptr,
                  nullptr,
                  modalities.z[at].dtype,
                  nullptr});
  }
  const cuda::Teacher problem{N,
                              K,
                              M,
                              args.wide(),
                              scale,
                              proto_weight,
                              logits,
                              data_or_null(residuals, need_grad),
                              parts.data(),
                              labels,
                              c.counts,
                              cuda::Reduction::mean,
                              results};
  Tensor workspace = device.workspace(cuda::teacher_bytes(problem));
  cuda::teacher(problem, workspace.mutable_data_ptr(), device.stream());
  if (!need_grad) return {};
  return {statistics, centred, residuals};
}

using TeacherOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensors>;

TeacherOutputs teacher_loss(const Tensor& logits, const Tensors& features,
                            const Tensors& prototypes, const Tensor& labels,
                            const std::optional<Tensor>& class_counts, double proto_weight,
                            double scale, int64_t ignore_index, bool need_grad,
                            bool need_prototypes) {
  Arguments args("teacher_loss");
  if (!prototypes.empty()) check_modalities(args, features, prototypes);
  const Matrix l = args.matrix("logits", logits, -1, -1);
  const int64_t N = logits.size(0), K = logits.size(1);
  const OnDevice device(args, "logits", logits);
  const Modalities modalities(args, device, features, N, K);
  const auto M = static_cast<int64_t>(features.size());
  const cuda::Labels classes = device.labels(labels, N, K, ignore_index);
  const Given given(args, device, modalities, prototypes, class_counts);

  const ScalarType type = args.arithmetic();
  Tensor loss = device.empty({}, type), cross_entropy = device.empty({}, type);
  Tensor losses = device.empty({M}, type), rates = device.empty({M}, type);
  Tensor weights = device.empty({M}, type);
  const cuda::Results results{loss.mutable_data_ptr(),    cross_entropy.mutable_data_ptr(),
                              losses.mutable_data_ptr(),  rates.mutable_data_ptr(),
                              weights.mutable_data_ptr(), nullptr};
  const bool small = is_small(args, modalities), at_once = need_grad && !need_prototypes && small;
  Tensors saved;
  if (at_once) saved = empty_gradients(device, modalities, type);
  if (!small || need_grad != at_once ||
      !run_small(args, device, modalities, given, l, classes, scale, proto_weight, saved,
                 results)) {
    Tensors left = run_teacher(args, device, modalities, given, l, classes, scale, proto_weight,
                               need_grad, results);
    if (at_once) {
      gradients_of_few(args, device, modalities, left, {nullptr, 0, Dtype::float32}, saved[0],
                       Tensors(saved.begin() + 1, saved.end()));
    } else {
      saved = std::move(left);
    }
  }
  return {loss, cross_entropy, losses, rates, weights, saved};
}

// The gradients that the forward pass made at once, times grad_loss, in one launch.
void scale_saved(const Arguments& args, const cuda::Values& grad_loss, const OnDevice& device,
                 const Tensors& unit, const Tensors& grads) {
  std::vector<cuda::ScaledGrad> arrays;
  for (size_t part = 0; part < unit.size(); ++part) {
    if (grads[part].dim() != 2) continue;  // not wanted
    arrays.push_back({grads[part].numel(), unit[part].const_data_ptr(),
                      grads[part].mutable_data_ptr(), dtype_of(args.op(), "grads", grads[part])});
  }
  cuda::scale_grads({static_cast<int64_t>(arrays.size()), args.wide(), grad_loss, arrays.data()},
                    device.stream());
}

// The same where the gradients may be taken over: nothing moves if the factor is 1.
void scale_unit_grads(Tensors unit_grads, const Tensor& grad_loss) {
  Arguments args("scale_unit_grads_");
  if (unit_grads.empty()) return;
  const OnDevice device(args, "unit_grads[0]", unit_grads[0]);
  for (size_t part = 0; part < unit_grads.size(); ++part) {
    const Tensor& unit = unit_grads[part];
    const std::string name = element("unit_grads", part);
    args.matrix(name, unit, -1, -1);
    args.saved(name, unit, {unit.size(0), unit.size(1)}, args.arithmetic());
    device.check(name, unit);
  }
  if (grad_loss.dim() != 0) fail(args.op(), "grad_loss", "a scalar", describe(grad_loss));
  scale_saved(args, device.values("grad_loss", grad_loss), device, unit_grads, unit_grads);
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
  const bool few = few_classes(K);
  const bool at_once =
      saved.size() == features.size() + 1 && saved[0].dim() == 2 && !need_prototypes;
  if (!at_once) {
    if (saved.size() != 3) {
      fail(args.op(), "saved", "what the forward op left: 3 tensors", std::to_string(saved.size()));
    }
    args.saved("saved[0]", saved[0], {cuda::statistics_size(M)}, ScalarType::Double);
    args.saved("saved[1]", saved[1], {modalities.total}, args.arithmetic());
    args.saved("saved[2]", saved[2], {few ? 1 + M : 1, N, K}, args.arithmetic());
  }
  const cuda::Values grad = device.values("grad_loss", grad_loss);

  Tensor grad_logits = device.empty({N, K}, logits.scalar_type());
  Tensors grad_features, grad_prototypes;
  for (size_t m = 0; m < features.size(); ++m) {
    grad_features.push_back(
        device.output({N, modalities.D[m]}, features[m].scalar_type(), need_features[m] != 0));
    grad_prototypes.push_back(
        device.output({K, modalities.D[m]}, args.arithmetic(), need_prototypes));
  }
  if (at_once) {
    Tensors grads{grad_logits};
    grads.insert(grads.end(), grad_features.begin(), grad_features.end());
    for (size_t part = 0; part < saved.size(); ++part) {
      const int64_t columns = part == 0 ? K : modalities.D[part - 1];
      args.saved(element("saved", part), saved[part], {N, columns}, args.arithmetic());
      device.check(element("saved", part), saved[part]);
    }
    scale_saved(args, grad, device, saved, grads);
    return {grad_logits, grad_features, grad_prototypes};
  }
  const auto* coefficients = static_cast<const double*>(saved[0].const_data_ptr()) + 3 + 2 * M;
  const auto* residuals = static_cast<const char*>(saved[2].const_data_ptr());
  if (few) {
    gradients_of_few(args, device, modalities, saved, grad, grad_logits, grad_features);
  } else {
    cuda::teacher_backward({N,
                            K,
                            0,
                            args.wide(),
                            {1.0, grad, coefficients},
                            residuals,
                            grad_logits.mutable_data_ptr(),
                            dtype_of(args.op(), "logits", logits),
                            nullptr},
                           device.stream());
  }
  for (size_t m = 0; m < features.size(); ++m) {
    const int64_t D = modalities.D[m];
    const cuda::Factor factor{1.0, grad, coefficients + 1 + m};
    const void* own = modalities.own(saved[1], m);
    if (few) {
      if (!need_prototypes) continue;
      const char* residual = residuals + static_cast<int64_t>(1 + m) * N * K * args.bytes();
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
                 {factor, nullptr, data_or_null(grad_features[m], need_features[m] != 0),
                  modalities.z[m].dtype, data_or_null(grad_prototypes[m], need_prototypes)});
  }
  return {grad_logits, grad_features, grad_prototypes};
}

}  // namespace
}  // namespace pycdgkd

STABLE_TORCH_LIBRARY_IMPL(pycdgkd, PYCDGKD_CUDA_KEY, m) {
  m.impl("teacher_loss", TORCH_BOX(&pycdgkd::teacher_loss));
  m.impl("teacher_loss_backward", TORCH_BOX(&pycdgkd::teacher_loss_backward));
  m.impl("scale_unit_grads_", TORCH_BOX(&pycdgkd::scale_unit_grads));
}
