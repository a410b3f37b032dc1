// The Python module _C: importing it registers the ops; it also tells how it was built and runs
// each kernel on NumPy arrays, one thread, with neither dispatcher nor autograd in between.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace py = pybind11;

namespace pycdgkd {
namespace {

void serial(int64_t count, int64_t, RangeBody body, void* context) {
  if (count > 0) body(0, count, context);
}

Dtype dtype_of(const py::array& array) {
  if (py::isinstance<py::array_t<float>>(array)) return Dtype::float32;
  if (py::isinstance<py::array_t<double>>(array)) return Dtype::float64;
  if (array.dtype().equal(py::dtype("float16"))) return Dtype::float16;
  throw py::type_error("pycdgkd._C: expected a float16, float32 or float64 array");
}

bool is_wide(const py::array& array) { return dtype_of(array) == Dtype::float64; }

Matrix matrix(const py::array& array, int64_t rows, int64_t columns) {
  if (array.ndim() != 2 || (rows >= 0 && array.shape(0) != rows) ||
      (columns >= 0 && array.shape(1) != columns)) {
    throw py::value_error("pycdgkd._C: expected a 2-D array of matching shape");
  }
  return {array.data(), array.strides(0) / array.itemsize(), array.strides(1) / array.itemsize(),
          dtype_of(array)};
}

py::array arithmetic_array(bool wide, std::vector<py::ssize_t> shape) {
  return wide ? py::array(py::dtype::of<double>(), std::move(shape))
              : py::array(py::dtype::of<float>(), std::move(shape));
}

using Classes = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;

void check_classes(const Classes& classes, int64_t N, int64_t K) {
  if (classes.ndim() != 1 || classes.shape(0) != N) {
    throw py::value_error("pycdgkd._C: expected one class a row");
  }
  for (int64_t i = 0; i < N; ++i) {
    if (classes.data()[i] >= K) throw py::value_error("pycdgkd._C: class out of range");
  }
}

double sum_of(const std::vector<double>& values) {
  double sum = 0.0;
  for (const double value : values) sum += value;
  return sum;
}

py::array_t<int64_t> count_classes(const Classes& classes, int64_t K) {
  py::array_t<int64_t> counts(K);
  for (int64_t k = 0; k < K; ++k) counts.mutable_at(k) = 0;
  for (int64_t i = 0; i < classes.shape(0); ++i) {
    if (classes.data()[i] >= 0) ++counts.mutable_at(classes.data()[i]);
  }
  return counts;
}

// An array that a forward kernel returned: contiguous, of the arithmetic type.
void check_saved(const py::array& array) {
  if (!(array.flags() & py::array::c_style) || dtype_of(array) == Dtype::float16) {
    throw py::value_error(
        "pycdgkd._C: expected a contiguous float32 or float64 array, as the forward returns it");
  }
}

py::tuple class_prototypes(const py::array& features, const Classes& classes, int64_t K) {
  const Matrix z = matrix(features, -1, -1);
  const int64_t N = features.shape(0), D = features.shape(1);
  check_classes(classes, N, K);
  py::array_t<int64_t> counts = count_classes(classes, K);
  py::array means = arithmetic_array(is_wide(features), {K, D});
  cpu::kernels().class_means(
      {N, D, K, is_wide(features), z, classes.data(), counts.data(), means.mutable_data()}, serial);
  return py::make_tuple(means, counts);
}

py::array class_prototypes_backward(const py::array& grad_prototypes, const Classes& classes) {
  const Matrix grad_means = matrix(grad_prototypes, -1, -1);
  const int64_t K = grad_prototypes.shape(0), D = grad_prototypes.shape(1);
  const int64_t N = classes.ndim() == 1 ? classes.shape(0) : -1;
  check_classes(classes, N, K);
  const bool wide = is_wide(grad_prototypes);
  const py::array_t<int64_t> counts = count_classes(classes, K);
  py::array grad = arithmetic_array(wide, {N, D});
  cpu::kernels().class_means_backward({N, D, K, wide, classes.data(), counts.data(), grad_means,
                                       grad.mutable_data(), dtype_of(grad)},
                                      serial);
  return grad;
}

struct Centred {
  Centred(const py::array& prototypes, double scale, bool wide)
      : active(static_cast<size_t>(prototypes.shape(0)), 1),
        array(arithmetic_array(wide, {centred_size(prototypes.shape(1), prototypes.shape(0))})) {
    cpu::kernels().centre_prototypes({prototypes.shape(1), prototypes.shape(0), wide, scale,
                                      matrix(prototypes, -1, -1), active.data(),
                                      array.mutable_data()});
  }
  std::vector<uint8_t> active;
  py::array array;
};

py::tuple prototype_loss(const py::array& features, const py::array& prototypes,
                         const Classes& classes, double scale) {
  const Matrix z = matrix(features, -1, -1);
  const int64_t N = features.shape(0), D = features.shape(1);
  matrix(prototypes, -1, D);
  const int64_t K = prototypes.shape(0);
  check_classes(classes, N, K);
  const bool wide = is_wide(features);
  Centred c(prototypes, scale, wide);
  py::array true_prob = arithmetic_array(wide, {N});
  py::array residual = arithmetic_array(wide, {N, K});
  std::vector<double> loss(num_blocks(N)), rate(num_blocks(N));
  cpu::kernels().prototype_forward(
      {N, D, K, wide, scale, z, c.array.data(), classes.data(), nullptr, true_prob.mutable_data(),
       residual.mutable_data(), loss.data(), rate.data()},
      serial);
  return py::make_tuple(sum_of(loss), true_prob, residual);
}

py::array prototype_loss_backward(const py::array& residual, const py::array& prototypes,
                                  double factor) {
  matrix(residual, -1, -1);
  const int64_t N = residual.shape(0), K = residual.shape(1);
  matrix(prototypes, K, -1);
  const int64_t D = prototypes.shape(1);
  const bool wide = is_wide(residual);
  check_saved(residual);
  Centred c(prototypes, 1.0, wide);
  py::array grad = arithmetic_array(wide, {N, D});
  cpu::kernels().prototype_backward({N, D, K, wide, factor, nullptr, residual.data(),
                                     c.array.data(), grad.mutable_data(), dtype_of(grad)},
                                    serial);
  return grad;
}

py::array prototype_grad(const py::array& residual, const py::array& features,
                         const py::array& prototypes, double factor) {
  matrix(residual, -1, -1);
  check_saved(residual);
  const int64_t N = residual.shape(0), K = residual.shape(1);
  const Matrix z = matrix(features, N, -1);
  const int64_t D = features.shape(1);
  matrix(prototypes, K, D);
  const bool wide = is_wide(residual);
  Centred c(prototypes, 1.0, wide);
  py::array grad = arithmetic_array(wide, {K, D});
  cpu::kernels().prototype_grad(
      {N, D, K, wide, factor, nullptr, residual.data(), z, c.array.data(), grad.mutable_data()},
      serial);
  return grad;
}

py::array scale_rows(
    const py::array& unit_grad,
    const py::array_t<double, py::array::c_style | py::array::forcecast>& factors) {
  matrix(unit_grad, -1, -1);
  check_saved(unit_grad);
  const int64_t N = unit_grad.shape(0), K = unit_grad.shape(1);
  if (factors.ndim() != 1 || (factors.shape(0) != 1 && factors.shape(0) != N)) {
    throw py::value_error("pycdgkd._C: expected one factor, or one a row");
  }
  const bool wide = is_wide(unit_grad);
  py::array grad = arithmetic_array(wide, {N, K});
  cpu::kernels().scale_rows({N, K, wide, factors.data(), factors.shape(0) == 1 ? 0 : 1,
                             unit_grad.data(), grad.mutable_data(), dtype_of(grad)},
                            serial);
  return grad;
}

py::tuple distillation_loss(const py::array& logits, const std::vector<py::array>& sources,
                            const std::optional<Classes>& classes,
                            const std::vector<double>& weights, double kd_weight,
                            double temperature, bool reverse) {
  const Matrix l = matrix(logits, -1, -1);
  const int64_t N = logits.shape(0), K = logits.shape(1);
  const auto S = static_cast<int64_t>(sources.size());
  if (weights.size() != sources.size()) throw py::value_error("pycdgkd._C: one weight a source");
  std::vector<Matrix> matrices;
  for (const py::array& source : sources) matrices.push_back(matrix(source, N, K));
  if (classes.has_value()) check_classes(*classes, N, K);
  const bool wide = is_wide(logits);
  py::array grad = arithmetic_array(wide, {N, K});
  std::vector<double> ce(num_blocks(N)), kl(num_blocks(N));
  const double rows = static_cast<double>(N > 0 ? N : 1);
  cpu::kernels().distillation(
      {N, K, S, wide, temperature, reverse ? Direction::reverse : Direction::forward, l,
       matrices.data(), weights.data(), classes.has_value() ? classes->data() : nullptr,
       (1.0 - kd_weight) / rows, kd_weight / rows, nullptr, grad.mutable_data(), ce.data(),
       kl.data()},
      serial);
  return py::make_tuple(sum_of(ce) / rows, sum_of(kl) / rows, grad);
}

template <class A>
py::array_t<A> exp_array(const py::array_t<A, py::array::c_style>& x) {
  py::array_t<A> y(x.size());
  if constexpr (sizeof(A) == 4) {
    cpu::kernels().exp_float(x.data(), y.mutable_data(), x.size());
  } else {
    cpu::kernels().exp_double(x.data(), y.mutable_data(), x.size());
  }
  return y;
}

template <class A>
py::array_t<A> log_array(const py::array_t<A, py::array::c_style>& x) {
  py::array_t<A> y(x.size());
  if constexpr (sizeof(A) == 4) {
    cpu::kernels().log_float(x.data(), y.mutable_data(), x.size());
  } else {
    cpu::kernels().log_double(x.data(), y.mutable_data(), x.size());
  }
  return y;
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = PYCDGKD_COMPILER;
  info["isa_levels"] = std::string(cpu::compiled_isas());
  info["isa_active"] = std::string(cpu::kernels().isa);
  info["cuda"] = static_cast<bool>(PYCDGKD_WITH_CUDA);
  info["cuda_archs"] = PYCDGKD_CUDA_ARCHS;
  info["abi_target"] = PYCDGKD_ABI_TARGET;
  info["sanitize"] = PYCDGKD_SANITIZE_FLAGS;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of pycdgkd; importing it registers torch.ops.pycdgkd.";
  m.def("build_info", &build_info, "How this module was built and which kernels it chose.");
  py::module_ k = m.def_submodule("kernels", "Each kernel on NumPy arrays, on one thread.");
  k.def("class_prototypes", &class_prototypes, py::arg("features"), py::arg("classes"),
        py::arg("num_classes"), "Eq. 1 -> (means (K, D), counts (K,)).");
  k.def("class_prototypes_backward", &class_prototypes_backward, py::arg("grad_prototypes"),
        py::arg("classes"), "-> gradient of the features (N, D).");
  k.def("prototype_loss", &prototype_loss, py::arg("features"), py::arg("prototypes"),
        py::arg("classes"), py::arg("scale") = 1.0,
        "Eqs. 2-4 -> (sum of losses, true_prob (N,), residual (N, K)).");
  k.def("prototype_loss_backward", &prototype_loss_backward, py::arg("residual"),
        py::arg("prototypes"), py::arg("factor"), "-> gradient of the features (N, D).");
  k.def("prototype_grad", &prototype_grad, py::arg("residual"), py::arg("features"),
        py::arg("prototypes"), py::arg("factor"), "-> gradient of the prototypes (K, D).");
  k.def("distillation_loss", &distillation_loss, py::arg("logits"), py::arg("sources"),
        py::arg("classes"), py::arg("weights"), py::arg("kd_weight") = 0.5,
        py::arg("temperature") = 2.0, py::arg("reverse") = true,
        "Eq. 9 -> (cross_entropy, kl, gradient of the logits (N, K)).");
  k.def("scale_rows", &scale_rows, py::arg("unit_grad"), py::arg("factors"),
        "-> the gradient (N, K) times one factor, or one a row.");
  k.def("exp", &exp_array<float>, py::arg("x").noconvert(), "The kernels' own exponential.");
  k.def("exp", &exp_array<double>, py::arg("x").noconvert());
  k.def("log", &log_array<float>, py::arg("x").noconvert(), "The kernels' own logarithm.");
  k.def("log", &log_array<double>, py::arg("x").noconvert());
}

}  // namespace pycdgkd
