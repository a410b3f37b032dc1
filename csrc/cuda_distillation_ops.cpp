// The CUDA side of multi_source_kl and distillation_loss.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "cuda_tensors.h"

namespace pycdgkd {
namespace {

using cuda::Reduction;

// The sources as matrices on the logits' device; their weights stay there.
struct Sources {
  Sources(Arguments& args, const OnDevice& device, const Tensors& sources,
          const std::optional<Tensor>& given, int64_t N, int64_t K)
      : S(static_cast<int64_t>(sources.size())) {
    for (size_t j = 0; j < sources.size(); ++j) {
      matrices.push_back(args.matrix(element("sources", j), sources[j], N, K));
      device.check(element("sources", j), sources[j]);
    }
    if (S > cuda::kMostSources) {
      fail(args.op(), "sources", "at most " + std::to_string(cuda::kMostSources) + " on CUDA",
           std::to_string(S));
    }
    if (!given.has_value()) return;
    if (given->dim() != 1 || given->size(0) != S) {
      fail(args.op(), "source_weights", "shape (" + std::to_string(S) + ",), one weight a source",
           describe(*given));
    }
    weights = device.values("source_weights", *given);
  }
  int64_t S;
  std::vector<Matrix> matrices;
  cuda::Values weights{nullptr, 0, Dtype::float32};
};

// The forward pass writes a bfloat16 gradient as it is. One of float16 might not hold what a loss
// scale still brings into its range.
ScalarType unit_grad_type(const Arguments& args, const Tensor& logits) {
  return logits.scalar_type() == ScalarType::BFloat16 ? ScalarType::BFloat16 : args.arithmetic();
}

void run(const OnDevice& device, cuda::Distillation problem) {
  Tensor workspace = device.workspace(cuda::distillation_bytes(problem));
  problem.workspace = workspace.mutable_data_ptr();
  cuda::distillation(problem, device.stream());
}

std::tuple<Tensor, Tensor> multi_source_kl(const Tensor& logits, const Tensors& sources,
                                           const std::optional<Tensor>& source_weights,
                                           double temperature, int64_t direction, int64_t reduction,
                                           bool need_grad) {
  Arguments args("multi_source_kl");
  const Matrix l = args.matrix("logits", logits, -1, -1);
  const int64_t N = logits.size(0), K = logits.size(1);
  const OnDevice device(args, "logits", logits);
  const Sources s(args, device, sources, source_weights, N, K);
  const auto kind = static_cast<Reduction>(reduction);
  const bool by_row = kind == Reduction::none;
  Tensor rows = device.output({N}, args.arithmetic(), by_row);
  const ScalarType grad_type = unit_grad_type(args, logits);
  Tensor grad = device.output({N, K}, grad_type, need_grad);
  Tensor loss = device.empty({}, args.arithmetic());
  run(device, {N,
               K,
               s.S,
               args.wide(),
               temperature,
               static_cast<Direction>(direction),
               l,
               s.matrices.data(),
               s.weights,
               {},
               0.0,
               1.0,
               kind,
               data_or_null(rows, by_row),
               data_or_null(grad, need_grad),
               dtype_of(args.op(), "unit_grad", grad),
               loss.mutable_data_ptr(),
               nullptr,
               nullptr,
               nullptr});
  return {by_row ? rows : loss, grad};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> distillation_loss(
    const Tensor& logits, const Tensors& sources, const Tensor& labels,
    const std::optional<Tensor>& source_weights, double kd_weight, double temperature,
    int64_t direction, double temperature_power, int64_t ignore_index, bool need_grad) {
  Arguments args("distillation_loss");
  const Matrix l = args.matrix("logits", logits, -1, -1);
  const int64_t N = logits.size(0), K = logits.size(1);
  const OnDevice device(args, "logits", logits);
  const Sources s(args, device, sources, source_weights, N, K);
  const cuda::Labels classes = device.labels(labels, N, K, ignore_index);
  const ScalarType grad_type = unit_grad_type(args, logits);
  Tensor grad = device.output({N, K}, grad_type, need_grad);
  Tensor loss = device.empty({}, args.arithmetic()), ce = device.empty({}, args.arithmetic());
  Tensor kl = device.empty({}, args.arithmetic());
  run(device, {N,
               K,
               s.S,
               args.wide(),
               temperature,
               static_cast<Direction>(direction),
               l,
               s.matrices.data(),
               s.weights,
               classes,
               1.0 - kd_weight,
               kd_weight * std::pow(temperature, temperature_power),
               Reduction::mean,
               nullptr,
               data_or_null(grad, need_grad),
               dtype_of(args.op(), "unit_grad", grad),
               loss.mutable_data_ptr(),
               ce.mutable_data_ptr(),
               kl.mutable_data_ptr(),
               nullptr});
  return {loss, ce, kl, grad};
}

// grad_loss (scalar or one a row) times the gradient that the forward pass left, in logits' dtype.
Tensor scaled_gradient(const char* op, const Tensor& grad_loss, const Tensor& unit_grad,
                       const Tensor& logits) {
  Arguments args(op);
  args.matrix("logits", logits, -1, -1);
  const int64_t N = logits.size(0), K = logits.size(1);
  const OnDevice device(args, "logits", logits);
  args.saved("unit_grad", unit_grad, {N, K}, unit_grad_type(args, logits));
  device.check("unit_grad", unit_grad);
  args.grad_loss(grad_loss, N);
  Tensor grad = device.empty({N, K}, logits.scalar_type());
  cuda::scale_rows({N, K, args.wide(), device.values("grad_loss", grad_loss),
                    unit_grad.const_data_ptr(), dtype_of(op, "unit_grad", unit_grad),
                    grad.mutable_data_ptr(), dtype_of(op, "logits", logits)},
                   device.stream());
  return grad;
}

Tensor multi_source_kl_backward(const Tensor& grad_loss, const Tensor& unit_grad,
                                const Tensor& logits) {
  return scaled_gradient("multi_source_kl_backward", grad_loss, unit_grad, logits);
}

Tensor distillation_loss_backward(const Tensor& grad_loss, const Tensor& unit_grad,
                                  const Tensor& logits) {
  return scaled_gradient("distillation_loss_backward", grad_loss, unit_grad, logits);
}

// The same where the gradient may be taken over: nothing moves if the factor is 1.
void scale_unit_grad(Tensor unit_grad, const Tensor& grad_loss) {
  constexpr const char* op = "scale_unit_grad_";
  Arguments args(op);
  if (args.matrix("unit_grad", unit_grad, -1, -1).dtype == Dtype::float16) {
    fail(op, "unit_grad", "float32, float64 or bfloat16", describe(unit_grad));
  }
  const int64_t N = unit_grad.size(0), K = unit_grad.size(1);
  const OnDevice device(args, "unit_grad", unit_grad);
  args.saved("unit_grad", unit_grad, {N, K}, unit_grad.scalar_type());
  args.grad_loss(grad_loss, N);
  const Dtype dtype = args.dtype("unit_grad", unit_grad);
  void* data = unit_grad.mutable_data_ptr();
  cuda::scale_rows(
      {N, K, args.wide(), device.values("grad_loss", grad_loss), data, dtype, data, dtype},
      device.stream());
}

}  // namespace
}  // namespace pycdgkd

STABLE_TORCH_LIBRARY_IMPL(pycdgkd, PYCDGKD_CUDA_KEY, m) {
  m.impl("multi_source_kl", TORCH_BOX(&pycdgkd::multi_source_kl));
  m.impl("multi_source_kl_backward", TORCH_BOX(&pycdgkd::multi_source_kl_backward));
  m.impl("scale_unit_grad_", TORCH_BOX(&pycdgkd::scale_unit_grad));
  m.impl("distillation_loss", TORCH_BOX(&pycdgkd::distillation_loss));
  m.impl("distillation_loss_backward", TORCH_BOX(&pycdgkd::distillation_loss_backward));
}
